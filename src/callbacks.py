"""Callbacks and loggers that Composer lacks."""

import json
from pathlib import Path
from typing import Any, TextIO

from composer.core import Callback, State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from src.config import MaskingSchedule
from src.data_c4 import mask_batch


class ScheduledMasking(Callback):
    """Mask each training batch at the rate of the moment, in the main process, before it is split.

    Logs:
        masking/rate: share of tokens masked in this step.
    """

    def __init__(self, schedule: MaskingSchedule):
        self.schedule = schedule

    def batch_start(self, state: State, logger: Logger) -> None:
        elapsed = state.get_elapsed_duration()
        assert elapsed is not None, "the trainer has a max_duration"
        rate = self.schedule.initial + (self.schedule.final - self.schedule.initial) * elapsed.value
        state.batch = mask_batch(state.batch, rate)
        logger.log_metrics({"masking/rate": rate})


class MetricsFile(LoggerDestination):
    """Write metrics as JSON lines, one a training step and one an evaluation, to be read by scripts and plots.

    Each line has ``batch``, ``sample``, ``token`` and ``seconds`` (of training, evaluation excluded) done so far, and
    whatever was logged since the last line. A resumed run keeps the lines up to where it resumes.

    Args:
        path: of the file; its folder is made.
    """

    def __init__(self, path: str):
        self.path = Path(path)
        self._pending: dict[str, Any] = {}
        self._file: TextIO | None = None

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if dist.get_global_rank() == 0:
            self._pending.update({name: float(value) for name, value in metrics.items()})

    def fit_start(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            done = state.timestamp.batch.value
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["batch"] <= done] if done else []
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("w")
            self._file.writelines(f"{line}\n" for line in kept)

    def batch_end(self, state: State, logger: Logger) -> None:
        self._write(state)

    def eval_end(self, state: State, logger: Logger) -> None:
        self._write(state)

    def close(self, state: State, logger: Logger) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, state: State) -> None:
        if self._file is None:
            return
        time = state.timestamp
        line = {
            "batch": time.batch.value,
            "sample": time.sample.value,
            "token": time.token.value,
            "seconds": time.total_wct.total_seconds(),
            **self._pending,
        }
        self._pending = {}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
