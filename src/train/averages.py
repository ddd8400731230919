"""Composer's averages of weights, EMA and SWA, with what they lack in this recipe's runs."""

from composer import algorithms
from composer.core import Algorithm, Event, State, Time, TimeUnit

from src.common.errors import ConfigError
from src.train.callbacks import elapsed


def ema(
    half_life: str | None = "1000ba",
    smoothing: float | None = None,
    ema_start: str = "0.0dur",
    update_interval: str | None = None,
) -> Algorithm:
    """Composer's EMA, updated every so many steps. At an epoch's end it would average the averaged weights, which a
    checkpoint of the last step has put into the model."""
    built = algorithms.EMA(half_life, smoothing, ema_start, update_interval)
    if built.update_interval.unit != TimeUnit.BATCH:
        raise ValueError(f"half_life and update_interval: expected ba, got {half_life} and {update_interval}")
    return built


class SWA(algorithms.SWA):
    """Composer's SWA, without its own learning rate: its state_dict fails with the SWALR of this version of torch.

    An epoch ends with its last step, as with ``max_duration`` in other units; Composer's own would never end in a run's
    last epoch.

    Raises:
        ConfigError: from the Trainer: the weights of the checkpoint are averages already, but SWA should go on.
    """

    def __init__(
        self,
        swa_start: str = "0.7dur",
        swa_end: str = "0.97dur",
        update_interval: str = "1ba",
        schedule_swa_lr: bool = False,
    ):
        if schedule_swa_lr:
            raise ValueError("schedule_swa_lr: Composer's cannot be saved with this version of torch; remove it")
        super().__init__(swa_start, swa_end, update_interval)

    def _get_time(self, state: State) -> Time:
        if self.swa_start.unit != TimeUnit.EPOCH:
            return super()._get_time(state)
        return Time(int(elapsed(state, Time(1, TimeUnit.EPOCH))), TimeUnit.EPOCH)

    def match(self, event: Event, state: State) -> bool:
        if event == Event.AFTER_LOAD and self.swa_completed and self._get_time(state) < self.swa_end:
            raise ConfigError(
                "algorithms.swa: the checkpoint's weights are averages already, so the longer run cannot average its "
                "own. Resume from a checkpoint before swa_end, or start a new run with pretrained"
            )
        return super().match(event, state)
