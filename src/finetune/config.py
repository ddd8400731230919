"""What a fine-tuning is: frozen dataclasses, read from one YAML and ``key=value`` overrides. Imports no torch.

    load("yamls/finetune_glue.yaml", ["pretrained=runs/mine/checkpoints", "only=[rte]"]) -> FinetuneConfig

Read as src/train/config.py reads a pretraining run: all faults in one error, the only place with defaults.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from src.finetune import glue
from src.train.config import INTERVAL
from src.train.schema import Component, nearest, read

METRICS = {
    "classification": ["accuracy", "f1", "macro_f1", "matthews"],
    "regression": ["pearson", "spearman"],
    "tokens": ["accuracy", "macro_f1", "entity_f1"],
}
"""Metrics that each kind of task can have. model.py says what they are."""

DEFAULT_METRICS = {"classification": ["accuracy"], "regression": ["pearson", "spearman"], "tokens": ["accuracy"]}


@dataclass(frozen=True)
class LabelledData:
    """Labelled rows of your own, in files: .csv, .json (a list of objects, or one a line), .jsonl, .parquet, .tsv.

    Each file is a path, or a pattern such as ``data/train-*.parquet``, whose files are read by name.
    """

    train: str
    """The rows to train on."""
    validation: str | float | dict[str, str]
    """The rows to evaluate on, after each ``eval_interval`` and at the end; several sets by name; or a share of
    ``train``, such as 0.1, which is then held out: by the hash of the text, so copies of a text stay on one side, and
    the same rows for each seed."""
    text: str
    """Column of the text. For ``tokens`` it holds words: a list, or a text that is split at white space."""
    label: str = "label"
    """Column of the label: a class, a number (regression), or a tag for each word (tokens)."""
    text_pair: str | None = None
    """Column of a second text, for tasks on pairs."""
    kind: Literal["classification", "regression", "tokens"] = "classification"
    """A class for a text, a number for a text, or a class for each word. A word's class is read from its first piece,
    as BERT's (Devlin et al., 2019, section 5.3)."""
    labels: list[str] | None = None
    """The classes as they stand in the files, in the order of their numbers. None: those of ``train``, sorted. For the
    metric ``f1`` the second of two is the positive one."""
    label_names: list[str] | None = None
    """What the classes are called in the saved model. None: as they stand in the files."""
    test: str | None = None
    """Rows that are evaluated once, at the end; they are no part of the score."""
    metrics: list[str] | None = None
    """What is measured; the score is the mean. Classification: accuracy (None), f1 (of two classes), macro_f1,
    matthews. Regression: pearson and spearman (None). Tokens: accuracy (None), macro_f1, entity_f1 (tags B-X, I-X, O).
    """


@dataclass(frozen=True)
class TaskConfig:
    """One task, and how it is trained: a run for each seed."""

    lr: float
    """Peak learning rate."""
    batch_size: int
    """Sequences in a step."""
    epochs: int
    """Times that training goes through the rows."""
    seeds: list[int]
    """Of the head's first weights, the order of rows, and dropout."""
    weight_decay: float | None = None
    """None: that of ``optimizer``."""
    data: LabelledData | None = None
    """Rows of your own. None: the task is GLUE's, by its name."""
    starts_from: str | None = None
    """A task whose encoder, from its first seed, this one begins with, in place of the pretrained; the head is new."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Some tasks, fine-tuned from one pretrained model."""

    run_name: str
    """Names the runs, and through ``${run_name}`` their folder."""
    folder: str
    """Where the runs' results, models and the table go. Runs that are finished there are not run again."""
    model: Component
    """``mosaic_bert`` or ``hf_bert``; ``model_config`` takes settings over those of the pretrained model."""
    pretrained: str | None
    """Weights to begin with: a checkpoint or its folder, a Hugging Face folder, or a name on the hub; null for fresh
    ones, which need ``tokenizer_name`` and a whole ``model_config``."""
    tasks: dict[str, TaskConfig]
    """Tasks by name: those of GLUE (cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb), and your own with ``data``. Runs
    start in this order, on each device that is free."""
    optimizer: Component
    """``decoupled_adamw`` or ``adamw``, without ``lr``, which is a task's."""
    scheduler: Component
    """As in pretraining; ``dur`` is a share of the run."""
    max_seq_len: int
    """Longest sequence in tokens, special ones included; longer texts are cut, the longer of a pair first."""

    only: list[str] | None = None
    """Tasks to run, with those that they start from. None: all."""
    tokenizer_name: str | None = None
    """Folder or hub name. None: the one that the pretrained model was trained with."""
    glue_folder: str | None = None
    """Folder with GLUE's files as the hub has them, ``rte/train-00000-of-00001.parquet``. None: the hub."""
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] = "amp_bf16"
    """Type of the matrix products. ``amp_*`` need a GPU."""
    device_train_microbatch_size: int | None = None
    """Sequences that a device works on at once; the loss does not depend on it. None: the batch."""
    eval_batch_size: int = 64
    """Sequences in a batch of evaluation. The result does not depend on it."""
    eval_interval: str = "1ep"
    """How often to evaluate (``metrics.jsonl`` of a run); the end, whose values are the result, always is."""
    save_models: bool = True
    """Keep each run's model as a Hugging Face folder. A model that another task starts from is always kept."""


@dataclass(frozen=True)
class RunSpec:
    """One run, a task with a seed: what finetune.py hands to the process that does it."""

    task: str
    """Its name."""
    seed: int
    """Of everything random."""
    key: str
    """Hash of all that decides the result."""
    encoder: str | None
    """Folder of the model whose encoder it begins with. None: ``pretrained``."""
    save_model: bool
    """Whether the fine-tuned model is kept."""
    config: FinetuneConfig
    """The config, with this task alone in it, and its ``data`` also where it is GLUE's."""

    @property
    def name(self) -> str:
        """``rte-seed19``."""
        return f"{self.task}-seed{self.seed}"

    @property
    def folder(self) -> str:
        """Its folder: ``FOLDER/rte-seed19-0123abcd``."""
        return f"{self.config.folder}/{self.name}-{self.key[:8]}"


NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


def load(path: str, overrides: Sequence[str] = ()) -> FinetuneConfig:
    """Read a YAML and ``key=value`` overrides (``tasks.rte.seeds=[1,2]``); raises as ``config.read`` does."""
    return read(FinetuneConfig, path, overrides, _check)


def selected(config: FinetuneConfig) -> dict[str, TaskConfig]:
    """The tasks of ``only`` and those that they start from, in the config's order."""
    wanted = list(config.tasks if config.only is None else config.only)
    for name in wanted:  # grows while it is gone through
        start = config.tasks[name].starts_from
        if start is not None and start not in wanted:
            wanted.append(start)
    return {name: task for name, task in config.tasks.items() if name in wanted}


def _check(config: FinetuneConfig, faults: list[str]) -> None:
    """Values that have the right type and make no sense."""

    def want(ok: bool, path: str, value: Any, what: str) -> None:
        if not ok:
            faults.append(f"{path}: {value!r} is not {what}")

    want(config.max_seq_len > 2, "max_seq_len", config.max_seq_len, "more than the special tokens of a sample")
    want(config.eval_batch_size > 0, "eval_batch_size", config.eval_batch_size, "positive")
    size = config.device_train_microbatch_size
    want(size is None or size > 0, "device_train_microbatch_size", size, "positive")
    interval = config.eval_interval
    want(bool(INTERVAL.fullmatch(interval)), "eval_interval", interval, "a number with ba, sp, tok, ep, sec or dur")
    if not config.tasks:
        faults.append("tasks: there is none")
    for name in config.only or []:
        if name not in config.tasks:
            faults.append(f"only: {name!r} is none of the tasks; {nearest(name, list(config.tasks))}")
    if config.only == []:
        faults.append("only: names no task; null runs all")
    if config.glue_folder is not None and all(task.data for task in config.tasks.values()):
        faults.append("glue_folder: acts only on tasks of GLUE")
    for name, task in config.tasks.items():
        path = f"tasks.{name}"
        want(bool(NAME.fullmatch(name)), "tasks", name, "a name of letters, digits, '_', '.', '-', which names folders")
        for key in ("lr", "batch_size", "epochs"):
            want(getattr(task, key) > 0, f"{path}.{key}", getattr(task, key), "positive")
        want(bool(task.seeds), f"{path}.seeds", task.seeds, "one seed at least")
        want(len(set(task.seeds)) == len(task.seeds), f"{path}.seeds", task.seeds, "a list without repetitions")
        want(all(seed >= 0 for seed in task.seeds), f"{path}.seeds", task.seeds, "a list of numbers from 0 on")
        if task.data is not None:
            _check_data(task.data, f"{path}.data", faults)
        elif name not in glue.TASKS:
            hint = nearest(name, list(glue.TASKS))
            faults.append(f"{path}: no task of GLUE ({hint}); one of your own has a section 'data'")
        _check_start(config, name, faults)


def _check_start(config: FinetuneConfig, name: str, faults: list[str]) -> None:
    before, path = [name], f"tasks.{name}.starts_from"
    while (start := config.tasks[before[-1]].starts_from) is not None:
        if start not in config.tasks:
            if len(before) == 1:  # else it is said of the other one
                faults.append(f"{path}: {start!r} is none of the tasks; {nearest(start, list(config.tasks))}")
            return
        if start in before:
            faults.append(f"{path}: goes round in a circle: {' <- '.join([*before, start])}")
            return
        before.append(start)


def _check_data(data: LabelledData, path: str, faults: list[str]) -> None:
    for metric in data.metrics or []:
        if metric not in METRICS[data.kind]:
            known = ", ".join(METRICS[data.kind])
            faults.append(f"{path}.metrics: {metric!r} is no metric of {data.kind}; known: {known}")
    if data.metrics == []:
        faults.append(f"{path}.metrics: names none")
    if isinstance(data.validation, float) and not 0 < data.validation < 1:
        faults.append(f"{path}.validation: {data.validation!r} is not a share between 0 and 1")
    if isinstance(data.validation, dict):
        for name, files in data.validation.items():
            if not isinstance(files, str) or not isinstance(name, str) or not NAME.fullmatch(name) or name == "test":
                faults.append(f"{path}.validation.{name}: {files!r} is not a file under a name of its own")
        if not data.validation:
            faults.append(f"{path}.validation: names no file")
    if data.kind == "tokens" and data.text_pair is not None:
        faults.append(f"{path}.text_pair: tasks on words take one text")
    if data.kind == "regression" and (data.labels is not None or data.label_names is not None):
        faults.append(f"{path}.labels: regression has no classes")
    if data.label_names is not None and (data.labels is None or len(data.labels) != len(data.label_names)):
        faults.append(f"{path}.label_names: needs labels, and as many of them")
    if data.labels is not None and (len(data.labels) < 2 or len(set(data.labels)) < len(data.labels)):
        faults.append(f"{path}.labels: {data.labels!r} is not two or more different classes")
