"""Fine-tune a pretrained model: tasks of GLUE, or your own labelled files.

python finetune.py yamls/finetune_glue.yaml pretrained=runs/mine/checkpoints [key=value ...]
python finetune.py yamls/finetune_own.yaml pretrained=runs/mine/checkpoints [key=value ...]

A run is a task with a seed. Each is a process of its own, on a GPU of its own as they become free, or one after another
on the CPU. Finished runs are not run again. At the end: a table of all of them.
"""

import dataclasses
import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from src import builders, classifier, glue, hub, jobs, pretrained, processes, results
from src.callbacks import TrainingError
from src.config import ConfigError, read, to_dict
from src.convert import write_text
from src.data_c4 import tokenizer_fingerprint
from src.finetune_config import FinetuneConfig, LabelledData, RunSpec, load, selected
from src.finetune_run import MODEL, RESULT, run
from src.labelled import classes_of, file_hash, read_sets
from src.work_folder import locked

SPEC = "run.yaml"
"""In a run's folder, what the process that does it reads."""

FREE = ("run_name", "folder", "tasks", "only", "glue_folder", "eval_batch_size", "eval_interval", "save_models")
"""Keys that do not change what a run gives, or that are looked at task by task."""


# ----------------------------------------------------------------------------------------------------------------------
# Plan
# ----------------------------------------------------------------------------------------------------------------------


def plan(config: FinetuneConfig) -> list[RunSpec]:
    """The runs of the selected tasks, those that others start from before them.

    Raises:
        ConfigError, ValueError: a file, the model or the tokenizer is not there, or not as it must be.
    """
    config = at_hand(config)
    source = None
    if config.pretrained is not None:
        source = pretrained.read(config.pretrained)
        # The file itself: a pretraining that goes on may give its folder's `latest` to another one.
        config = dataclasses.replace(config, pretrained=str(source.path.resolve()))
    tokenizer = classifier.read_tokenizer(source, config.tokenizer_name)
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
        return (folder / "config.json").exists() and any((folder / file).exists() for file in pretrained.WEIGHTS)

    try:
        return str(hub.folder(name, "model", ["|".join(pretrained.WEIGHTS), "*.json", "vocab.txt"], complete))
    except ValueError as error:
        raise ConfigError(f"pretrained: no file, no folder, and {error}") from None


def weights_hash(path: Path) -> list[str]:
    """Hashes of a checkpoint, or of what decides a Hugging Face folder's model."""
    files = [path / name for name in ("config.json", *pretrained.WEIGHTS)] if path.is_dir() else [path]
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
    source = None if config.pretrained is None else pretrained.read(config.pretrained)
    tokenizer = classifier.read_tokenizer(source, config.tokenizer_name)
    builders.build("scheduler", builders.SCHEDULERS, config.scheduler)
    builders.build("optimizer", builders.OPTIMIZERS, config.optimizer, model=torch.nn.Linear(1, 1), lr=1.0)
    built = set()
    for spec in {spec.task: spec for spec in specs}.values():
        data = spec.config.tasks[spec.task].data
        assert data is not None, "plan fills it in"
        try:
            classes = classes_of(data, read_sets(data))
        except ConfigError as error:
            raise ConfigError(f"tasks.{spec.task}: {error}") from None
        if data.kind not in built:
            classifier.build_model(config.model, tokenizer, source, data.kind, classes, config.max_seq_len)
            built.add(data.kind)


# ----------------------------------------------------------------------------------------------------------------------
# Runs and table
# ----------------------------------------------------------------------------------------------------------------------


def finetune(config: FinetuneConfig) -> int:
    """Do the runs that are not finished, and print the table; the number of runs that failed."""
    specs = plan(config)
    todo = [spec for spec in specs if not is_finished(spec)]
    if todo:
        check(todo)
    if len(todo) < len(specs):
        jobs.say(f"{len(specs) - len(todo)} of {len(specs)} runs are finished already")
    by_encoder = {f"{spec.folder}/{MODEL}": spec.name for spec in specs}
    for spec in todo:
        Path(spec.folder).mkdir(parents=True, exist_ok=True)
        write_text(Path(spec.folder) / SPEC, yaml.safe_dump(to_dict(spec), sort_keys=False))
    queue = [
        jobs.Job(
            name=spec.name,
            command=[sys.executable, __file__, "--run", spec.folder],
            log=Path(spec.folder) / "log.txt",
            needs=by_encoder[spec.encoder] if spec.encoder else None,
        )
        for spec in todo
    ]
    failed = jobs.run(queue, jobs.devices_of(torch.cuda.device_count()), jobs.say)
    finished = [json.loads((Path(spec.folder) / RESULT).read_text()) for spec in specs if is_finished(spec)]
    write_table(config, finished, failed)
    return len(failed)


def write_table(config: FinetuneConfig, finished: list[dict[str, Any]], failed: dict[str, str]) -> None:
    """Print the table, and write it as text, JSON and Markdown."""
    aggregated = results.aggregate(finished)
    lines = results.rows(aggregated)
    ran_on = sorted({f"{run['environment']['device']}, commit {run['environment']['commit']}" for run in finished})
    number = f"{len(finished)} of {len(finished) + len(failed)} runs"
    notes = [f"{config.run_name}: {number}; {'; '.join(ran_on) or 'none'}; intervals are over seeds"]
    notes += [f"FAILED {name}: {reason}" for name, reason in failed.items()]
    folder = Path(config.folder)
    text = results.as_text(lines) + "\n" + "\n".join(notes) + "\n"
    write_text(folder / "table.txt", text)
    write_text(folder / "table.md", results.as_markdown(lines) + "\n" + "\n\n".join(notes) + "\n")
    model = {"pretrained": config.pretrained, **to_dict(config)["model"]}
    held = {"run_name": config.run_name, "model": model, **aggregated, "failed": failed}
    write_text(folder / "table.json", json.dumps(held, indent=1))
    average = "none" if aggregated["average"] is None else f"{aggregated['average']:.4f}"
    print(f"{text}finetune runs={len(finished)} failed={len(failed)} average={average} table={folder / 'table.md'}")


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if argv else 2)
    if argv[0] == "--run":  # one of the processes that finetune() starts
        processes.die_with_parent()
        run(read(RunSpec, f"{argv[1]}/{SPEC}", [], lambda spec, faults: None))
        return
    if "LOCAL_RANK" in os.environ:
        raise ConfigError("start it with python, without a launcher: it starts a process for each run itself")
    config = load(argv[0], argv[1:])
    with locked(Path(config.folder)):
        if finetune(config):
            sys.exit(1)


def interrupted(number: int, frame: Any) -> None:
    """A signal's handler: the runs that are going on end with this process."""
    sys.exit("finetune.py: interrupted; finished runs are kept, and the same command goes on")


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)
    try:
        main(sys.argv[1:])
    except (TrainingError, ValueError, OSError) as error:  # ConfigError and DataError are ValueErrors
        sys.exit(f"finetune.py: {error}")
