"""Resuming from a checkpoint: which settings may differ from those of the run that wrote it."""

import logging
from collections.abc import Sequence
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger

from src.common.errors import ConfigError
from src.train.schema import is_within

log = logging.getLogger(__name__)

RESTORED_BY_STREAMING = ("train_loader.shuffle_seed", "train_loader.num_canonical_nodes")
"""Restored from the checkpoint by streaming, so a new value would be ignored; always refused."""
LEARNING_RATE = ("optimizer", "scheduler", "max_duration")
"""Settings that decide the learning rate. Loading the optimizer's state overrides the optimizer's options."""
ABSENT = "not set"


def differences(there: dict[str, Any], here: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ between a checkpoint and a config: both values, by path."""
    names = sorted({*there, *here})
    both = {name: (there.get(name, ABSENT), here.get(name, ABSENT)) for name in names}
    return {name: values for name, values in both.items() if values[0] != values[1]}


class ResumeCheck(Callback):
    """Store a run's settings in its checkpoints, and compare them with those of a checkpoint when the run resumes.

    Checkpoints hold its state under the name of this class.

    Args:
        settings: what decides the run's result, by path (``config.settings``, and fingerprints).
        allow: paths and sections that may differ.
        earlier: values that mean the same and that earlier versions wrote, by path.
    """

    def __init__(self, settings: dict[str, Any], allow: Sequence[str], earlier: dict[str, Any] | None = None):
        self.settings, self.allow, self.earlier = settings, allow, earlier or {}
        self.accepted: list[str] = []
        self._options: list[list[dict[str, Any]]] = []

    def state_dict(self) -> dict[str, Any]:
        return self.settings

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.accepted = self.compare(state, "the checkpoint")

    def compare(self, there: dict[str, Any] | None, path: str) -> list[str]:
        """Paths of the accepted differences from a checkpoint's settings.

        Raises:
            ConfigError: other settings differ. One message names all of them, with both values.
        """
        if there is None:
            log.warning("%s has no settings, so none were compared with this run's", path)
            return []
        same = {name for name, value in self.earlier.items() if there.get(name) == value}
        found = {k: values for k, values in differences(there, self.settings).items() if k not in same}
        allowed = [name for name in found if any(is_within(name, ok) for ok in self.allow)]
        accepted = [name for name in allowed if name not in RESTORED_BY_STREAMING]
        refused = [name for name in found if name not in accepted]
        if not refused:
            return accepted
        lines = [f"{path} is of a run with different settings"]
        lines += [f"{name}: {found[name][0]!r} there, {found[name][1]!r} here" for name in refused]
        lines.append("Set them back, or start a new run in another save_folder")
        fixed = [name for name in refused if name in RESTORED_BY_STREAMING]
        if fixed:
            lines[-1] += f". {', '.join(fixed)} cannot change within a run: the order of samples is the checkpoint's"
        else:
            lines[-1] += f", or accept them: resume.allow=[{','.join(refused)}]"
        raise ConfigError("\n  ".join(lines))

    def before_load(self, state: State, logger: Logger) -> None:
        self._options = [[{**group, "params": None} for group in o.param_groups] for o in state.optimizers]

    def after_load(self, state: State, logger: Logger) -> None:
        """Apply accepted options of optimizer and schedule again: loading the checkpoint has overridden them."""
        if self.accepted:
            log.warning("resumed with settings that differ from the checkpoint's: %s", ", ".join(self.accepted))
        if not any(is_within(name, section) for name in self.accepted for section in LEARNING_RATE):
            return
        for optimizer, options in zip(state.optimizers, self._options, strict=True):
            for group, fresh in zip(optimizer.param_groups, options, strict=True):
                group.update({name: value for name, value in fresh.items() if name != "params"})
        for scheduler in state.schedulers:
            scheduler.base_lrs = [group["initial_lr"] for group in scheduler.optimizer.param_groups]
            for group, share in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * share(0)  # Composer's lambda takes the time from the state
