"""Optimizers and learning rate schedules by name."""

from typing import Any

import torch
from composer.core import State
from composer.optim import (
    ComposerScheduler,
    ConstantWithWarmupScheduler,
    CosineAnnealingWithWarmupScheduler,
    LinearWithWarmupScheduler,
)
from composer.optim.scheduler import _convert_time

from src.common.errors import ConfigError
from src.train.config import RunConfig
from src.train.schema import build


def _groups(model: torch.nn.Module, weight_decay: float, decay_matrices_only: bool) -> list[dict[str, Any]]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not decay_matrices_only:
        return [{"params": parameters, "weight_decay": weight_decay}]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def decoupled_adamw(
    model: torch.nn.Module,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-6,
    weight_decay: float = 1e-5,
    decay_matrices_only: bool = False,
) -> torch.optim.AdamW:
    """AdamW whose decay is apart from ``lr``: a step shrinks weights by weight_decay * lr / initial lr.

    What Composer's DecoupledAdamW computes, by torch's fused kernel: Composer's reads a step count from the device for
    each parameter in turn.
    """
    if lr <= 0:
        raise ValueError(f"lr={lr}: it must be above 0, as the decay is a part of it")
    return adamw(model, lr, betas, eps, weight_decay / lr, decay_matrices_only)


def adamw(
    model: torch.nn.Module,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-6,
    weight_decay: float = 0.02,
    decay_matrices_only: bool = False,
) -> torch.optim.AdamW:
    """torch's fused AdamW: a step shrinks weights by weight_decay * lr. decoupled_adamw's decay d is d / lr here."""
    groups = _groups(model, weight_decay, decay_matrices_only)
    return torch.optim.AdamW(groups, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, fused=True)  # pyright: ignore


class WarmupStableDecayScheduler(ComposerScheduler):
    """Linear warmup, then the full rate, then a linear decay at the end (Hu et al., 2024, MiniCPM, arXiv 2404.06395).

    Args:
        t_warmup: length of the warmup, for example ``0.06dur`` or ``2000ba``.
        t_decay: length of the decay.
        alpha_f: share of the rate that is left at the end.
    """

    def __init__(self, t_warmup: str, t_decay: str, alpha_f: float = 0.0):
        self.t_warmup, self.t_decay, self.alpha_f = t_warmup, t_decay, alpha_f

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        warmup = _convert_time(self.t_warmup, state, ssr)
        decay, end = _convert_time(self.t_decay, state, ssr), _convert_time("1dur", state, ssr)
        if not warmup.unit == decay.unit == end.unit or warmup.value + decay.value > end.value:
            raise ConfigError(
                f"scheduler: t_warmup {self.t_warmup} and t_decay {self.t_decay} must be in the unit of max_duration "
                f"({end.to_timestring()}), or in dur, and not add up to more"
            )
        now = state.timestamp.get(end.unit).value
        if now < warmup.value:
            return now / warmup.value
        if now <= end.value - decay.value:
            return 1.0
        return 1.0 - (1.0 - self.alpha_f) * min(1.0, (now - (end.value - decay.value)) / decay.value)


OPTIMIZERS = {"decoupled_adamw": decoupled_adamw, "adamw": adamw}

SCHEDULERS = {
    "linear_decay_with_warmup": LinearWithWarmupScheduler,
    "cosine_with_warmup": CosineAnnealingWithWarmupScheduler,
    "constant_with_warmup": ConstantWithWarmupScheduler,
    "warmup_stable_decay": WarmupStableDecayScheduler,
}


def build_optimizer(config: RunConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer over all of the model's parameters."""
    return build("optimizer", OPTIMIZERS, config.optimizer, model=model)


def build_scheduler(config: RunConfig) -> ComposerScheduler:
    """The schedule of the learning rate, stepped every batch."""
    return build("scheduler", SCHEDULERS, config.scheduler)
