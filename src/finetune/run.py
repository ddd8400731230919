"""One run, a task with a seed: one Composer Trainer on one device, and its result in a file."""

import functools
import itertools
import json
import math
import shutil
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from composer import Trainer
from composer.callbacks import LRMonitor
from composer.core import DataSpec, Evaluator
from composer.utils import reproducibility
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from src.common.environment import environment
from src.common.errors import TrainingError, first_line
from src.common.files import PARTIAL, replace_folder, write_text
from src.data.tokenizer import save_tokenizer
from src.finetune.config import DEFAULT_METRICS, RunSpec
from src.finetune.data import classes_of, read_sets
from src.finetune.kinds import KINDS, Encoded, Kind
from src.finetune.model import Classifier, build_model, read_pretrained
from src.train import checkpoint, optim, weights
from src.train.callbacks import Reseed, StopOnSilentFailure
from src.train.monitors import ConsoleLine, MetricsFile
from src.train.schema import Component, build

SPEC_FILE, RESULT_FILE, MODEL_FOLDER, PREDICTIONS_FOLDER = "run.yaml", "result.json", "model", "predictions"
"""In a run's folder: what it is, and what its process writes."""


def data_spec(
    kind: Kind, encoded: Encoded, tokenizer: PreTrainedTokenizerFast, batch_size: int, seed: int | None
) -> DataSpec:
    """Batches of all examples, the last one smaller; shuffled by the seed and the epoch, or in order without a seed."""
    order = None if seed is None else torch.Generator().manual_seed(seed)
    loader = DataLoader(
        encoded.examples,  # pyright: ignore[reportArgumentType]
        batch_size=batch_size,
        shuffle=order is not None,
        generator=order,
        collate_fn=functools.partial(kind.collate, pad_token_id=tokenizer.pad_token_id),  # pyright: ignore[reportArgumentType]
        pin_memory=torch.cuda.is_available(),
    )
    return DataSpec(loader, split_batch=kind.split_batch, get_num_tokens_in_batch=kind.count_tokens)  # pyright: ignore[reportArgumentType]


def build_trainer(spec: RunSpec, model: Classifier, train: DataSpec, evaluators: list[Evaluator]) -> Trainer:
    """The Trainer of a run; it saves no checkpoint."""
    config, task = spec.config, spec.config.tasks[spec.task]
    decay = {} if task.weight_decay is None else {"weight_decay": task.weight_decay}
    optimizer = Component(config.optimizer.name, {**config.optimizer.options, **decay})
    steps = task.epochs * len(train.dataloader)  # pyright: ignore[reportArgumentType]
    return Trainer(
        run_name=f"{config.run_name}-{spec.name}",
        seed=spec.seed,
        model=model,
        optimizers=build("optimizer", optim.OPTIMIZERS, optimizer, model=model, lr=task.lr),
        schedulers=build("scheduler", optim.SCHEDULERS, config.scheduler),
        train_dataloader=train,
        eval_dataloader=evaluators,
        eval_interval=config.eval_interval,
        max_duration=f"{steps}ba",  # in steps: Composer knows the progress within an epoch
        precision=config.precision,
        device_train_microbatch_size=config.device_train_microbatch_size,
        accumulate_train_batch_on_tokens=True,  # each row, or labelled word, of a batch has the same weight
        callbacks=[Reseed(spec.seed), StopOnSilentFailure(), LRMonitor()],
        loggers=[ConsoleLine("15sec"), MetricsFile(f"{spec.folder}/metrics.jsonl")],
        progress_bar=False,
    )


def train_and_evaluate(spec: RunSpec) -> dict[str, Any]:
    """Do a run, and return its result, which is written to ``spec.folder`` last: a run with a result is complete.

    Raises:
        ValueError: data, model or options do not fit.
        TrainingError: the loss or a metric is not finite, or the device is out of memory.
    """
    started, config, folder = time.monotonic(), spec.config, Path(spec.folder)
    task, data = config.tasks[spec.task], spec.data
    kind = KINDS[data.kind](data)
    checkpoint.load_as_data()
    reproducibility.seed_all(spec.seed)  # the head's first weights

    sets = read_sets(data)
    classes = classes_of(data, sets)
    names = data.label_names or classes
    source, tokenizer = read_pretrained(config)
    if spec.encoder is not None:
        source = weights.read(spec.encoder)
    network = build_model(config.model, tokenizer, source, kind, names, config.max_seq_len)
    metrics = data.metrics or DEFAULT_METRICS[data.kind]
    model = Classifier(network, kind, {name: kind.metrics[name](classes) for name in metrics})

    encoded = {name: kind.encode(rows, classes, tokenizer, config.max_seq_len) for name, rows in sets.items()}
    train = data_spec(kind, encoded["train"], tokenizer, task.batch_size, spec.seed)
    size = config.eval_batch_size
    others = {name: data_spec(kind, encoded[name], tokenizer, size, None) for name in encoded if name != "train"}
    evaluators = {name: Evaluator(label=name, dataloader=part) for name, part in others.items()}
    test = evaluators.pop("test", None)
    trainer = build_trainer(spec, model, train, list(evaluators.values()))
    try:
        trainer.fit()
        if test is not None:
            trainer.eval(test)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of memory ({first_line(error)}). Lower device_train_microbatch_size (the loss stays the same) or "
            "eval_batch_size, or set model.gradient_checkpointing: true"
        ) from None
    for name, part in others.items():
        lines = kind.lines(trainer.predict(part), part.dataloader, names)
        write_text(folder / PREDICTIONS_FOLDER / f"{name}{kind.suffix}", lines)
    found, steps = trainer.state.eval_metrics, trainer.state.timestamp.batch.value
    values = {name: {metric: found[name][metric].compute().item() for metric in metrics} for name in others}
    trainer.close()
    for name, metric in itertools.product(values, metrics):
        if not math.isfinite(values[name][metric]):
            raise TrainingError(f"{metric} on {name} is not finite: the model predicts the same value for every row")

    if spec.save_model:
        save_model(network, tokenizer, folder / MODEL_FOLDER)
    result = {
        "task": spec.task,
        "seed": spec.seed,
        "key": spec.key,
        "score": fmean(values[name][metric] for name in evaluators for metric in metrics),
        "metrics": values,
        "rows": {name: len(rows) for name, rows in sets.items()},
        "cut": {name: part.cut for name, part in encoded.items()},
        "unread_words": {name: part.unread for name, part in encoded.items()},
        "steps": steps,
        "seconds": time.monotonic() - started,
        "environment": environment(),
    }
    write_text(folder / RESULT_FILE, json.dumps(result, indent=1))
    return result


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face folder; it is complete or absent."""
    partial = folder.with_name(f"{folder.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    save_tokenizer(tokenizer, partial)
    replace_folder(partial, folder)
