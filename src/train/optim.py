"""Optimizers and learning rate schedules, by name."""

import math
from types import SimpleNamespace
from typing import Any, Literal

import torch
from composer.core import State, Time, Timestamp, TimeUnit
from composer.optim import (
    ComposerScheduler,
    ConstantWithWarmupScheduler,
    CosineAnnealingWithWarmupScheduler,
    LinearWithWarmupScheduler,
)

from src.common.errors import ConfigError
from src.train.muon import Muon
from src.train.schema import Component, build


def decoupled_adamw(
    model: torch.nn.Module,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-6,
    weight_decay: float = 1e-5,
    decay_matrices_only: bool = False,
) -> torch.optim.AdamW:
    """AdamW with decoupled decay: a step shrinks weights by weight_decay * lr / initial lr.

    Computes what Composer's DecoupledAdamW computes, with torch's fused kernel. Composer's waits for the device once
    per parameter, to read a step count.
    """
    return adamw(model, lr, betas, eps, weight_decay / lr, decay_matrices_only)


def adamw(
    model: torch.nn.Module,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-6,
    weight_decay: float = 0.02,
    decay_matrices_only: bool = False,
) -> torch.optim.AdamW:
    """torch's fused AdamW: a step shrinks weights by weight_decay * lr. A decay d of decoupled_adamw is d / lr here."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[Any] = [{"params": parameters, "weight_decay": weight_decay}]
    if decay_matrices_only:
        matrices, others = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, fused=True)  # pyright: ignore


def muon(
    model: torch.nn.Module,
    lr: float,
    momentum: float = 0.95,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-6,
    weight_decay: float = 0.02,
    decay_matrices_only: bool = False,
    adamw_lr: float | None = None,
) -> Muon:
    """Muon for the matrices of the encoder's layers, AdamW for the rest: embeddings, head, biases, norms.

    ``lr`` and ``weight_decay`` are in AdamW's units for both; a rate that suits adamw is a good start.

    Args:
        adamw_lr: learning rate of what AdamW updates. None: ``lr``.
    """
    groups: dict[tuple[int, float], list[Any]] = {}
    others = lr if adamw_lr is None else adamw_lr
    for name, p in model.named_parameters():
        if p.requires_grad:
            parts = matrices_in(name, p)
            decay = weight_decay if p.ndim >= 2 or not decay_matrices_only else 0.0
            groups.setdefault((parts, decay), []).append(p)
    listed = [
        {"params": ps, "parts": parts, "lr": lr if parts else others, "weight_decay": decay}
        for (parts, decay), ps in groups.items()
    ]
    return Muon(listed, lr, momentum, tuple(betas), eps, weight_decay)  # pyright: ignore[reportArgumentType]


PARTS = {"Wqkv": 3, "gated_layers": 2}
"""Modules of a layer whose weight holds several matrices, one above another."""


def matrices_in(name: str, p: torch.nn.Parameter) -> int:
    """How many matrices of an encoder's layer (``layer.0.``...) a parameter holds; 0 if it is none of them."""
    modules = [module for module in name.split(".")[:-1] if module != "_orig_mod"]  # torch.compile's, around a module
    return PARTS.get(modules[-1], 1) if p.ndim == 2 and "layer" in modules[:-1] else 0


def _resolved(text: str, state: State, ssr: float) -> Time[int]:
    """A time as Composer's schedulers resolve it: ``dur`` in the unit of max_duration, and epochs in batches."""
    time, end = Time.from_timestring(text), state.max_duration
    assert end is not None
    if time.unit == TimeUnit.DURATION and end.unit != TimeUnit.EPOCH:
        return Time(int(time.value * end.value), end.unit)
    if time.unit not in (TimeUnit.DURATION, TimeUnit.EPOCH):
        return Time(int(time.value * ssr), time.unit)
    assert state.dataloader_len is not None
    steps = time.value * int(state.dataloader_len)
    return Time(int(steps * (end.value if time.unit == TimeUnit.DURATION else ssr)), TimeUnit.BATCH)


class WarmupStableDecayScheduler(ComposerScheduler):
    """Linear warmup, constant rate, then a decay at the end (Hu et al., 2024, MiniCPM, arXiv 2404.06395).

    Args:
        t_warmup: length of the warmup, for example ``0.06dur`` or ``2000ba``.
        t_decay: length of the decay.
        alpha_f: final rate, as a share of the full one.
        decay: ``linear``, or ``sqrt``: by 1 - sqrt of the decay's share (Hägele et al., 2024, arXiv 2405.18392).
    """

    def __init__(self, t_warmup: str, t_decay: str, alpha_f: float = 0.0, decay: Literal["linear", "sqrt"] = "linear"):
        self.t_warmup, self.t_decay, self.alpha_f, self.decay = t_warmup, t_decay, alpha_f, decay

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        warmup, decay, end = (_resolved(time, state, ssr) for time in (self.t_warmup, self.t_decay, "1dur"))
        if not warmup.unit == decay.unit == end.unit or warmup.value + decay.value > end.value:
            units = "dur, ba or ep" if end.unit == TimeUnit.BATCH else f"dur or {end.unit.value}"
            assert state.max_duration is not None
            raise ConfigError(
                f"scheduler: expected t_warmup and t_decay in {units}, with a sum of at most the run's length "
                f"({state.max_duration.to_timestring()}); got {self.t_warmup} and {self.t_decay}"
            )
        now = state.timestamp.get(end.unit).value
        if now < warmup.value:
            return now / warmup.value
        if now <= end.value - decay.value or not decay.value:  # the last step may end after max_duration
            return 1.0
        share = min(1.0, (now - (end.value - decay.value)) / decay.value)
        return 1.0 - (1.0 - self.alpha_f) * (math.sqrt(share) if self.decay == "sqrt" else share)


def build_scheduler(component: Component, max_duration: str, steps_per_epoch: int) -> ComposerScheduler:
    """The schedule of a run of ``max_duration``; raises ConfigError if its times do not fit that."""
    scheduler = build("scheduler", SCHEDULERS, component)
    state: Any = SimpleNamespace(max_duration=Time.from_timestring(max_duration), dataloader_len=steps_per_epoch)
    for moment in (0, 10**9):  # before the first step, and after the last one
        state.timestamp = Timestamp(epoch=moment, batch=moment, sample=moment, token=moment)
        try:
            scheduler(state)
        except ConfigError:
            raise
        except (ValueError, AssertionError, ArithmeticError) as error:
            raise ConfigError(f"scheduler.{component.name}: {error}") from None
    return scheduler


OPTIMIZERS = {"decoupled_adamw": decoupled_adamw, "adamw": adamw, "muon": muon}

SCHEDULERS = {
    "linear_decay_with_warmup": LinearWithWarmupScheduler,
    "cosine_with_warmup": CosineAnnealingWithWarmupScheduler,
    "constant_with_warmup": ConstantWithWarmupScheduler,
    "warmup_stable_decay": WarmupStableDecayScheduler,
}
