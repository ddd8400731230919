"""Resuming from a checkpoint: which settings may differ from those of the run that wrote it."""

import logging
from collections.abc import Sequence
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger

from src.common.errors import ConfigError
from src.train.callbacks import epoch_size
from src.train.config import ADDED, resume_safe
from src.train.yaml12 import is_same, is_within

log = logging.getLogger(__name__)

RESTORED_BY_STREAMING = ("train_loader.shuffle_seed", "train_loader.num_canonical_nodes")
"""Restored from the checkpoint by streaming, so a new value would be ignored; always refused."""
LEARNING_RATE = ("optimizer", "scheduler", "max_duration")
"""Settings that decide the learning rate. Loading the optimizer's state overrides the optimizer's options."""
ABSENT = "not set"


class ResumeCheck(Callback):
    """Store a run's settings in its checkpoints, and compare them with those of a checkpoint when the run resumes.

    Checkpoints hold its state under the name of this class.

    Args:
        settings: everything that affects the run's result, by path (``config.settings`` and fingerprints).
        allow: paths and sections that may differ.
        earlier: values that earlier versions wrote for the same settings, a list for each path.
    """

    def __init__(self, settings: dict[str, Any], allow: Sequence[str], earlier: dict[str, list[Any]] | None = None):
        self.settings, self.allow, self.earlier = settings, allow, earlier or {}
        self.accepted: list[str] = []
        self._options: list[list[dict[str, Any]]] = []

    def state_dict(self) -> dict[str, Any]:
        return self.settings

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.accepted = self.compare(state, "the checkpoint")

    def compare(self, there: dict[str, Any] | None, path: str) -> list[str]:
        """Compare a checkpoint's settings with this run's; returns the paths of accepted differences.

        Raises:
            ConfigError: other settings differ. One message names all of them, with both values.
        """
        if there is None:
            log.warning("%s has no settings, so none were compared with this run's", path)
            return []
        accepted, refused, lines = [], [], [f"{path} is of a run with different settings"]
        for name in sorted({*there, *self.settings}):
            old, new = there.get(name, ADDED.get(name, ABSENT)), self.settings.get(name, ABSENT)
            # resume_safe: earlier versions compared settings that no longer count.
            if resume_safe(name) or is_same(old, new) or old in self.earlier.get(name, []):
                continue
            if name not in RESTORED_BY_STREAMING and any(is_within(name, section) for section in self.allow):
                accepted.append(name)
            else:
                refused.append(name)
                # Earlier versions stored values from the environment: they are not shown.
                bare = "${" in str(new) and "${" not in str(old)
                lines.append(f"{name}: {'a value' if bare else repr(old)} there, {new!r} here")
        if not refused:
            return accepted
        advice = f", or accept them: resume.allow=[{','.join(refused)}]"
        fixed = ", ".join(name for name in refused if name in RESTORED_BY_STREAMING)
        if fixed:
            advice = f". {fixed} cannot change within a run: the checkpoint decides the order of samples"
        lines.append(f"Set them back, or start a new run in another save_folder{advice}")
        raise ConfigError("\n  ".join(lines))

    def before_load(self, state: State, logger: Logger) -> None:
        for optimizer in state.optimizers:
            self._options.append([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])

    def after_load(self, state: State, logger: Logger) -> None:
        """Apply accepted options of optimizer and schedule again, because loading the checkpoint overrides them.

        Raises:
            ConfigError: another batch size would change the order of samples within an epoch, or the epoch of another
                dataset has ended before.
        """
        grouped, size = self.settings.get("train_loader.length_window"), "global_train_batch_size"
        if size in self.accepted and grouped and state.timestamp.batch_in_epoch > 0:
            raise ConfigError(
                f"{size} decides the order of samples if train_loader.length_window is set, so it cannot change within "
                f"an epoch: set it back, or resume from a checkpoint of an epoch's end"
            )
        self._set_steps(state)
        if self.accepted:
            log.warning("resumed with settings that differ from the checkpoint's: %s", ", ".join(self.accepted))
        if not any(is_within(name, section) for name in self.accepted for section in LEARNING_RATE):
            return
        for optimizer, options in zip(state.optimizers, self._options, strict=True):
            for group, fresh in zip(optimizer.param_groups, options, strict=True):
                group.update(fresh)
        for scheduler in state.schedulers:
            scheduler.base_lrs = [group["initial_lr"] for group in scheduler.optimizer.param_groups]
            for group, share in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * share(0)  # Composer's lambda ignores 0: it reads the state's time

    def _set_steps(self, state: State) -> None:
        """Set the steps of the current epoch, which may have begun with another batch size."""
        loader: Any = state.train_dataloader
        left = epoch_size(state) - state.timestamp.sample_in_epoch.value
        if left < 0:
            raise ConfigError(
                f"the checkpoint is {-left:,} samples beyond the end of this data's epoch: resume from a checkpoint of "
                "an epoch's end, or start a new run with pretrained"
            )
        loader.added = 0
        steps = state.timestamp.batch_in_epoch.value + -(-left // self.settings["global_train_batch_size"])
        loader.added = steps - len(loader)
        state.dataloader_len = -1  # Composer asks the loader

    def epoch_start(self, state: State, logger: Logger) -> None:
        self._set_steps(state)
