"""What a run logs, and where to: step monitor, stream shares, console line, metrics file."""

import itertools
import json
import logging
import math
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, TextIO

import torch
from composer.callbacks.speed_monitor import get_gpu_flops_available
from composer.core import Callback, Event, State
from composer.loggers import Logger, LoggerDestination
from composer.utils import create_interval_scheduler, dist
from torch.distributed.tensor import DTensor

from src.common.files import write_text
from src.data.microbatches import counts_of
from src.data_c4 import StreamingC4
from src.train.callbacks import is_over

log = logging.getLogger(__name__)


class StreamShares(Callback):
    """Log the share of each dataset in a mixture.

    Logs, by the dataset's name:
        data/sample_share/<name>: share of an epoch's samples; logged once.
        data/token_share/<name>: share of non-padding tokens since the last log, all processes; logged every ``STEPS``
            steps and at the end of an epoch. It waits for all processes.
    """

    STEPS = 100

    def __init__(self) -> None:
        self.names: list[str] = []
        self.tokens = torch.zeros(0)
        self._loaded: dict[str, int] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        dataset: Any = state.train_dataloader.dataset  # pyright: ignore
        assert isinstance(dataset, StreamingC4)
        self.names = list(dataset.shares)
        self.tokens = torch.tensor([self._loaded.get(name, 0) for name in self.names])
        logger.log_metrics({f"data/sample_share/{name}": share for name, share in dataset.shares.items()})

    def state_dict(self) -> dict[str, Any]:
        """Tokens since the last log, of all processes, which must call it together."""
        total = torch.stack(dist.all_gather_object(self.tokens)).sum(dim=0)
        return {"tokens": dict(zip(self.names, total.tolist(), strict=True))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Checkpoints of earlier versions have no tokens.
        self._loaded = state.get("tokens", {}) if dist.get_global_rank() == 0 else {}

    def after_dataloader(self, state: State, logger: Logger) -> None:
        for stream, tokens in counts_of(state.batch).stream_tokens.items():
            self.tokens[stream] += tokens

    def batch_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value % self.STEPS == 0:
            self.epoch_end(state, logger)

    def epoch_end(self, state: State, logger: Logger) -> None:
        total = state.device.tensor_to_device(self.tokens)
        dist.all_reduce(total, reduce_operation="SUM")
        shares = (total / total.sum().clamp(min=1)).tolist()
        logger.log_metrics({f"data/token_share/{n}": share for n, share in zip(self.names, shares, strict=True)})
        self.tokens = torch.zeros_like(self.tokens)


class StepMonitor(Callback):
    """Log throughput, data wait, gradient norm and batch statistics of each step. Tokens are non-padding tokens.

    ======================= ========================================================================================
    step/tokens_per_s       tokens per second, all processes
    step/samples_per_s      sequences per second, all processes
    step/mfu                model FLOPs per second, as a share of the GPU's peak in its data sheet; GPUs only
    step/data_wait_share    share of the time spent waiting for data
    step/fill               T / (B * S), tokens per position of this process's padded batch
    step/masked_tokens      masked tokens in this process's batch
    step/grad_norm          L2 norm of the gradient that the optimizer gets
    ======================= ========================================================================================

    The time includes loading, forward, backward and optimizer, and excludes evaluation and saving (Composer's
    SpeedMonitor includes saving).

    Args:
        window_size: steps that rates and shares are averaged over.
        warmup: first steps of a process to skip, because they compile, allocate and fill caches.
        gpu_flops_available: FLOP/s of one GPU in this precision; by default from Composer's table of data sheets.
    """

    def __init__(self, window_size: int = 20, warmup: int = 5, gpu_flops_available: float | None = None):
        self.warmup = warmup
        # Per step: seconds, seconds of waiting for data, tokens, samples, FLOPs (of this process).
        self.steps: deque[tuple[float, float, int, int, int]] = deque(maxlen=window_size)
        self.started = self.waited = 0.0
        self.gpu_flops_available = gpu_flops_available

    def fit_start(self, state: State, logger: Logger) -> None:
        if self.gpu_flops_available is None:
            self.gpu_flops_available = get_gpu_flops_available(state)  # 0 on a CPU

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self.started = time.perf_counter()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self.waited = time.perf_counter() - self.started

    def after_train_batch(self, state: State, logger: Logger) -> None:
        grads = [p.grad for p in state.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        logger.log_metrics({"step/grad_norm": norm.item()})

    def batch_end(self, state: State, logger: Logger) -> None:
        seconds = time.perf_counter() - self.started
        counts, now, before = counts_of(state.batch), state.timestamp, state.previous_timestamp
        fill = counts.num_tokens / counts.positions
        logger.log_metrics({"step/fill": fill, "step/masked_tokens": counts.num_masked})
        if self.warmup:
            self.warmup -= 1
            return
        assert before is not None, "set with every batch"
        model: Any = state.model.module if state.is_model_ddp else state.model
        tokens, samples = now.token.value - before.token.value, now.sample.value - before.sample.value
        self.steps.append((seconds, self.waited, tokens, samples, model.flops_per_batch(state.batch)))
        time_s, waited, tokens, samples, flops = (sum(column) for column in zip(*self.steps, strict=True))
        rates: dict[str, float] = {"tokens_per_s": tokens, "samples_per_s": samples, "data_wait_share": waited}
        if self.gpu_flops_available:
            rates["mfu"] = flops / self.gpu_flops_available
        logger.log_metrics({f"step/{name}": value / time_s for name, value in rates.items()})


class ConsoleLine(LoggerDestination):
    """Print step, loss, learning rate, speed and time left to standard error, every ``interval``, on rank 0.

    Speed and gradient norm need StepMonitor, the learning rate needs LRMonitor. Each evaluation prints a line, too.

    Args:
        interval: for example 100ba, 1ep or 60sec.
    """

    PARTS = (
        ("lr", "lr {:.2e}"),
        ("step/grad_norm", "grad {:.2f}"),
        ("step/tokens_per_s", "{:,.0f} tokens/s"),
        ("step/mfu", "mfu {:.1%}"),
        ("step/data_wait_share", "waiting for data {:.1%}"),
    )

    def __init__(self, interval: str = "100ba"):
        self.is_due = create_interval_scheduler(interval, checkpoint_events=False, final_events={Event.BATCH_END})
        self._metrics: dict[str, Any] = {}

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self._metrics.update(metrics)

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.is_due(state, Event.BATCH_END) or is_over(state):
            self._training_line(state)

    def epoch_end(self, state: State, logger: Logger) -> None:
        if self.is_due(state, Event.EPOCH_END) and not is_over(state):  # then the last step's line is there
            self._training_line(state)

    def eval_end(self, state: State, logger: Logger) -> None:
        prefix = f"metrics/{state.dataloader_label}/"
        values = [f"{k.removeprefix(prefix)} {v:.5g}" for k, v in self._metrics.items() if k.startswith(prefix)]
        self._print(state, [f"{state.dataloader_label}:", *values])

    def _training_line(self, state: State) -> None:
        known = {"lr" if name.startswith("lr-") else name: value for name, value in self._metrics.items()}
        parts = [text.format(known[name]) for name, text in self.PARTS if name in known]
        done = state.get_elapsed_duration()
        if done is not None and 0 < done.value < 1:
            left = state.timestamp.total_wct * (1 / done.value - 1)
            parts.append(f"{str(left).split('.')[0]} left")
        self._print(state, [f"loss {known.get('loss/train/total', math.nan):.4f}", *parts])

    @staticmethod
    def _print(state: State, parts: list[str]) -> None:
        if dist.get_global_rank() == 0:
            done = state.get_elapsed_duration()
            share = f" ({done.value:.1%})" if done is not None else ""
            print(f"step {state.timestamp.batch.value:,}{share}  {'  '.join(parts)}", file=sys.stderr, flush=True)


class MetricsFile(LoggerDestination):
    """Write metrics as JSON lines, one per training step and one per evaluation of a set, on rank 0.

    Each line has ``batch``, ``sample``, ``token`` and ``seconds`` (of training, without evaluation) since the start of
    the run, and the metrics logged since the last line; null is NaN or infinity. A start from a checkpoint keeps the
    lines up to it. A start that does not resume the run keeps the earlier file under another name: metrics.1.jsonl.

    Args:
        path: of the file; its folder is created.

    Raises:
        ValueError: it is a folder or a device.
    """

    def __init__(self, path: str):
        self.path = Path(path).resolve()  # a link stays one
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"path: expected a file, but {path} is a folder or a device")
        self.resumes = True
        """Whether a start from a checkpoint resumes the run: lines after the checkpoint are then written anew."""
        self._pending: dict[str, Any] = {}
        self._file: TextIO | None = None
        self._evaluated: set[tuple[int, str]] = set()
        """Steps and sets that have a line."""

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if dist.get_global_rank() == 0:
            self._pending.update({name: float(value) for name, value in metrics.items()})

    def fit_start(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() != 0:
            return
        done = state.timestamp.batch.value
        lines = self._lines() if done else {}
        kept = {text: line for text, line in lines.items() if line["batch"] <= done}
        names = {(line["batch"], name) for line in kept.values() for name in line if name.startswith("metrics/")}
        self._evaluated = {(step, name.split("/", 1)[1].rsplit("/", 1)[0]) for step, name in names}
        replaced = not done or (len(kept) < len(lines) and not self.resumes)
        if replaced and self.path.exists() and self.path.stat().st_size:
            numbered = (self.path.with_suffix(f".{number}{self.path.suffix}") for number in itertools.count(1))
            self.path.rename(next(path for path in numbered if not path.exists()))
        write_text(self.path, (f"{text}\n" for text in kept))
        self._file = self.path.open("a", buffering=1)  # so that each line is in the file at once

    def _lines(self) -> dict[str, dict[str, Any]]:
        """The file's lines, as text and as values; a warning names those that are damaged."""
        read: dict[str, dict[str, Any]] = {}
        text = self.path.read_text(errors="replace") if self.path.exists() else ""
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                values = json.loads(line)
                if type(values["batch"]) is not int:
                    raise TypeError
                read[line] = values
            except (ValueError, TypeError, KeyError, RecursionError):
                log.warning("%s, line %d is not a line of metrics, and is dropped", self.path, number)
        return read

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._file is not None:
            counts = {name: getattr(state.timestamp, name).value for name in ("batch", "sample", "token")}
            metrics = {name: value if math.isfinite(value) else None for name, value in self._pending.items()}
            line = {**counts, "seconds": state.timestamp.total_wct.total_seconds(), **metrics}
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._pending = {}

    def eval_end(self, state: State, logger: Logger) -> None:
        assert state.dataloader_label is not None
        evaluated = (state.timestamp.batch.value, state.dataloader_label)
        if evaluated in self._evaluated:  # before a restart from the last step of an epoch
            self._pending = {}
            return
        self._evaluated.add(evaluated)
        self.batch_end(state, logger)

    def close(self, state: State, logger: Logger) -> None:
        if self._file is not None:
            self._file.close()
