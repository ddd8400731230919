"""Callbacks and loggers that Composer lacks."""

import json
import math
import random
import signal
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from composer.callbacks import CheckpointSaver
from composer.callbacks.speed_monitor import get_gpu_flops_available
from composer.core import Callback, Event, State, get_precision_context
from composer.loggers import Logger, LoggerDestination
from composer.utils import create_interval_scheduler, dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from src.config import MaskingSchedule
from src.data_c4 import StreamingC4, mask_batch
from src.microbatches import Batch, num_tokens


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says what, where and what to do."""


class Interrupted(Exception):
    """A signal stopped the run after a step that is saved; the message says which, and how to go on."""


class Reseed(Callback):
    """Seed all random generators at each step's begin, by the run's seed, the step and the rank.

    Dropout is then a function of these three: a restart need not have seen the steps before. Composer restores random
    states only between epochs, and to where they were when the checkpoint was written, not where its data begins.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def batch_start(self, state: State, logger: Logger) -> None:
        source = np.random.SeedSequence([self.seed, state.timestamp.batch.value, dist.get_global_rank()])
        for_torch, for_numpy, for_python = source.generate_state(3).tolist()
        torch.manual_seed(for_torch)  # the GPU's generators too
        np.random.seed(for_numpy)
        random.seed(for_python)


class StopOnSignal(Callback):
    """At SIGTERM or SIGINT, end all processes after the step that runs, with a checkpoint of it.

    One process that got the signal is enough. Before the first step and after the last one a signal ends the process
    at once, and so does a second one; but not within ``ECHO`` seconds, because a launcher that was signalled with its
    processes hands its own signal on to them.

    Raises:
        Interrupted: from fit, in all processes, after the same step.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)
    ECHO = 3.0

    def __init__(self) -> None:
        self.received: tuple[str, float] | None = None
        self._before: dict[signal.Signals, Any] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}

    def _note(self, number: int, frame: Any) -> None:
        if self.received is None:
            self.received = signal.Signals(number).name, time.monotonic()
            print(f"{self.received[0]}: ending after this step; once more ends at once", file=sys.stderr, flush=True)
        elif time.monotonic() - self.received[1] > self.ECHO:
            sys.exit(128 + number)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        stop = torch.tensor([int(self.received is not None)], dtype=torch.uint8)
        stop = state.device.tensor_to_device(stop)
        dist.all_reduce(stop, reduce_operation="MAX")
        if not stop.item():
            return
        for number in self.SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # a launcher ends those that are later than the first
        step, savers = state.timestamp.batch, [c for c in state.callbacks if isinstance(c, CheckpointSaver)]
        for saver in savers:
            if saver.last_checkpoint_batch != step:
                saver._save_checkpoint(state, logger)
            saver.fit_end(state, logger)  # what goes to an object store has arrived
        kept = "its checkpoint is written, and the same command with autoresume: true goes on"
        raise Interrupted(f"stopped by a signal after step {step.value}; {kept if savers else 'nothing is saved'}")

    def fit_end(self, state: State, logger: Logger) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Guard(Callback):
    """Stop a run that would go wrong in silence: the loss is no number, or an epoch ended before its data did.

    The loss is looked at when Composer has read it anyway, after the step and before anything is saved.
    """

    def __init__(self) -> None:
        self.bad: torch.Tensor | None = None
        self.lr = 0.0

    def after_loss(self, state: State, logger: Logger) -> None:
        assert isinstance(state.loss, torch.Tensor)
        bad = ~state.loss.detach().isfinite()
        self.bad = bad if self.bad is None else self.bad | bad  # on the device: nobody waits for it
        self.lr = state.optimizers[0].param_groups[0]["lr"]

    def batch_end(self, state: State, logger: Logger) -> None:
        loss, bad, self.bad = state.total_loss_dict.get("loss/train/total", 0.0), self.bad, None
        if math.isfinite(loss):
            return
        gathered = dist.all_gather_object(bad is not None and bool(bad.item()))
        ranks = ", ".join(str(rank) for rank, found in enumerate(gathered) if found) or "none (their sum overflowed)"
        savers = [callback for callback in state.callbacks if isinstance(callback, CheckpointSaver)]
        saved = [name for saver in savers for name in saver.all_saved_checkpoints_to_timestamp]
        raise TrainingError(
            f"the loss is {loss} at step {state.timestamp.batch.value} on ranks {ranks}, learning rate {self.lr:g}. "
            f"{'Last checkpoint before it: ' + saved[-1] if saved else 'This run has saved no checkpoint before it'}. "
            "A lower learning rate, a longer warmup or algorithms.gradient_clipping may help"
        )

    def epoch_end(self, state: State, logger: Logger) -> None:
        assert state.previous_timestamp is not None
        done, want = state.previous_timestamp.batch_in_epoch.value, state.dataloader_len
        if want is not None and done < want.value:
            raise TrainingError(f"epoch {state.timestamp.epoch.value} ended after {done} of {want.value} batches")


def _local(p: torch.Tensor) -> torch.Tensor:
    """What this process holds of a parameter: its shard, with FSDP."""
    return p.to_local() if isinstance(p, DTensor) else p


class LargestStep(Callback):
    """Before the first step, forward and backward once over the largest microbatch that can come, and discard it.

    Too little memory shows at once, and not in the night when long sequences meet. Random states stay as they are.

    Args:
        microbatch: the largest, with its layout.
    """

    def __init__(self, microbatch: Batch):
        self.microbatch = microbatch

    def fit_start(self, state: State, logger: Logger) -> None:
        batch = state.device.batch_to_device(self.microbatch)
        parameters = [p for p in state.model.parameters() if p.requires_grad]
        states = state.optimizers[0].state
        device = parameters[0].device
        state.model.train()
        try:
            # Adam's two moments come into being with the first step.
            new = sum(_local(p).numel() for p in parameters if p not in states)
            moments = torch.empty(2 * new, device=device)
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                with get_precision_context(state.precision, state.precision_config):
                    loss = state.model(batch).loss
                loss.backward()
            del moments
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            size, tokens = self.microbatch["num_samples"], self.microbatch["num_tokens"]
            reason = str(error).splitlines()[0]
            raise TrainingError(
                f"too little memory for a microbatch of {size} sequences, {tokens} tokens ({reason}). Lower "
                "device_train_microbatch_size (the loss stays the same; auto finds what fits), or set "
                "model.gradient_checkpointing: true"
            ) from None
        finally:
            for p in parameters:
                p.grad = None


class AverageGradients(Callback):
    """Make FSDP's gradients the average over processes where the backend adds them up: gloo of torch 2.7 takes
    ``ReduceOp.AVG`` for ``SUM``, in silence.
    """

    def fit_start(self, state: State, logger: Logger) -> None:
        world_size = dist.get_world_size()
        ones = state.device.tensor_to_device(torch.ones(world_size))
        average = torch.empty_like(ones[:1])
        torch.distributed.reduce_scatter_tensor(average, ones, op=torch.distributed.ReduceOp.AVG)
        if average.item() == 1:
            return

        def divide(gradient: torch.Tensor) -> None:
            gradient.div_(world_size)

        for module in state.model.modules():
            if isinstance(module, FSDPModule):
                module.set_all_reduce_hook(divide)


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


class StreamShares(Callback):
    """How much of training each of several mixed datasets is.

    Logs, by the dataset's name:
        data/sample_share/<name>: share of the samples that an epoch draws; once.
        data/token_share/<name>: share of the real tokens of all processes since it was last logged; every ``steps``
            steps, and at the end of an epoch.

    Args:
        steps: batches between two counts, each of which waits for all processes.
    """

    def __init__(self, steps: int = 100):
        self.steps = steps
        self.names: list[str] = []
        self.tokens = torch.zeros(0)

    def fit_start(self, state: State, logger: Logger) -> None:
        dataset: Any = state.train_dataloader.dataset  # pyright: ignore
        assert isinstance(dataset, StreamingC4)
        self.names, self.tokens = list(dataset.shares), torch.zeros(len(dataset.shares), dtype=torch.int64)
        logger.log_metrics({f"data/sample_share/{name}": share for name, share in dataset.shares.items()})

    def after_dataloader(self, state: State, logger: Logger) -> None:
        lengths = state.batch["attention_mask"].sum(dim=1)
        self.tokens.index_add_(0, state.batch["stream"][:, 0], lengths)

    def batch_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value % self.steps == 0:
            self._log(state, logger)

    def epoch_end(self, state: State, logger: Logger) -> None:
        self._log(state, logger)

    def _log(self, state: State, logger: Logger) -> None:
        total = state.device.tensor_to_device(self.tokens)
        dist.all_reduce(total, reduce_operation="SUM")
        shares = (total / total.sum().clamp(min=1)).tolist()
        logger.log_metrics({f"data/token_share/{n}": share for n, share in zip(self.names, shares, strict=True)})
        self.tokens = torch.zeros_like(self.tokens)


class StepMonitor(Callback):
    """What a step computed, and where its time went.

    ======================= ========================================================================================
    step/tokens_per_s       real tokens of all processes a second: loading, forward, backward, optimizer, nothing else
    step/samples_per_s      sequences of all processes a second, likewise
    step/mfu                model FLOPs done in that time, of those that the GPU's data sheet promises; GPUs only
    step/data_wait_share    share of that time spent waiting for data
    step/fill               T / (B * S): real tokens among the padded ones, of this process's batch
    step/masked_tokens      tokens that carry loss, of this process's batch
    step/grad_norm          L2 norm of the gradient, as the optimizer sees it
    ======================= ========================================================================================

    Evaluation and saving lie between steps and are in no step's time; SpeedMonitor counts saving as training.

    Args:
        window_size: steps that rates and shares are averaged over.
        warmup: first steps of a process, which are left out: they compile, allocate and fill caches.
        gpu_flops_available: FLOP/s of one GPU in this precision; None takes Composer's table of data sheets.
    """

    def __init__(self, window_size: int = 20, warmup: int = 5, gpu_flops_available: float | None = None):
        self.warmup = warmup
        # Of each step: seconds, seconds of them waiting, tokens, samples, FLOPs (of this process).
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
        model: Any = state.model.module if state.is_model_ddp else state.model
        tokens, samples = now.token.value - before.token.value, now.sample.value - before.sample.value
        self.steps.append((seconds, self.waited, tokens, samples, model.flops_per_batch(state.batch)))
        time_s, waited, tokens, samples, flops = (sum(column) for column in zip(*self.steps, strict=True))
        metrics = {
            "step/tokens_per_s": tokens / time_s,
            "step/samples_per_s": samples / time_s,
            "step/data_wait_share": waited / time_s,
        }
        if self.gpu_flops_available:
            metrics["step/mfu"] = flops / time_s / self.gpu_flops_available
        logger.log_metrics(metrics)


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


class ConsoleLine(LoggerDestination):
    """Print a line each ``interval``: step, loss, learning rate, speed, and the time that is left at that speed.

    Speed and gradient norm are StepMonitor's, the learning rate is LRMonitor's; without them, the line lacks them. Each
    evaluation is a line too. Rank 0 prints, to standard error.

    Args:
        interval: such as 100ba, 1ep or 60sec.
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
        if self.is_due(state, Event.BATCH_END):
            self._training_line(state)

    def epoch_end(self, state: State, logger: Logger) -> None:
        if self.is_due(state, Event.EPOCH_END):
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
            swap = self.path.with_name(f"{self.path.name}.partial")  # a kill may not take the kept lines with it
            swap.write_text("".join(f"{line}\n" for line in kept))
            swap.replace(self.path)
            self._file = self.path.open("a")

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
