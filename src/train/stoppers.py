"""Callbacks that end a run by a metric. Composer's take a higher LanguageCrossEntropy for the better one."""

from typing import Any, Literal

import torch
from composer import callbacks
from composer.core import Callback, Timestamp, TimeUnit

from src.common.errors import ConfigError
from src.mosaic_bert import MaskedLMModel
from src.train.config import RunConfig
from src.train.schema import nearest
from src.train.yaml12 import interpolation

Comparison = Literal["less", "lt", "greater", "gt"]


def better(monitor: str) -> Comparison:
    """How a better value of a metric compares with a worse one: losses fall, accuracies rise."""
    falls = any(word in monitor.lower() for word in ("entropy", "perplexity", "loss", "error"))
    return "less" if falls else "greater"


class EarlyStopper(callbacks.EarlyStopper):
    """End the run when a metric has not improved for longer than ``patience``; a resumed run counts on.

    Args:
        monitor: name of the metric, for example LanguageCrossEntropy.
        dataloader_label: ``train``, ``eval``, or a name of ``eval_loaders``.
        comp: ``less`` if a lower value is the better one, or ``greater``. None: by the metric (``better``).
        min_delta: least difference that is an improvement.
        patience: in ba or ep, for example 2000ba; an int counts epochs.
    """

    def __init__(
        self,
        monitor: str,
        dataloader_label: str,
        comp: Comparison | None = None,
        min_delta: float = 0.0,
        patience: str | int = 1,
    ):
        super().__init__(monitor, dataloader_label, comp or better(monitor), min_delta, patience)
        if self.patience.unit not in (TimeUnit.BATCH, TimeUnit.EPOCH):
            raise ConfigError(f"callbacks.early_stopper.patience: expected ba or ep, got {patience!r}")

    def state_dict(self) -> dict[str, Any]:
        if self.best is None or self.best_occurred is None:
            return {}
        return {"best": float(self.best), **{name: self.best_occurred.get(name).value for name in ("epoch", "batch")}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.best = torch.tensor(state["best"], dtype=torch.float64)
            self.best_occurred = Timestamp(epoch=state["epoch"], batch=state["batch"])


class ThresholdStopper(callbacks.ThresholdStopper):
    """End the run when a metric is better than ``threshold``.

    Args:
        monitor, dataloader_label, comp: as for ``EarlyStopper``.
        stop_on_batch: of the label ``train``: check after each step, not after each epoch.
    """

    def __init__(
        self,
        monitor: str,
        dataloader_label: str,
        threshold: float,
        comp: Comparison | None = None,
        stop_on_batch: bool = False,
    ):
        options: dict[str, Any] = {"comp": comp or better(monitor), "stop_on_batch": stop_on_batch}
        super().__init__(monitor, dataloader_label, threshold, **options)


def check_stoppers(built: list[Callback], config: RunConfig, model: MaskedLMModel) -> None:
    """Refuse stoppers that could never end the run, in one ConfigError."""
    faults = []
    for name, stopper in zip(config.callbacks, built, strict=True):
        if not isinstance(stopper, (EarlyStopper, ThresholdStopper)):
            continue
        path, label = f"callbacks.{name}", stopper.dataloader_label
        labels, metrics = ["train", "eval", *config.eval_loaders], list(model.get_metrics(is_train=label == "train"))
        if label not in labels:
            shown = interpolation(f"{path}.dataloader_label", config.interpolations) or label
            faults.append(f"{path}.dataloader_label: no data set {shown!r}; {nearest(str(shown), labels)}")
        elif label != "train" and config.eval_interval == 0:
            faults.append(f"{path}: has no effect on {label!r} with eval_interval: 0, which never evaluates")
        if stopper.monitor not in metrics:
            shown = interpolation(f"{path}.monitor", config.interpolations) or stopper.monitor
            faults.append(f"{path}.monitor: no metric {shown!r}; {nearest(str(shown), metrics)}")
    if faults:
        raise ConfigError("\n  ".join(["these callbacks could never end the run", *faults]))
