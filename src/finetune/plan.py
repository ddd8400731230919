"""The runs, tasks times seeds, in order, and the checks before anything is trained."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch

from src.common import hub
from src.common.errors import ConfigError, DataError
from src.data.tokenizer import tokenizer_fingerprint
from src.finetune import glue, model
from src.finetune.config import WATCHED, FinetuneConfig, LabelledData, RunSpec, TaskConfig, selected
from src.finetune.files import file_hashes
from src.finetune.kinds import KINDS
from src.finetune.run import MODEL_FOLDER, RESULT_FILE, read_task
from src.train import optim, weights
from src.train.loggers import LOGGERS, check_package
from src.train.schema import build, check_component, to_dict

NOT_IN_RUN_KEY = "run_name folder tasks only glue_folder eval_batch_size eval_interval save_models loggers".split()
"""Settings that do not change the result of a run, or are hashed for its task alone."""


def plan_runs(config: FinetuneConfig) -> list[RunSpec]:
    """The runs of the selected tasks; a task comes after the one that it starts from.

    Raises:
        ValueError: a file, the model or the tokenizer is missing or does not fit.
    """
    config = _with_local_files(config)
    source, tokenizer = model.read_pretrained(config)
    if source is not None:  # the file that `latest` names now: it changes when pretraining continues
        config = dataclasses.replace(config, pretrained=str(source.path.resolve()))
    options = to_dict(dataclasses.replace(config, tasks={}))
    shared = {name: value for name, value in options.items() if name not in NOT_IN_RUN_KEY}
    shared["tokenizer_name"] = tokenizer_fingerprint(tokenizer)
    if source is not None:
        names = ("config.json", *weights.WEIGHTS)
        files = [source.path / name for name in names] if source.path.is_dir() else [source.path]
        shared["pretrained"] = [digest for file in files if file.exists() for digest in file_hashes(str(file))]
    specs: dict[str, list[RunSpec]] = {}
    left = selected(config)
    while left:
        name = next(name for name, task in left.items() if task.starts_from is None or task.starts_from in specs)
        task = left.pop(name)
        start = None if task.starts_from is None else specs[task.starts_from][0]
        needed = any(other.starts_from == name for other in config.tasks.values())
        settings = {"shared": shared, "task": _task_settings(config, name), "start": start.key if start else None}
        specs[name] = [
            RunSpec(
                task=name,
                seed=seed,
                key=hashlib.sha256(json.dumps({**settings, "seed": seed}, sort_keys=True).encode()).hexdigest(),
                encoder=f"{start.folder}/{MODEL_FOLDER}" if start else None,
                save_model=config.save_models or (needed and seed == task.seeds[0]),
                config=dataclasses.replace(config, tasks={name: task}),
                hub_files=_hub_files(task),
            )
            for seed in task.seeds
        ]
    return [spec for name in specs for spec in specs[name]]


def _with_local_files(config: FinetuneConfig) -> FinetuneConfig:
    """The config with absolute paths on this machine: the model's, and GLUE's files as ``data``."""
    path = config.pretrained
    if path is not None:
        path = str(Path(path).resolve() if Path(path).exists() else _hub_model(path))
    of_glue = [name for name, task in selected(config).items() if task.data is None]
    tasks, texts = dict(config.tasks), dict(config.interpolations)
    if of_glue:
        folder = Path(config.glue_folder).resolve() if config.glue_folder else glue.download(of_glue)
        for name in of_glue:
            data = LabelledData(**glue.TASKS[name], **glue.task_files(name, folder))
            tasks[name] = dataclasses.replace(tasks[name], data=data)
            if "glue_folder" in texts:
                texts[f"tasks.{name}.data"] = None  # the paths start with the folder's
    return dataclasses.replace(config, pretrained=path, tasks=tasks, interpolations=texts)


def _hub_model(name: str) -> Path:
    """The folder of a model of the Hugging Face Hub."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"pretrained: {name}: no such file or folder")

    def is_complete(folder: Path) -> bool:
        return (folder / "config.json").exists() and any((folder / file).exists() for file in weights.WEIGHTS)

    try:
        return hub.snapshot(name, "model", [[file, "*.json", "vocab.txt"] for file in weights.WEIGHTS], is_complete)
    except DataError as error:
        raise ConfigError(f"pretrained: no such file or folder, and {error}") from None


def _task_settings(config: FinetuneConfig, name: str) -> dict[str, Any]:
    """What decides a task's results except the seed: its options, and hashes in place of file names."""

    def hashed(files: Any) -> Any:
        if isinstance(files, dict):
            return {label: file_hashes(pattern) for label, pattern in files.items()}
        return file_hashes(files) if isinstance(files, str) else files  # no file, or a share of the training set

    settings = to_dict(config.tasks[name])
    settings["data"] |= {split: hashed(settings["data"][split]) for split in ("train", "validation", "test")}
    del settings["seeds"], settings["starts_from"]
    task = config.tasks[name]
    if task.early_stopping is not None:
        if task.watched == WATCHED:
            settings["early_stopping"]["watch"] = hashed(task.early_stopping.watch)
        settings["eval_interval"] = config.eval_interval  # it decides which steps can be the best one
    return settings


def _hub_files(task: TaskConfig) -> dict[str, list[str]]:
    data, stopping = task.data, task.early_stopping
    assert data is not None
    validation = data.validation.values() if isinstance(data.validation, dict) else [data.validation]
    sets = [data.train, data.test, *validation, stopping.watch if stopping else None]
    return {place: hub.dataset_files(place) for place in sets if isinstance(place, str) and hub.is_dataset(place)}


def _check_watched(task: TaskConfig, data: LabelledData) -> None:
    """Raise ConfigError if early stopping watches a file that the run trains on or reports, under any name."""
    if task.early_stopping is None or not isinstance(task.early_stopping.watch, str):
        return
    watch, named = task.early_stopping.watch, data.validation
    sets = {"train": data.train, "test": data.test, **(named if isinstance(named, dict) else {"validation": named})}
    files = set(file_hashes(sets.pop(watch) if task.watched == watch else watch))
    for name, pattern in sets.items():
        if isinstance(pattern, str) and files & set(file_hashes(pattern)):
            raise ConfigError(f"early_stopping.watch: {watch} holds a file of {name}; the watched rows must be others")


def is_finished(spec: RunSpec) -> bool:
    """Whether a run's result exists, and its model if the run saves it."""
    folder = Path(spec.folder)
    return (folder / RESULT_FILE).exists() and (not spec.save_model or (folder / MODEL_FOLDER).exists())


def check_runs(specs: list[RunSpec]) -> None:
    """Raises ValueError for faults in data, model and options now, not after hours of other runs."""
    config = specs[0].config
    if config.precision != "fp32" and not torch.cuda.is_available():
        raise ConfigError(f"precision: {config.precision} needs a GPU, and none is found; precision=fp32 runs here")
    source, tokenizer = model.read_pretrained(config)
    for logger in config.loggers.values():
        check_component("loggers", LOGGERS, logger, given=[])
        check_package(logger.name)
    build("scheduler", optim.SCHEDULERS, config.scheduler)
    build("optimizer", optim.OPTIMIZERS, config.optimizer, model=torch.nn.Linear(1, 1), lr=1.0)
    kinds = {}
    for spec in {spec.task: spec for spec in specs}.values():
        task = spec.config.tasks[spec.task]
        try:
            _check_watched(task, spec.data)
            sets, classes = read_task(spec)
            kinds[spec.data.kind] = KINDS[spec.data.kind](spec.data), classes
            steps = math.ceil(len(sets["train"]) / task.batch_size)
            optim.build_scheduler(config.scheduler, f"{task.epochs * steps}ba", steps)
        except (ConfigError, DataError) as error:
            raise type(error)(f"tasks.{spec.task}: {error}") from None
    for kind, classes in kinds.values():
        model.build_model(config.model, tokenizer, source, kind, classes, config.max_seq_len)
