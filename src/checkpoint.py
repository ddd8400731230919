"""Checkpoints are data, not programs."""

import datetime
import os

import numpy as np
import torch
from torch.torch_version import TorchVersion


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
