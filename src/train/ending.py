"""How a run ends, and whether a run that is started again has ended before.

At the end of a run come, in this order: the last step, with the end of its epoch if it is the epoch's last; the last
evaluation; the last checkpoint. So a run is finished if and only if its last checkpoint is there.
"""

import math
from typing import Any

from composer.core import Callback, Event, State, Time, Timestamp, TimeUnit
from composer.loggers import Logger
from composer.utils import create_interval_scheduler

from src.common.errors import Finished
from src.train.callbacks import StopOnSignal, elapsed, interrupted, is_over, savers_of
from src.train.processes import EXIT_TIME_LIMIT
from src.train.yaml12 import is_same

TIME_LIMIT = "time_limit"


def is_end(state: State, event: Event) -> bool:
    """Whether the run is over, and an event at the end of a step or an epoch is the last of its kind."""
    if event in (Event.BATCH_END, Event.BATCH_CHECKPOINT) and state.timestamp.batch_in_epoch == state.dataloader_len:
        return False  # Composer's condition for the events of an epoch's end after the last step
    return is_over(state)


class SaveInterval:
    """When to save: every ``interval``, after a signal, and at the end of the run.

    Composer's savers ask it, and algorithms that change the weights for a checkpoint, such as EMA.
    """

    def __init__(self, interval: str, stop: StopOnSignal):
        self.is_due, self.stop = create_interval_scheduler(interval, include_end_of_training=False), stop

    def __call__(self, state: State, event: Event) -> bool:
        if is_over(state):
            return is_end(state, event)
        return self.is_due(state, event) or (event == Event.BATCH_CHECKPOINT and self.stop.agreed(state) > 0)


class EvalInterval:
    """When to evaluate: every ``interval``, and at the end of the run; once per step there. One for all sets.

    Not when the time limit ends a run that is saved: the run that goes on is then the same as without the limit.

    Args:
        interval: as Composer's; a share of the run in ``dur`` is rounded up to steps if max_duration is in epochs.
        end: of the run.
        steps_per_epoch: batches of the training data.
    """

    def __init__(self, interval: str | int, end: "RunEnd", steps_per_epoch: int):
        every = Time.from_input(interval, TimeUnit.EPOCH)
        if every.unit == TimeUnit.DURATION:  # Composer's is a share of state.max_duration, which a stop changes
            whole = Time.from_timestring(end.max_duration)
            if whole.unit == TimeUnit.EPOCH:
                whole = Time(whole.value * steps_per_epoch, TimeUnit.BATCH)
            every = Time(math.ceil(whole.value * every.value), whole.unit)
        self.is_due = create_interval_scheduler(every, include_end_of_training=False, checkpoint_events=False)
        self.last: tuple[int, Event] | None = None
        self.end = end

    def __call__(self, state: State, event: Event) -> bool:
        now, due = (state.timestamp.batch.value, event), self.is_due(state, event)
        if self.end.is_paused(state):
            return due and event != Event.FIT_END
        if is_over(state) and event != Event.FIT_END:  # after the last checkpoint
            again = self.last is not None and self.last[0] == now[0] and self.last != now
            due = is_end(state, event) and not again
        if due:
            self.last = now
        return due


class RunEnd(Callback):
    """Know which component stopped a run, and store it in the last checkpoint. Must come before the savers.

    ``state.get_elapsed_duration`` becomes the share of ``max_duration``, whatever stops the run: SWA, EMA and scheduled
    masking follow it.

    Args:
        run_name, max_duration: of the run.
    """

    def __init__(self, run_name: str, max_duration: str):
        self.run_name, self.max_duration = run_name, max_duration
        self.options: dict[str, dict[str, Any]] = {}
        """Of the components that can stop the run for good, by name."""
        self._stops = 0
        self._stopped: dict[str, Any] | None = None
        self._loaded: dict[str, Any] | None = None
        self._now = Timestamp()

    def init(self, state: State, logger: Logger) -> None:
        whole = Time.from_timestring(self.max_duration)
        state.get_elapsed_duration = lambda: Time(elapsed(state, whole), TimeUnit.DURATION)
        stop = state.stop_training

        def counted() -> None:
            self._stops += 1
            stop()

        state.stop_training = counted

    def watch(self, component: Callback, name: str, options: dict[str, Any] | None = None) -> Callback:
        """Note if ``component`` stops the run; ``options`` are None if that is not for good. Returns ``component``."""
        run_event = component.run_event

        def watched(event: Event, state: State, logger: Logger) -> None:
            before = self._stops
            run_event(event, state, logger)
            if self._stops > before:
                stopped = {"name": name, "options": options}
                # The first, but one that stops for good before the time limit.
                if self._stopped is None or (self._stopped["options"] is None and options is not None):
                    self._stopped = stopped

        component.run_event = watched
        if options is not None:
            self.options[name] = options
        return component

    def _stopped_at(self, timestamp: Timestamp) -> dict[str, Any] | None:
        """Which component stopped the run at ``timestamp``; None if that is the end of ``max_duration``."""
        if self._stopped is None or timestamp >= Time.from_timestring(self.max_duration):
            return None
        return self._stopped

    def is_paused(self, state: State) -> bool:
        """Whether the time limit stopped the run, and a checkpoint is or will be saved from which it goes on."""
        stopped = self._stopped_at(state.timestamp)
        return stopped is not None and stopped["name"] == TIME_LIMIT and bool(savers_of(state))

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        self._now = state.timestamp

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        self._now = state.timestamp
        if is_end(state, Event.EPOCH_CHECKPOINT):
            for saver in savers_of(state):
                saver.last_checkpoint_batch = None  # else a checkpoint before the epoch's end would be the last

    def state_dict(self) -> dict[str, Any]:
        return {"stopped": self._stopped_at(self._now)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = state["stopped"]

    def after_load(self, state: State, logger: Logger) -> None:
        self.check(state.timestamp, self._loaded)

    def check(self, timestamp: Timestamp, stopped: dict[str, Any] | None) -> None:
        """Raise Finished if a run ended at ``timestamp``, and would end there again.

        Args:
            timestamp: of the checkpoint.
            stopped: name and options of the component that stopped the run, as checkpoints hold it.
        """
        step = timestamp.batch.value
        if timestamp >= Time.from_timestring(self.max_duration):
            raise Finished(f"{self.run_name} is finished: {step} steps, max_duration={self.max_duration}")
        name = stopped and stopped["name"]
        if stopped and name in self.options and is_same(self.options[name], stopped["options"]):
            raise Finished(
                f"{self.run_name} is finished: stopped by {name} after step {step}. To go on, remove or change "
                f"callbacks.{name}"
            )

    def conclude(self, state: State) -> str | None:
        """Which component stopped the run that just ended, as a line for the user; None if none did.

        Raises:
            Interrupted: it was the time limit, so the run is not finished.
        """
        stopped = self._stopped_at(state.timestamp)
        if stopped is None:
            return None
        step = state.timestamp.batch.value
        line = f"stopped by {stopped['name']} after step {step} (max_duration={self.max_duration})"
        if stopped["name"] != TIME_LIMIT:
            return f"{self.run_name} is finished: {line}"
        raise interrupted(line, state, EXIT_TIME_LIMIT)
