"""The runs of a fine-tuning: tasks times seeds, in order."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from src.common import hub
from src.common.errors import ConfigError
from src.data.tokenizer import tokenizer_fingerprint
from src.finetune import glue, model
from src.finetune.config import FinetuneConfig, LabelledData, RunSpec, selected
from src.finetune.data import classes_of, file_hash, read_sets
from src.finetune.run import MODEL, RESULT
from src.train import optim, weights
from src.train.schema import build, to_dict

SPEC = "run.yaml"
"""In a run's folder, what the process that does it reads."""

FREE = ("run_name", "folder", "tasks", "only", "glue_folder", "eval_batch_size", "eval_interval", "save_models")
"""Keys that do not change what a run gives, or that are looked at task by task."""


def plan(config: FinetuneConfig) -> list[RunSpec]:
    """The runs of the selected tasks, those that others start from before them.

    Raises:
        ConfigError, ValueError: a file, the model or the tokenizer is not there, or not as it must be.
    """
    config = at_hand(config)
    source = None
    if config.pretrained is not None:
        source = weights.read(config.pretrained)
        # The file itself: a pretraining that goes on may give its folder's `latest` to another one.
        config = dataclasses.replace(config, pretrained=str(source.path.resolve()))
    tokenizer = model.read_tokenizer(source, config.tokenizer_name)
    shared = to_dict(dataclasses.replace(config, tasks={}))
    for name in FREE:
        del shared[name]
    shared["tokenizer_name"] = tokenizer_fingerprint(tokenizer)
    shared["pretrained"] = None if source is None else weights_hash(source.path)
    specs: dict[str, list[RunSpec]] = {}
    left = selected(config)
    while left:
        name = next(name for name, task in left.items() if task.starts_from is None or task.starts_from in specs)
        task = left.pop(name)
        start = None if task.starts_from is None else specs[task.starts_from][0]
        needed = any(other.starts_from == name for other in config.tasks.values())
        settings = {"shared": shared, "task": settings_of(config, name), "start": start.key if start else None}
        specs[name] = [
            RunSpec(
                task=name,
                seed=seed,
                key=hashlib.sha256(json.dumps({**settings, "seed": seed}, sort_keys=True).encode()).hexdigest(),
                encoder=f"{start.folder}/{MODEL}" if start else None,
                save_model=config.save_models or (needed and seed == task.seeds[0]),
                config=dataclasses.replace(config, tasks={name: task}),
            )
            for seed in task.seeds
        ]
    return [spec for name in specs for spec in specs[name]]


def at_hand(config: FinetuneConfig) -> FinetuneConfig:
    """The config with all that it names on this machine, by absolute path: model, GLUE's files as ``data``."""
    path = config.pretrained
    if path is not None:
        path = str(Path(path).resolve()) if Path(path).exists() else hub_model(path)
    of_glue = [name for name, task in selected(config).items() if task.data is None]
    tasks = dict(config.tasks)
    if of_glue:
        folder = Path(config.glue_folder).resolve() if config.glue_folder else glue.download(of_glue)
        for name in of_glue:
            data = LabelledData(**glue.TASKS[name], **glue.files(name, folder))
            tasks[name] = dataclasses.replace(tasks[name], data=data)
    return dataclasses.replace(config, pretrained=path, tasks=tasks)


def hub_model(name: str) -> str:
    """The folder of a model of the hub."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"pretrained: {name}: there is no such file or folder")

    def complete(folder: Path) -> bool:
        return (folder / "config.json").exists() and any((folder / file).exists() for file in weights.WEIGHTS)

    try:
        return str(hub.folder(name, "model", ["|".join(weights.WEIGHTS), "*.json", "vocab.txt"], complete))
    except ValueError as error:
        raise ConfigError(f"pretrained: no file, no folder, and {error}") from None


def weights_hash(path: Path) -> list[str]:
    """Hashes of a checkpoint, or of what decides a Hugging Face folder's model."""
    files = [path / name for name in ("config.json", *weights.WEIGHTS)] if path.is_dir() else [path]
    return [digest for file in files if file.exists() for digest in file_hash(str(file))]


def settings_of(config: FinetuneConfig, name: str) -> dict[str, Any]:
    """What decides a task's runs beside the seed: options, and the contents of its files in place of their names."""
    settings = to_dict(config.tasks[name])
    data = settings["data"]
    validation = data["validation"]
    data["train"] = file_hash(data["train"])
    if isinstance(validation, dict):
        data["validation"] = {label: file_hash(files) for label, files in validation.items()}
    elif isinstance(validation, str):
        data["validation"] = file_hash(validation)
    data["test"] = None if data["test"] is None else file_hash(data["test"])
    del settings["seeds"], settings["starts_from"]
    return settings


def is_finished(spec: RunSpec) -> bool:
    """Whether a run's result is there, and its model if that is wanted."""
    folder = Path(spec.folder)
    return (folder / RESULT).exists() and (not spec.save_model or (folder / MODEL).exists())


def check(specs: list[RunSpec]) -> None:
    """Find what is wrong with data, models and options now, and not after hours of other runs."""
    config = specs[0].config
    if config.precision != "fp32" and not torch.cuda.is_available():
        raise ConfigError(f"precision: {config.precision} needs a GPU, and none is found; precision=fp32 runs here")
    source = None if config.pretrained is None else weights.read(config.pretrained)
    tokenizer = model.read_tokenizer(source, config.tokenizer_name)
    build("scheduler", optim.SCHEDULERS, config.scheduler)
    build("optimizer", optim.OPTIMIZERS, config.optimizer, model=torch.nn.Linear(1, 1), lr=1.0)
    built = set()
    for spec in {spec.task: spec for spec in specs}.values():
        data = spec.config.tasks[spec.task].data
        assert data is not None, "plan fills it in"
        try:
            classes = classes_of(data, read_sets(data))
        except ConfigError as error:
            raise ConfigError(f"tasks.{spec.task}: {error}") from None
        if data.kind not in built:
            model.build_model(config.model, tokenizer, source, data.kind, classes, config.max_seq_len)
            built.add(data.kind)
