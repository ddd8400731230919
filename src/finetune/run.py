"""One run, a task with a seed: one Composer Trainer on one device, and its result in a file."""

import dataclasses
import functools
import itertools
import json
import math
import shutil
import time
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from composer import Trainer
from composer.callbacks import LRMonitor
from composer.core import DataSpec, Evaluator, State
from composer.loggers import Logger
from composer.utils import reproducibility
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from src.common import hub
from src.common.environment import environment
from src.common.errors import DataError, TrainingError, first_line
from src.common.files import PARTIAL, replace_folder, write_text
from src.data.tokenizer import save_tokenizer
from src.finetune.config import DEFAULT_METRICS, WATCHED, RunSpec
from src.finetune.data import Rows, classes_of, hold_out, read_set, read_sets
from src.finetune.kinds import KINDS, Encoded, Kind
from src.finetune.model import Classifier, build_model, read_pretrained
from src.finetune.progress import described, say
from src.train import checkpoint, optim, weights
from src.train.callbacks import Reseed, StopOnSilentFailure
from src.train.loggers import build_loggers
from src.train.monitors import ConsoleLine, MetricsFile
from src.train.schema import Component, build, to_dict
from src.train.stoppers import EarlyStopper

SPEC_FILE, RESULT_FILE, MODEL_FOLDER, PREDICTIONS_FOLDER = "run.yaml", "result.json", "model", "predictions"
"""In a run's folder: what it is, and what its process writes."""

SETTINGS = "finetuned"
"""Key of config.json."""
UNUSED = {"train", "validation", "test", "metrics", "labels", "label_names"}
"""Settings of LabelledData that predictions do not need: the classes are in ``id2label``."""


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


class KeepBest(EarlyStopper):
    """End the run when the watched metric has not improved for longer than ``patience``; keep the best step's weights.

    Args:
        network: whose weights are copied, to the CPU's memory, at each evaluation that is the best so far.
    """

    def __init__(self, network: PreTrainedModel, monitor: str, watched: str, patience: str | int):
        super().__init__(monitor, watched, "greater", patience=patience)
        self.network = network
        self.weights: dict[str, Tensor] = {}

    def _get_monitored_metric(self, state: State) -> Tensor:
        # A correlation of equal predictions is NaN, and no number is greater than NaN.
        return super()._get_monitored_metric(state).nan_to_num(nan=-math.inf)

    def eval_end(self, state: State, logger: Logger) -> None:
        before = self.best_occurred
        super().eval_end(state, logger)
        if self.best_occurred is not before:
            self.weights = {name: x.detach().to("cpu", copy=True) for name, x in self.network.state_dict().items()}

    def restore(self) -> dict[str, Any]:
        """Load the best weights; returns the set, the step, and the metric there."""
        assert self.best is not None and self.best_occurred is not None, "the watched set is evaluated at the end"
        self.network.load_state_dict(self.weights)
        return {"set": self.dataloader_label, "step": self.best_occurred.batch.value, self.monitor: self.best.item()}


class RunLine(ConsoleLine):
    """A line after the first step, and then every 15 seconds."""

    def __init__(self) -> None:
        super().__init__("15sec")

    def batch_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch == 1:
            self._training_line(state)
        else:
            super().batch_end(state, logger)


def read_task(spec: RunSpec) -> tuple[dict[str, Rows], list[str]]:
    """All sets of a run's task by name, with the one that early stopping watches, and the classes.

    Raises:
        DataError: as ``read_sets`` and ``classes_of``; or ``early_stopping`` or ``class_weights`` do not fit the rows.
    """
    data, task = spec.data, spec.config.tasks[spec.task]
    sets, stopping, given = read_sets(data), task.early_stopping, task.class_weights
    if stopping is not None and task.watched == WATCHED:
        if isinstance(stopping.watch, str):
            sets[WATCHED] = read_set(stopping.watch, data, default_names=sets["train"].names)
        else:
            sets["train"], sets[WATCHED] = hold_out(sets["train"], stopping.watch, WATCHED, data)
    classes = classes_of(data, sets)
    if stopping is not None and stopping.metric is not None:
        KINDS[data.kind](dataclasses.replace(data, metrics=[stopping.metric])).check_classes(classes)
    if isinstance(given, dict) and set(map(str, given)) != set(classes):
        raise DataError(
            f"class_weights: expected a weight for each of {', '.join(classes)}; got {', '.join(map(str, given))}"
        )
    return sets, classes


def class_weights(given: dict[str, float] | str | None, labels: Counter[str], classes: list[str]) -> Tensor | None:
    """(classes,) fp32, or None: all are 1.

    Args:
        given: as in the YAML; ``balanced`` gives n / (classes * n of the class), as scikit-learn does.
        labels: how often the training set has each class.
    """
    if given is None:
        return None
    if isinstance(given, dict):
        by_name = {str(name): weight for name, weight in given.items()}
    else:  # a class without rows has no part in the loss
        by_name = {name: labels.total() / (len(labels) * max(labels[name], 1)) for name in classes}
    return torch.tensor([by_name[name] for name in classes], dtype=torch.float32)


def build_trainer(
    spec: RunSpec, model: Classifier, train: DataSpec, evaluators: list[Evaluator], keeper: KeepBest | None
) -> Trainer:
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
        callbacks=[Reseed(spec.seed), StopOnSilentFailure(), LRMonitor(), *([keeper] if keeper else [])],
        loggers=[
            RunLine(),
            MetricsFile(f"{spec.folder}/metrics.jsonl"),
            *build_loggers(config.loggers, resumes=False),
        ],
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
    hub.FOUND.update(spec.hub_files)
    checkpoint.load_as_data()
    reproducibility.seed_all(spec.seed)  # the head's first weights

    sets, classes = read_task(spec)
    labels = {name: Counter(label for row in rows for label in kind.classes(row)) for name, rows in sets.items()}
    for name, rows in sets.items():
        say(f"{name}: {described(len(rows), labels[name])}")
    names = data.label_names or classes
    source, tokenizer = read_pretrained(config)
    if spec.encoder is not None:
        source = weights.read(spec.encoder)
    network = build_model(config.model, tokenizer, source, kind, names, config.max_seq_len)
    metrics = data.metrics or DEFAULT_METRICS[data.kind]
    stopping, watched, keeper, measured = task.early_stopping, task.watched, None, list(metrics)
    if stopping is not None and watched is not None:
        keeper = KeepBest(network, stopping.metric or metrics[0], watched, stopping.patience)
        measured = list(dict.fromkeys([*metrics, keeper.monitor]))
    weighting = class_weights(task.class_weights, labels["train"], classes)
    model = Classifier(network, kind, {name: kind.metrics[name](classes) for name in measured}, weighting)

    encoded = {name: kind.encode(rows, classes, tokenizer, config.max_seq_len) for name, rows in sets.items()}
    tokens = sum(map(kind.size, encoded["train"].examples))
    say(f"encoded: {tokens:,} tokens of training, {encoded['train'].cut:,} rows cut at {config.max_seq_len}")
    train = data_spec(kind, encoded["train"], tokenizer, task.batch_size, spec.seed)
    size = config.eval_batch_size
    others = {name: data_spec(kind, encoded[name], tokenizer, size, None) for name in encoded if name != "train"}
    evaluators = {name: Evaluator(label=name, dataloader=part) for name, part in others.items()}
    test = evaluators.pop("test", None)
    reported = [name for name in others if name != watched]
    best = None
    try:
        trainer = build_trainer(spec, model, train, list(evaluators.values()), keeper)
        say(f"{config.model.name}, {network.num_parameters():,} parameters; {trainer.state.max_duration} to train")
        trainer.fit()
        steps = trainer.state.timestamp.batch.value
        if keeper is not None:
            best = keeper.restore()
            say(
                f"best {keeper.monitor} of {keeper.dataloader_label}: {best[keeper.monitor]:.4f} at step "
                f"{best['step']:,}, whose weights are kept and evaluated now"
            )
            trainer.eval([evaluator for name, evaluator in evaluators.items() if name != watched])
        if test is not None:
            trainer.eval(test)
        for name in reported:
            lines = kind.lines(trainer.predict(others[name]), others[name].dataloader, names)
            write_text(folder / PREDICTIONS_FOLDER / f"{name}{kind.suffix}", lines)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of memory ({first_line(error)}). Lower device_train_microbatch_size (the loss stays the same) or "
            "eval_batch_size, or set model.gradient_checkpointing: true"
        ) from None
    found = trainer.state.eval_metrics
    values = {name: {metric: found[name][metric].compute().item() for metric in metrics} for name in reported}
    trainer.close()
    for name, metric in itertools.product(values, metrics):
        if not math.isfinite(values[name][metric]):
            raise TrainingError(f"{metric} on {name} is not finite: the model predicts the same value for every row")

    if spec.save_model:
        setattr(network.config, SETTINGS, reading_settings(spec))
        save_model(network, tokenizer, config.max_seq_len, folder / MODEL_FOLDER)
    result = {
        "task": spec.task,
        "seed": spec.seed,
        "key": spec.key,
        "score": fmean(values[name][metric] for name in reported if name != "test" for metric in metrics),
        "metrics": values,
        "rows": {name: len(rows) for name, rows in sets.items()},
        "cut": {name: part.cut for name, part in encoded.items()},
        "unread_words": {name: part.unread for name, part in encoded.items()},
        "steps": steps,
        "best": best,
        "seconds": time.monotonic() - started,
        "environment": environment(),
    }
    write_text(folder / RESULT_FILE, json.dumps(result, indent=1))
    return result


def reading_settings(spec: RunSpec) -> dict[str, Any]:
    """What a run writes into its model's config.json; a value from the environment is written as its interpolation."""
    texts, path = spec.config.interpolations, f"tasks.{spec.task}.data"
    data = {name: texts.get(f"{path}.{name}", value) for name, value in to_dict(spec.data).items()}
    used = {name: value for name, value in data.items() if name not in UNUSED and value is not None}
    return {"data": used, "max_seq_len": spec.config.max_seq_len}


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, max_seq_len: int, folder: Path) -> None:
    """Write a Hugging Face folder, whose tokenizer cuts at ``max_seq_len``; it is complete or absent."""
    tokenizer.model_max_length = max_seq_len
    partial = folder.with_name(f"{folder.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    save_tokenizer(tokenizer, partial)
    replace_folder(partial, folder)
