"""Callbacks that Composer lacks. None has a state in checkpoints."""

import math
import random
import signal
import sys
import time
from typing import Any

import numpy as np
import torch
from composer.callbacks import CheckpointSaver
from composer.core import Callback, Event, State, Time, TimeUnit, get_precision_context
from composer.loggers import Logger
from composer.utils import dist
from torch.distributed.fsdp import FSDPModule

from src.common.errors import Interrupted, TrainingError, first_line
from src.data.masking import mask_batch
from src.data.packing import Microbatch
from src.train.checkpoint import not_finite
from src.train.config import MaskingSchedule
from src.train.processes import EXIT_INTERRUPTED


def highest(state: State, value: int) -> int:
    """The highest ``value`` of all processes."""
    values = state.device.tensor_to_device(torch.tensor([value], dtype=torch.int32))
    dist.all_reduce(values, reduce_operation="MAX")
    return int(values.item())


def epoch_size(state: State) -> int:
    """Samples of an epoch, of all processes."""
    assert state.train_dataloader is not None, "the trainer has training data"
    dataset: Any = state.train_dataloader.dataset  # pyright: ignore[reportAttributeAccessIssue]
    # Of StreamingC4, the length is this rank's share.
    return dataset.epoch_size if hasattr(dataset, "epoch_size") else len(dataset)


def elapsed(state: State, max_duration: Time) -> float:
    """The share of ``max_duration`` that is done. Of epochs, Composer's own counts whole ones only."""
    done = state.timestamp.get(max_duration.unit).value
    if max_duration.unit == TimeUnit.EPOCH:
        done += state.timestamp.sample_in_epoch.value / epoch_size(state)
    return done / max_duration.value


def is_over(state: State) -> bool:
    """Whether no further step comes: ``max_duration`` is reached, or a component stopped the run."""
    assert isinstance(state.max_duration, Time), "the trainer has a max_duration"
    return state.timestamp >= state.max_duration or elapsed(state, state.max_duration) >= 1


def savers_of(state: State) -> list[CheckpointSaver]:
    """The callbacks that save checkpoints."""
    return [c for c in state.callbacks if isinstance(c, CheckpointSaver)]


def last_saved(state: State) -> str:
    """Which checkpoint is the last one, in words. Its weights are finite: ``StopOnSilentFailure`` sees to it."""
    saved = [name for saver in savers_of(state) for name in saver.all_saved_checkpoints_to_timestamp]
    return f"Last checkpoint before it: {saved[-1]}" if saved else "No checkpoint was saved before it"


def interrupted(what: str, state: State, unsaved: int) -> Interrupted:
    """The exception of a run that stops before its end, after ``what``; exit code ``unsaved`` if nothing is saved."""
    if any(saver.last_checkpoint_batch == state.timestamp.batch for saver in savers_of(state)):
        kept = "its checkpoint is saved, and the same command with autoresume: true resumes"
        return Interrupted(f"{what}; {kept}", EXIT_INTERRUPTED)
    return Interrupted(f"{what}; nothing is saved", unsaved)


class Reseed(Callback):
    """Seed all random generators at the start of each step, from the run's seed, the step and the rank.

    A resumed run then draws the same dropout masks. Composer restores random states only between epochs.
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
    """After SIGTERM or SIGINT to any process, finish the step, save a checkpoint and end all processes.

    ``SaveInterval`` makes the savers save it, as any other. A signal in the last step changes nothing: the run ends
    anyway. A second signal, and a signal before the first step or after the last one, ends the process at once.

    Raises:
        Interrupted: from fit, in all processes, after the same step.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)
    ECHO = 3.0
    """Seconds in which a second signal is ignored: a launcher forwards a signal that its processes already got."""

    def __init__(self) -> None:
        self.received: float | None = None
        """Time of the first signal, in seconds of time.monotonic()."""
        self.number = 0
        self._agreed = (-1, 0)
        self._before: dict[signal.Signals, Any] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}

    def _note(self, number: int, frame: Any) -> None:
        if self.received is None:
            self.received, self.number = time.monotonic(), number
            name = signal.Signals(number).name
            print(f"{name}: ending after this step; a second signal ends at once", file=sys.stderr, flush=True)
        elif time.monotonic() - self.received > self.ECHO:
            sys.exit(128 + number)

    def agreed(self, state: State) -> int:
        """The signal that any process got, or 0: the same in all processes, which are asked once per step."""
        step = state.timestamp.batch.value
        if self._agreed[0] != step:
            self._agreed = step, highest(state, self.number)
        return self._agreed[1]

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        got = self.agreed(state)
        if not got or is_over(state):
            return
        for number in self.SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # once one process has ended, a launcher signals the others
        for saver in savers_of(state):
            saver.batch_checkpoint(state, logger)  # Composer's own comes after this callback
            saver.fit_end(state, logger)  # waits for uploads to an object store
        raise interrupted(f"stopped by a signal after step {state.timestamp.batch.value}", state, 128 + got)

    def fit_end(self, state: State, logger: Logger) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class StopOnSilentFailure(Callback):
    """Raise TrainingError if the loss or, before a save, a weight is NaN or infinite, or if an epoch lacks samples.

    Checks the loss after the step, when Composer has copied it to the CPU, and before anything is saved. Must come
    before the savers.
    """

    ADVICE = "Try a lower learning rate, a longer warmup or algorithms.gradient_clipping"

    def __init__(self) -> None:
        self.bad: torch.Tensor | None = None
        self.lr = 0.0

    def after_loss(self, state: State, logger: Logger) -> None:
        assert isinstance(state.loss, torch.Tensor)
        bad = ~state.loss.detach().isfinite()
        self.bad = bad if self.bad is None else self.bad | bad  # stays on the device, so the CPU does not wait
        self.lr = state.optimizers[0].param_groups[0]["lr"]

    def batch_end(self, state: State, logger: Logger) -> None:
        loss, bad, self.bad = state.total_loss_dict.get("loss/train/total", 0.0), self.bad, None
        if math.isfinite(loss):
            return
        gathered = dist.all_gather_object(bad is not None and bool(bad.item()))
        ranks = ", ".join(str(rank) for rank, found in enumerate(gathered) if found)
        ranks = ranks or "none (the sum over ranks overflowed)"
        raise TrainingError(
            f"the loss is {loss} at step {state.timestamp.batch.value} on ranks {ranks}, learning rate {self.lr:g}. "
            f"{last_saved(state)}. {self.ADVICE}"
        )

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        self._check_weights(state, Event.BATCH_CHECKPOINT)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        self._check_weights(state, Event.EPOCH_CHECKPOINT)

    def _check_weights(self, state: State, event: Event) -> None:
        """What a saver is about to write: weights, with EMA the averaged and the trained ones, and Adam's moments."""
        if not any(saver.save_interval(state, event) for saver in savers_of(state)):
            return
        held = {
            "model": dict(state.model.named_parameters()),
            "algorithms": [algorithm.state_dict() for algorithm in state.algorithms],
            "optimizers": [list(optimizer.state.values()) for optimizer in state.optimizers],
        }
        reason = next(filter(None, dist.all_gather_object(not_finite(held))), None)
        if reason is not None:
            raise TrainingError(
                f"after step {state.timestamp.batch.value}, {reason}, so nothing is saved. "
                f"{last_saved(state)}. {self.ADVICE}"
            )

    def epoch_end(self, state: State, logger: Logger) -> None:
        assert state.previous_timestamp is not None, "set with every batch"
        done, want = state.previous_timestamp.sample_in_epoch.value, epoch_size(state)
        if done < want:
            raise TrainingError(f"epoch {state.timestamp.epoch.value} ended after {done} of {want} samples")


class MemoryProbe(Callback):
    """Run forward and backward on the largest possible microbatch before the first step, and discard the result.

    A run with too little memory then fails at once, not at its first batch of long sequences. Keeps random states.

    Args:
        microbatch: the largest possible one, with its layout.
        setting: path of the setting that limits it.
        accumulates: it is not the only one of its step, so gradients of another lie in memory beside it.

    Raises:
        TrainingError: there is too little memory.
    """

    def __init__(self, microbatch: Microbatch, setting: str, accumulates: bool):
        self.microbatch, self.setting, self.accumulates = microbatch, setting, accumulates

    def fit_start(self, state: State, logger: Logger) -> None:
        parameters = [p for p in state.model.parameters() if p.requires_grad]
        device = parameters[0].device
        batch = self.microbatch.to(device)
        state.model.train()
        try:
            # Adam allocates its two moments in the first step, Muon one and a batch of its updates.
            new = [p for p in parameters if p not in state.optimizers[0].state]
            moments = [torch.empty_like(p) for p in new * 2]
            for p in parameters if self.accumulates else ():
                p.grad = torch.zeros_like(p)
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                with get_precision_context(state.precision, state.precision_config):
                    loss = state.model(batch).loss
                loss.backward()
            del moments
        except RuntimeError as error:
            # OutOfMemoryError is for GPUs only; a CPU raises a RuntimeError.
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            size, tokens = self.microbatch["num_samples"], self.microbatch["num_tokens"]
            raise TrainingError(
                f"too little memory for a microbatch of {size} sequences, {tokens} tokens ({first_line(error)}). Lower "
                f"{self.setting} (the loss stays the same; auto finds what fits, main.py --validate counts it), or set "
                "model.gradient_checkpointing: true"
            ) from None
        finally:
            for p in parameters:
                p.grad = None


class AverageGradients(Callback):
    """Divide FSDP's gradients by the number of processes if the backend sums them, as gloo of torch 2.7 does."""

    def fit_start(self, state: State, logger: Logger) -> None:
        world_size = dist.get_world_size()
        ones = state.device.tensor_to_device(torch.ones(world_size))
        average = torch.empty_like(ones[:1])
        torch.distributed.reduce_scatter_tensor(average, ones, op=torch.distributed.ReduceOp.AVG)

        def divide(gradient: torch.Tensor) -> None:
            gradient.div_(world_size)

        for module in state.model.modules():
            if isinstance(module, FSDPModule) and average.item() != 1:
                module.set_all_reduce_hook(divide)


class ScheduledMasking(Callback):
    """Mask each training batch at the scheduled rate, in the main process, before it is split.

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


class CastWeightsOnce(Callback):
    """Keep autocast's copies of the weights, in 16 bits, for all microbatches of a step: one cast of a weight per step.

    Autocast drops its copies where the outermost of its contexts ends, in Composer after each microbatch's forward. So
    this counts as one more context around all microbatches, which ends before the optimizer changes the weights.
    Gradients stay the same, to the bit. Within a step, nothing may change a weight, or run the model without gradients
    (torch 2.7 would train with its copies, which have none); no algorithm or callback does.

    Not for FSDP, because a copy would hold the whole of a weight that FSDP frees; and not for gradient checkpointing,
    whose recomputation drops the copies: on a GPU its contexts are the outermost of the backward's thread.
    """

    def __init__(self) -> None:
        self._open = False

    def before_train_batch(self, state: State, logger: Logger) -> None:
        self._end()  # still open if auto starts a step again
        torch.autocast_increment_nesting()
        self._open = True

    def after_train_batch(self, state: State, logger: Logger) -> None:
        self._end()

    def close(self, state: State, logger: Logger) -> None:
        self._end()  # after an exception within the step

    def _end(self) -> None:
        if self._open:
            torch.autocast_decrement_nesting()
        self._open = False
        torch.clear_autocast_cache()  # also if another context is open, such as that of a run that failed


class TrainMetrics(Callback):
    """Compute the metrics of a step from the outputs of its microbatches; Composer logs them as metrics/train/<name>.

    Composer itself switches the whole model to evaluation and back for each microbatch, and each metric gathers each of
    its sums from all processes. Here Composer sees no metric between the start and the end of a step, the outputs stay
    on the device, and one all-reduce sums them. The values are the same.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {}
        self.outputs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        """Of each microbatch, (): loss_sum, correct, count."""

    def fit_start(self, state: State, logger: Logger) -> None:
        metrics: Any = state.train_metrics
        self.metrics = {name: state.device.module_to_device(metric) for name, metric in metrics.items()}

    def before_train_batch(self, state: State, logger: Logger) -> None:
        state.train_metrics, self.outputs = {}, []  # auto may start a step again

    def after_backward(self, state: State, logger: Logger) -> None:
        out: Any = state.outputs
        self.outputs.append((out.loss_sum.detach(), out.correct, out.count))

    def after_train_batch(self, state: State, logger: Logger) -> None:
        loss_sums, corrects, counts = (torch.stack(column) for column in zip(*self.outputs, strict=True))
        sums = torch.stack([loss_sums.double().sum(), corrects.sum(), counts.sum()])  # fp64: exact counts below 2^53
        dist.all_reduce(sums, reduce_operation="SUM")
        for metric in self.metrics.values():
            metric.reset()
            metric.update(sums[0], sums[1].long(), sums[2].long())
        state.train_metrics, self.outputs = self.metrics, []


class StopAtTimeLimit(Callback):
    """Stop all processes at the same step after a time limit; the run is then saved, or evaluated if it is not saved.

    Does not shorten the learning rate schedule, so a later start continues it.

    Args:
        seconds: since the start of fit.
    """

    def __init__(self, seconds: float):
        self.seconds, self.started = seconds, 0.0

    def fit_start(self, state: State, logger: Logger) -> None:
        self.started = time.monotonic()

    def batch_end(self, state: State, logger: Logger) -> None:
        if highest(state, int(time.monotonic() - self.started >= self.seconds)):
            state.stop_training()
