"""Callbacks and loggers that Composer lacks."""

import json
import time
from collections import deque
from pathlib import Path
from typing import Any, TextIO

import torch
from composer.core import Callback, State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from src.config import MaskingSchedule
from src.data_c4 import mask_batch, num_tokens


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


class StepMonitor(Callback):
    """What a step computed, and where its time went.

    ======================= ========================================================================================
    step/tokens_per_s       real tokens of all processes a second: loading, forward, backward, optimizer, nothing else
    step/samples_per_s      sequences of all processes a second, likewise
    step/data_wait_share    share of that time spent waiting for data
    step/fill               T / (B * S): real tokens among the padded ones, of this process's batch
    step/masked_tokens      tokens that carry loss, of this process's batch
    step/grad_norm          L2 norm of the gradient, as the optimizer sees it
    ======================= ========================================================================================

    Evaluation and saving lie between steps and are in no step's time; SpeedMonitor counts saving as training.

    Args:
        window_size: steps that rates and shares are averaged over.
        warmup: first steps of a process, which are left out: they compile, allocate and fill caches.
    """

    def __init__(self, window_size: int = 20, warmup: int = 5):
        self.warmup = warmup
        self.steps: deque[tuple[float, float, int, int]] = deque(
            maxlen=window_size
        )  # seconds, waiting, tokens, samples
        self.started = self.waited = 0.0

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self.started = time.perf_counter()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self.waited = time.perf_counter() - self.started

    def after_train_batch(self, state: State, logger: Logger) -> None:
        grads = [p.grad for p in state.model.parameters() if p.grad is not None]
        logger.log_metrics({"step/grad_norm": torch.nn.utils.get_total_norm(grads).item()})

    def batch_end(self, state: State, logger: Logger) -> None:
        seconds = time.perf_counter() - self.started
        counts, now, before = num_tokens(state.batch), state.timestamp, state.previous_timestamp
        logger.log_metrics(
            {
                "step/fill": counts["total"] / state.batch["input_ids"].numel(),
                "step/masked_tokens": counts["loss_generating"],
            }
        )
        if self.warmup:
            self.warmup -= 1
            return
        assert before is not None, "set with every batch"
        self.steps.append(
            (seconds, self.waited, now.token.value - before.token.value, now.sample.value - before.sample.value)
        )
        total = [sum(column) for column in zip(*self.steps, strict=True)]
        logger.log_metrics(
            {
                "step/tokens_per_s": total[2] / total[0],
                "step/samples_per_s": total[3] / total[0],
                "step/data_wait_share": total[1] / total[0],
            }
        )


class TimeLimit(Callback):
    """Stop after some time, all processes at the same step; Composer then evaluates and saves as at any end.

    The schedule of the learning rate is that of the whole run, so that a later start goes on with it.

    Args:
        seconds: since the trainer began to fit.
    """

    def __init__(self, seconds: float):
        self.seconds, self.started = seconds, 0.0

    def fit_start(self, state: State, logger: Logger) -> None:
        self.started = time.monotonic()

    def batch_end(self, state: State, logger: Logger) -> None:
        over = torch.tensor([int(time.monotonic() - self.started >= self.seconds)], dtype=torch.uint8)
        over = state.device.tensor_to_device(over)
        dist.all_reduce(over, reduce_operation="MAX")  # the first clock to run out decides for all
        if over.item():
            state.stop_training()


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
        now = state.timestamp
        line = {
            "batch": now.batch.value,
            "sample": now.sample.value,
            "token": now.token.value,
            "seconds": now.total_wct.total_seconds(),
            **self._pending,
        }
        self._pending = {}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
