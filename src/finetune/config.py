"""The settings of fine-tuning: frozen dataclasses, from one YAML and ``key=value`` overrides. Imports no torch.

    load("yamls/finetune_glue.yaml", ["pretrained=runs/mine/checkpoints", "only=[rte]"]) -> FinetuneConfig

One error reports all faults. This is the only place with defaults.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from src.finetune import glue
from src.train.config import INTERVAL
from src.train.schema import NO_KEY, Component, Named, nearest, read, read_values, to_dict
from src.train.yaml12 import unresolved

KindName = Literal["classification", "multilabel", "multiple_choice", "question_answering", "regression", "tokens"]
KNOWN_METRICS = {
    "classification": ["accuracy", "f1", "macro_f1", "matthews"],
    "multilabel": ["micro_f1", "macro_f1", "subset_accuracy"],
    "multiple_choice": ["accuracy"],
    "question_answering": ["exact_match", "f1"],
    "regression": ["pearson", "spearman"],
    "tokens": ["accuracy", "macro_f1", "entity_f1"],
}
"""By kind of task (src/finetune/kinds); here, because this file imports no torch."""
WITHOUT_CLASSES = "multiple_choice", "question_answering", "regression"
SETTINGS_OF_KIND = {
    "choices": "multiple_choice",
    "id": "question_answering",
    "label_columns": "multilabel",
    "max_answer_length": "question_answering",
    "unanswerable": "question_answering",
}
"""Settings of ``data`` that only one kind of task has."""
DEFAULT_METRICS = {
    "classification": ["accuracy"],
    "multilabel": ["micro_f1"],
    "multiple_choice": ["accuracy"],
    "question_answering": ["exact_match", "f1"],
    "regression": ["pearson", "spearman"],
    "tokens": ["accuracy"],
}
WEIGHTED = "classification", "tokens"
"""Kinds whose loss takes ``class_weights``."""

WATCHED = "early_stopping"
"""Name of the set that early stopping watches, if it is no set of ``validation``."""
RESERVED = "train", "test", WATCHED
"""Names that a set of ``validation`` cannot have."""
OF_EACH_RUN = "console_line", "metrics_file"
"""Loggers that a YAML cannot set, since each run has them, with a file of its own."""


@dataclass(frozen=True)
class LabelledData:
    """Your own labelled rows, in .csv, .tsv, .json, .jsonl, .parquet, .arrow or, with a word per line, .conll.

    Each set is a path; a pattern such as ``data/train-*.parquet``, whose files are read in the order of their names; a
    folder of one set; or a split of a dataset of the hub, ``hf:OWNER/NAME:SPLIT`` or ``hf:OWNER/NAME:CONFIG:SPLIT``.
    """

    train: str
    """Training set."""
    validation: str | float | dict[str, str]
    """Validation set, evaluated after each ``eval_interval`` and at the end; or several by name; or the share of
    ``train`` to hold out, such as 0.1: that share of each class, by a hash of the text. Copies of a text stay together,
    and every seed holds out the same rows."""
    text: str = "text"
    """Column of the text; for ``tokens`` of the words: a list, or a text that is split at white space; for
    ``question_answering`` of the question."""
    label: str = "label"
    """Column of the label: a class, a list of classes (multilabel; or a text that is split at commas), a number
    (regression), a tag for each word (tokens), or answers (question_answering) as SQuAD has them: a list of ``{text,
    answer_start}``, or ``{text: [...], answer_start: [...]}``."""
    label_columns: list[str] | None = None
    """multilabel: in place of ``label`` a column of 0 and 1 for each class, which has the name of the class."""
    text_pair: str | None = None
    """Column of a second text, for tasks on pairs; for ``question_answering`` of the context."""
    kind: KindName = "classification"
    """A class for each text, any number of classes, the right one of several choices, a part of the context for each
    question, or a number; or a class for each word, predicted at its first word piece (Devlin et al., 2019, section
    5.3)."""
    choices: str | list[str] | None = None
    """multiple_choice: column of the list of choices, or a column for each. A text makes a pair with each of them;
    ``text_pair``, such as a question, is put before each. ``label`` is the number of the right one, its letter, or its
    text."""
    unanswerable: bool = False
    """question_answering: whether questions may have no answer, as in SQuAD 2.0; a row has none if its list of answers
    is empty."""
    max_answer_length: int = 30
    """question_answering: longest predicted answer in tokens."""
    id: str | None = None
    """question_answering: column of the name of each question in the file of predictions. None: numbers from 1."""
    labels: list[str] | None = None
    """The classes as the files have them, in the order of their numbers. None: those of ``train``, sorted. The metric
    ``f1`` takes the second of two as positive."""
    label_names: list[str] | None = None
    """Names of the classes in the saved model: of ``labels``, or without them of the numbers 0, 1, ... in the files. By
    default those that the files have for their numbers (ClassLabel of ``datasets``), or else the classes."""
    empty_texts: bool = False
    """Accept texts without a character but white space; otherwise they are refused, with their place."""
    test: str | None = None
    """Test set, evaluated once, at the end; not part of the score."""
    metrics: list[str] | None = None
    """The score is their mean. Classification: accuracy (default), f1 (two classes), macro_f1, matthews. Multilabel:
    micro_f1 (default), macro_f1, subset_accuracy. Multiple choice: accuracy. Question answering: exact_match, f1
    (default: both; from 0 to 1). Regression: pearson, spearman (default: both). Tokens: accuracy (default), macro_f1,
    entity_f1 (tags of IOB1, IOB2, IOBES)."""


@dataclass(frozen=True)
class EarlyStopping:
    """End a run when a metric no longer improves, and keep the weights that were best by it, not the last ones.

    The watched rows choose the model, so a score on them would be optimistic: they are not among the reported ones.
    """

    watch: str | float
    """What is watched at each ``eval_interval``: the share of ``train`` to hold out for it, such as 0.1; or a file; or
    one of several sets of ``validation``, by its name, which then is not reported."""
    metric: str | None = None
    """A metric of the task's kind; higher is better. None: the first of ``data.metrics``."""
    patience: str | int = 3
    """The run ends if the metric has not improved for longer than this, in ba or ep, such as 500ba. An int counts
    epochs."""


@dataclass(frozen=True)
class TaskConfig:
    """One task and how it is trained."""

    lr: float
    """Peak learning rate."""
    batch_size: int
    """Sequences per step."""
    epochs: int
    """Passes over the training set."""
    seeds: list[int]
    """One run each. A seed sets the head's first weights, the order of rows, and dropout."""
    weight_decay: float | None = None
    """None: the one of ``optimizer``."""
    data: LabelledData | None = None
    """Your own files. None: GLUE's task of this name."""
    starts_from: str | None = None
    """The task whose fine-tuned encoder, of its first seed, this one starts from, instead of ``pretrained``."""
    early_stopping: EarlyStopping | None = None
    """None: all epochs are trained, and the last weights are kept."""
    class_weights: Literal["balanced"] | dict[str, float] | None = None
    """Weight of each class in the training loss, by its name in the files. ``balanced``: inversely proportional to how
    often ``train`` has it, with a mean of 1 over the rows, or over the labelled words. None: all are 1."""

    @property
    def watched(self) -> str | None:
        """Name of the set that early stopping watches: one of ``data.validation``, or WATCHED."""
        if self.early_stopping is None or self.data is None:
            return None
        watch, named = self.early_stopping.watch, self.data.validation
        return watch if isinstance(watch, str) and isinstance(named, dict) and watch in named else WATCHED


@dataclass(frozen=True)
class FinetuneConfig:
    """Tasks, fine-tuned from one pretrained model."""

    run_name: str
    """Names the runs, and through ``${run_name}`` their folder."""
    folder: str
    """Output folder for results, models and the table. Runs that are finished in it are skipped."""
    model: Component
    """``mosaic_bert`` or ``hf_bert``; ``model_config`` overrides settings of the pretrained model."""
    pretrained: str | None
    """Initial weights: a checkpoint or its folder, a Hugging Face folder, or a name on the hub. null: random weights,
    which need ``tokenizer_name`` and a complete ``model_config``."""
    tasks: dict[str, TaskConfig]
    """Tasks by name: GLUE's (cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb), and your own with ``data``. Runs start in
    this order as devices become free."""
    optimizer: Component
    """``decoupled_adamw``, ``adamw`` or ``muon``, without ``lr``, which each task sets."""
    scheduler: Component
    """As in pretraining; ``dur`` is a fraction of the run."""
    max_seq_len: int
    """Longest sequence in tokens, with special tokens. Longer texts are cut; of a pair, the longer text first."""

    only: list[str] | None = None
    """Tasks to run, with the tasks that they start from. None: all."""
    tokenizer_name: str | None = None
    """Folder or hub name. None: the pretrained model's own."""
    glue_folder: str | None = None
    """Folder with GLUE's files as on the hub, ``rte/train-00000-of-00001.parquet``. None: nyu-mll/glue on the hub."""
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] = "amp_bf16"
    """Dtype of matrix products. ``amp_*`` needs a GPU."""
    device_train_microbatch_size: int | None = None
    """Sequences per forward pass; the loss does not depend on it. None: the whole batch."""
    eval_batch_size: int = 64
    """Sequences per evaluation batch; the result does not depend on it."""
    eval_interval: str = "1ep"
    """How often to evaluate, for a run's ``metrics.jsonl``. The result is always evaluated at the end."""
    save_models: bool = True
    """Save each run's model as a Hugging Face folder. A model that another task starts from is always saved."""
    loggers: Named = field(default_factory=dict)
    """As in pretraining: tensorboard, wandb, mlflow, ...; each run is one of its own there, ``RUN_NAME-TASK-seedSEED``.
    ``metrics.jsonl`` and the lines of the console are always written."""

    interpolations: dict[str, Any] = field(default_factory=dict, compare=False, repr=False, metadata=NO_KEY)
    """Values that depend on the environment, as the YAML has them, by path. They are written in place of the values."""


@dataclass(frozen=True)
class RunSpec:
    """One run, a task with a seed: the input of the process that does it."""

    task: str
    """Name of the task."""
    seed: int
    """Seed of everything random."""
    key: str
    """Hash of everything that decides the result."""
    encoder: str | None
    """Folder of the fine-tuned model whose encoder it starts from. None: ``pretrained``."""
    save_model: bool
    """Whether the fine-tuned model is saved."""
    config: FinetuneConfig
    """The config with this task alone, whose ``data`` is set also for GLUE."""
    hub_files: dict[str, list[str]]
    """Local files of the task's datasets of the hub: the run reads those of the key if the hub has changed since."""

    @property
    def data(self) -> LabelledData:
        """The task's files."""
        data = self.config.tasks[self.task].data
        assert data is not None, "plan_runs sets it"
        return data

    @property
    def name(self) -> str:
        """``rte-seed19``."""
        return f"{self.task}-seed{self.seed}"

    @property
    def folder(self) -> str:
        """``FOLDER/rte-seed19-0123abcd``."""
        return f"{self.config.folder}/{self.name}-{self.key[:8]}"

    def described(self) -> dict[str, Any]:
        """As plain values, with interpolations in place of those that depend on the environment."""
        texts = {f"config.{path}": text for path, text in self.config.interpolations.items()}
        if "config.folder" in texts and self.encoder is not None:
            texts["encoder"] = self.encoder.replace(self.config.folder, "${config.folder}", 1)
        return unresolved(to_dict(self), texts)


@dataclass(frozen=True)
class PredictConfig:
    """How a model that finetune.py made reads texts and predicts: saved in the model's config.json."""

    data: LabelledData
    """The columns and the kind of the task."""
    max_seq_len: int
    """Longest sequence in tokens, as in training."""
    batch_size: int = 64
    """Sequences per forward pass; the predictions do not depend on it."""
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] = "fp32"
    """Dtype of matrix products. ``amp_*`` needs a GPU."""


NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


def load(path: str, overrides: Sequence[str] = ()) -> FinetuneConfig:
    """Read a YAML and ``key=value`` overrides such as ``tasks.rte.seeds=[1,2]``; raises ConfigError."""
    return read(FinetuneConfig, path, overrides, _check)


def load_predict(given: dict[str, Any], path: str, overrides: Sequence[str]) -> PredictConfig:
    """The settings that ``path`` holds, with overrides such as ``data.text=title``; raises ConfigError."""

    def check(config: PredictConfig, faults: list[str]) -> None:
        if config.batch_size < 1:
            faults.append(f"batch_size: expected a positive number, got {config.batch_size!r}")
        faults += [f"data.{fault}" for fault in _data_faults(config.data)]

    return read_values(PredictConfig, given, path, overrides, check)


def selected(config: FinetuneConfig) -> dict[str, TaskConfig]:
    """The tasks of ``only`` and the tasks that they start from, in the config's order."""
    wanted = list(config.tasks if config.only is None else config.only)
    for name in wanted:  # grows during the loop
        start = config.tasks[name].starts_from
        if start is not None and start not in wanted:
            wanted.append(start)
    return {name: task for name, task in config.tasks.items() if name in wanted}


def _check(config: FinetuneConfig, faults: list[str]) -> None:
    """Add to ``faults`` the values of the right type that make no sense."""

    def expect(ok: bool, path: str, what: str, value: Any) -> None:
        if not ok:
            faults.append(f"{path}: expected {what}, got {value!r}")

    size, interval = config.device_train_microbatch_size, config.eval_interval
    expect(config.max_seq_len > 2, "max_seq_len", "more than the 2 special tokens of a text", config.max_seq_len)
    expect(config.eval_batch_size > 0, "eval_batch_size", "a positive number", config.eval_batch_size)
    expect(size is None or size > 0, "device_train_microbatch_size", "a positive number", size)
    expect(bool(INTERVAL.fullmatch(interval)), "eval_interval", "a number with ba, sp, tok, ep, sec or dur", interval)
    expect(bool(config.tasks), "tasks", "at least one task", config.tasks)
    expect(config.only != [], "only", "at least one task, or null for all", config.only)
    for name in config.only or []:
        if name not in config.tasks:
            faults.append(f"only: unknown task {name!r}; {nearest(name, list(config.tasks))}")
    if config.glue_folder is not None and all(task.data for task in config.tasks.values()):
        faults.append("glue_folder: has no effect without a task of GLUE")
    for name in OF_EACH_RUN:
        expect(name not in config.loggers, f"loggers.{name}", "another logger; each run has this one", name)
    for name, task in config.tasks.items():
        path = f"tasks.{name}"
        names_folder = bool(NAME.fullmatch(name))
        expect(names_folder, "tasks", "a name of letters, digits, '_', '.' and '-'; it names folders", name)
        for key in ("lr", "batch_size", "epochs"):
            expect(getattr(task, key) > 0, f"{path}.{key}", "a positive number", getattr(task, key))
        different = task.seeds != [] and len(set(task.seeds)) == len(task.seeds)
        fit = different and min(task.seeds) >= 0 and max(task.seeds) < 2**32
        expect(fit, f"{path}.seeds", "one or more different seeds, from 0 to less than 2^32", task.seeds)
        decay = task.weight_decay
        expect(decay is None or decay >= 0, f"{path}.weight_decay", "0 or more", decay)
        if task.data is not None:
            faults += [f"{path}.data.{fault}" for fault in _data_faults(task.data)]
        elif name not in glue.TASKS:
            hint = nearest(name, list(glue.TASKS))
            faults.append(f"{path}: not a task of GLUE ({hint}); a task on your own files needs a section 'data'")
        faults += [f"{path}.{fault}" for fault in _training_faults(name, task)]
        chain = [name]
        while (start := config.tasks[chain[-1]].starts_from) in config.tasks and start not in chain:
            chain.append(start)
        if start in chain:
            faults.append(f"{path}.starts_from: circular: {' <- '.join([*chain, start])}")
        elif start is not None and len(chain) == 1:  # else the other task reports it
            faults.append(f"{path}.starts_from: unknown task {start!r}; {nearest(start, list(config.tasks))}")


def _training_faults(name: str, task: TaskConfig) -> Iterator[str]:
    stopping, weights = task.early_stopping, task.class_weights
    given = task.data or (LabelledData(train="", validation="", **glue.TASKS[name]) if name in glue.TASKS else None)
    if given is None:
        return
    kind, named = given.kind, given.validation if isinstance(given.validation, dict) else glue.SPLITS.get(name, {})
    if stopping is not None:
        watch, path = stopping.watch, "early_stopping.watch"
        if stopping.metric is not None and stopping.metric not in KNOWN_METRICS[kind]:
            hint = nearest(stopping.metric, KNOWN_METRICS[kind])
            yield f"early_stopping.metric: {stopping.metric!r} is no metric of {kind}; {hint}"
        if isinstance(watch, float) and not 0 < watch < 1:
            yield f"{path}: expected a share between 0 and 1, or a file, got {watch!r}"
        reported = [given.test, *(["test", "validation", given.validation] if not named else ["test", *named.values()])]
        if watch in reported or list(named) == [watch]:
            yield (
                f"{path}: {watch!r} is reported, and choosing the model by reported rows is optimistic; give a share of"
                " train, such as 0.1, a file, or one of several validation sets"
            )
        if not re.fullmatch(r"[1-9]\d*(ba|ep)?", str(stopping.patience)):
            yield f"early_stopping.patience: expected a number, with ba or ep, such as 2ep, got {stopping.patience!r}"
    if weights is not None and kind not in WEIGHTED:
        yield f"class_weights: the loss of kind {kind} has none; {' and '.join(WEIGHTED)} take them"
    if isinstance(weights, dict) and not any(weights.values()):
        yield f"class_weights: expected one above 0 at least, got {weights!r}"
    for label, weight in weights.items() if isinstance(weights, dict) else ():
        if type(weight) not in (int, float) or not 0 <= weight < math.inf:
            yield f"class_weights.{label}: expected 0 or more, got {weight!r}"


def _data_faults(data: LabelledData) -> Iterator[str]:
    known, files, labels = KNOWN_METRICS[data.kind], data.validation, data.labels
    for metric in data.metrics or []:
        if metric not in known:
            yield f"metrics: {metric!r} is no metric of {data.kind}; {nearest(metric, known)}"
    if data.metrics == []:
        yield "metrics: expected at least one, or null for the default"
    if isinstance(files, float) and not 0 < files < 1:
        yield f"validation: expected a share between 0 and 1, got {files!r}"
    if files == {}:
        yield "validation: expected at least one file"
    for name, file in files.items() if isinstance(files, dict) else ():
        if not isinstance(file, str) or not isinstance(name, str) or not NAME.fullmatch(name) or name in RESERVED:
            yield f"validation.{name}: expected a name other than {', '.join(RESERVED)}, and a file; got {file!r}"
    if data.kind == "tokens" and data.text_pair is not None:
        yield "text_pair: has no effect with kind tokens, which takes one text"
    if data.kind in WITHOUT_CLASSES and (labels is not None or data.label_names is not None):
        yield f"labels: {data.kind} has no classes"
    for name, kind in SETTINGS_OF_KIND.items():
        if data.kind != kind and getattr(data, name) != getattr(LabelledData, name):
            yield f"{name}: has no effect with kind {data.kind}; it is for {kind}"
    if data.kind == "question_answering" and data.text_pair is None:
        yield "text_pair: missing; question_answering needs the column of the context"
    if data.kind == "multiple_choice" and not data.choices:
        yield "choices: missing; multiple_choice needs a column of lists, or two or more columns"
    if data.max_answer_length < 1:
        yield f"max_answer_length: expected a positive number, got {data.max_answer_length}"
    names, columns = data.label_names, data.label_columns
    if columns is not None and (len(columns) < 2 or len(set(columns)) < len(columns) or data.label != "label"):
        yield f"label_columns: expected two or more different columns, and no label, got {columns!r}"
    if columns is not None and names is not None and labels is None:
        yield "label_names: needs labels, which gives the order of label_columns"
    if names is not None and labels is not None and len(labels) != len(names):
        yield f"label_names: expected as many as labels, {len(labels)}, got {len(names)}"
    if names is not None and labels is None and (len(names) < 2 or len(set(names)) < len(names)):
        yield f"label_names: expected two or more different names, got {names!r}"
    if names is not None and labels is None and any(name.isdecimal() for name in names):
        yield "label_names: names that are numbers need labels: which number of the files has which name"
    if labels is not None and (len(labels) < 2 or len(set(labels)) < len(labels)):
        yield f"labels: expected two or more different classes, got {labels!r}"
