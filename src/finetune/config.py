"""The settings of a fine-tuning: frozen dataclasses, from one YAML and ``key=value`` overrides. Imports no torch.

    load("yamls/finetune_glue.yaml", ["pretrained=runs/mine/checkpoints", "only=[rte]"]) -> FinetuneConfig

As src/train/config.py: all faults are reported in one error, and defaults stand only here.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from src.finetune import glue
from src.train.config import INTERVAL
from src.train.schema import Component, nearest, read

KNOWN_METRICS = {
    "classification": ["accuracy", "f1", "macro_f1", "matthews"],
    "regression": ["pearson", "spearman"],
    "tokens": ["accuracy", "macro_f1", "entity_f1"],
}
"""By kind of task; model.py defines them."""

DEFAULT_METRICS = {"classification": ["accuracy"], "regression": ["pearson", "spearman"], "tokens": ["accuracy"]}


@dataclass(frozen=True)
class LabelledData:
    """Your own labelled rows, in .csv, .tsv, .json (a list of objects, or one per line), .jsonl or .parquet files.

    Each is a path, or a pattern such as ``data/train-*.parquet``, whose files are read in the order of their names.
    """

    train: str
    """Training set."""
    validation: str | float | dict[str, str]
    """Validation set, evaluated after each ``eval_interval`` and at the end; or several by name; or the share of
    ``train`` to hold out, such as 0.1. The split is by a hash of the text: copies of a text stay together, and every
    seed holds out the same rows."""
    text: str
    """Column of the text; for ``tokens`` of the words: a list, or a text that is split at white space."""
    label: str = "label"
    """Column of the label: a class, a number (regression), or a tag for each word (tokens)."""
    text_pair: str | None = None
    """Column of a second text, for tasks on pairs."""
    kind: Literal["classification", "regression", "tokens"] = "classification"
    """A class for each text, a number for each text, or a class for each word, predicted at its first word piece
    (Devlin et al., 2019, section 5.3)."""
    labels: list[str] | None = None
    """The classes as the files have them, in the order of their numbers. None: those of ``train``, sorted. The metric
    ``f1`` takes the second of two as positive."""
    label_names: list[str] | None = None
    """Names of the classes in the saved model. None: as in the files."""
    test: str | None = None
    """Test set, evaluated once, at the end; not part of the score."""
    metrics: list[str] | None = None
    """The score is their mean. Classification: accuracy (default), f1 (two classes), macro_f1, matthews. Regression:
    pearson, spearman (default: both). Tokens: accuracy (default), macro_f1, entity_f1 (tags B-X, I-X, O)."""


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
    """``decoupled_adamw`` or ``adamw``, without ``lr``, which each task sets."""
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


NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


def load(path: str, overrides: Sequence[str] = ()) -> FinetuneConfig:
    """Read a YAML and ``key=value`` overrides such as ``tasks.rte.seeds=[1,2]``; raises ConfigError."""
    return read(FinetuneConfig, path, overrides, _check)


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

    def expect(ok: bool, path: str, value: Any, what: str) -> None:
        if not ok:
            faults.append(f"{path}: expected {what}, got {value!r}")

    expect(config.max_seq_len > 2, "max_seq_len", config.max_seq_len, "more than the 2 special tokens of a text")
    expect(config.eval_batch_size > 0, "eval_batch_size", config.eval_batch_size, "a positive number")
    size = config.device_train_microbatch_size
    expect(size is None or size > 0, "device_train_microbatch_size", size, "a positive number")
    interval = config.eval_interval
    expect(bool(INTERVAL.fullmatch(interval)), "eval_interval", interval, "a number with ba, sp, tok, ep, sec or dur")
    expect(bool(config.tasks), "tasks", config.tasks, "at least one task")
    expect(config.only != [], "only", config.only, "at least one task, or null for all")
    for name in config.only or []:
        if name not in config.tasks:
            faults.append(f"only: unknown task {name!r}; {nearest(name, list(config.tasks))}")
    if config.glue_folder is not None and all(task.data for task in config.tasks.values()):
        faults.append("glue_folder: has no effect without a task of GLUE")
    for name, task in config.tasks.items():
        path = f"tasks.{name}"
        expect(
            bool(NAME.fullmatch(name)), "tasks", name, "a name of letters, digits, '_', '.' and '-'; it names folders"
        )
        for key in ("lr", "batch_size", "epochs"):
            expect(getattr(task, key) > 0, f"{path}.{key}", getattr(task, key), "a positive number")
        different = task.seeds and len(set(task.seeds)) == len(task.seeds) and min(task.seeds) >= 0
        expect(bool(different), f"{path}.seeds", task.seeds, "one or more different seeds, none negative")
        if task.data is not None:
            _check_data(task.data, f"{path}.data", faults)
        elif name not in glue.TASKS:
            hint = nearest(name, list(glue.TASKS))
            faults.append(f"{path}: not a task of GLUE ({hint}); a task on your own files needs a section 'data'")
        _check_start(config, name, faults)


def _check_start(config: FinetuneConfig, name: str, faults: list[str]) -> None:
    chain, path = [name], f"tasks.{name}.starts_from"
    while (start := config.tasks[chain[-1]].starts_from) is not None:
        if start not in config.tasks:
            if len(chain) == 1:  # else the other task reports it
                faults.append(f"{path}: unknown task {start!r}; {nearest(start, list(config.tasks))}")
            return
        if start in chain:
            faults.append(f"{path}: circular: {' <- '.join([*chain, start])}")
            return
        chain.append(start)


def _check_data(data: LabelledData, path: str, faults: list[str]) -> None:
    known = KNOWN_METRICS[data.kind]
    for metric in data.metrics or []:
        if metric not in known:
            faults.append(f"{path}.metrics: {metric!r} is no metric of {data.kind}; {nearest(metric, known)}")
    if data.metrics == []:
        faults.append(f"{path}.metrics: expected at least one, or null for the default")
    if isinstance(data.validation, float) and not 0 < data.validation < 1:
        faults.append(f"{path}.validation: expected a share between 0 and 1, got {data.validation!r}")
    if isinstance(data.validation, dict):
        for name, files in data.validation.items():
            if not isinstance(files, str) or not isinstance(name, str) or not NAME.fullmatch(name) or name == "test":
                faults.append(f"{path}.validation.{name}: expected a name other than test, and a file; got {files!r}")
        if not data.validation:
            faults.append(f"{path}.validation: expected at least one file")
    if data.kind == "tokens" and data.text_pair is not None:
        faults.append(f"{path}.text_pair: has no effect with kind tokens, which takes one text")
    if data.kind == "regression" and (data.labels is not None or data.label_names is not None):
        faults.append(f"{path}.labels: regression has no classes")
    if data.label_names is not None and (data.labels is None or len(data.labels) != len(data.label_names)):
        faults.append(f"{path}.label_names: needs labels, and as many of them")
    if data.labels is not None and (len(data.labels) < 2 or len(set(data.labels)) < len(data.labels)):
        faults.append(f"{path}.labels: expected two or more different classes, got {data.labels!r}")
