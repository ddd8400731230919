"""Callbacks and loggers that Composer lacks."""

import math
import random
import signal
import sys
import time
from typing import Any

import numpy as np
import torch
from composer.callbacks import CheckpointSaver
from composer.core import Callback, State, get_precision_context
from composer.loggers import Logger
from composer.utils import dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from src.common.errors import Interrupted, TrainingError
from src.data.masking import mask_batch
from src.data.microbatches import Batch
from src.train.config import MaskingSchedule


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
