"""Checkpoints: data, not programs; and written whole, or not at all."""

import contextlib
import datetime
import os
from pathlib import Path

import numpy as np
import torch
from composer.callbacks import CheckpointSaver
from composer.core import State
from composer.loggers import Logger
from torch.torch_version import TorchVersion

from src.callbacks import TrainingError


def load_as_data() -> None:
    """Make every torch.load of this process refuse pickled code, Composer's own included.

    Composer loads checkpoints with ``weights_only=False``, and a file so loaded can run any command. Beside tensors and
    plain values, its checkpoints hold just the classes named here (random states, times, versions).
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    dtypes = {type(np.dtype(code)) for code in np.typecodes["All"]}
    torch.serialization.add_safe_globals(
        [
            datetime.timedelta,
            TorchVersion,
            np.ndarray,
            np.dtype,
            np._core.multiarray._reconstruct,  # pyright: ignore[reportAttributeAccessIssue]
            *dtypes,
        ]
    )


class Saver(CheckpointSaver):
    """Composer's; a checkpoint that cannot be written leaves no half of itself, and ends the run with the reason."""

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        try:
            super()._save_checkpoint(state, logger)
        except (OSError, RuntimeError) as error:  # torch's writer makes RuntimeErrors of what the system says
            path = Path(self.filename.format(state))
            with contextlib.suppress(OSError):
                path.unlink()
            reason = str(error.__context__ or error).splitlines()[0]
            raise TrainingError(
                f"{path}: the checkpoint of step {state.timestamp.batch.value} cannot be written ({reason}). "
                "Earlier ones are as they were; make room, or set save_num_checkpoints_to_keep, and start again"
            ) from error
