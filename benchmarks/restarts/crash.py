"""main.py in a process that kills itself at a named point; benchmarks/restarts/faults.py launches it.

    CRASH="after rename" composer -n 2 -m benchmarks.restarts.crash yamls/quickstart.yaml ...

Without CRASH it is main.py. SIGKILL comes when the process reaches the point for the ``TIMES``-th time.
"""

import io
import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import main
from src.mosaic_bert import MosaicBert
from src.train import checkpoint

TIMES = 2


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def is_checkpoint(held: Any, *args: Any) -> bool:
    """Composer also calls torch.save to send random states to other processes."""
    return isinstance(held, dict) and "state" in held


def is_not_latest(old: Path, *args: Any) -> bool:
    return "latest" not in old.name


def in_last_process(*args: Any) -> bool:
    """The others wait for it."""
    return int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1


class Point(NamedTuple):
    """A method or function at whose call the process dies."""

    owner: Any
    name: str
    when: str
    """``before`` or ``after`` the call, or ``in`` it."""
    counts: Callable[..., bool] = lambda *args: True
    """Whether a call with these arguments counts."""


POINTS = {
    "before write": Point(checkpoint, "write", "before"),
    "in write": Point(torch, "save", "in", is_checkpoint),
    "after write": Point(torch, "save", "after", is_checkpoint),  # before it is flushed
    "before rename": Point(Path, "replace", "before", is_not_latest),
    "after rename": Point(Path, "replace", "after", is_not_latest),
    "before latest": Point(checkpoint.RunFolder, "point_latest", "before"),
    "after latest": Point(checkpoint.RunFolder, "point_latest", "after"),
    # In training, outputs are given.
    "in evaluation": Point(MosaicBert, "eval_forward", "before", lambda model, batch, outputs=None: outputs is None),
    "in backward": Point(torch.Tensor, "backward", "in"),
    "in all-reduce": Point(torch.distributed, "all_reduce", "before", in_last_process),
}


def half_of(save: Callable[..., Any], held: Any, file: Any, **options: Any) -> None:
    """Put half of a checkpoint on the disk."""
    content = io.BytesIO()
    save(held, content, **options)
    file.write(content.getbuffer()[: content.tell() // 2])
    file.flush()
    os.fsync(file.fileno())


def install(point: Point) -> None:
    """Let the process die at the point."""
    whole, calls = getattr(point.owner, point.name), itertools.count(1)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        now = point.counts(*args) and next(calls) == TIMES
        if now and point.when == "in":
            if point.owner is torch.Tensor:
                args[0].register_hook(lambda gradient: die())  # when the gradient of the loss is computed
            else:
                half_of(whole, *args, **kwargs)
                die()
        elif now and point.when == "before":
            die()
        result = whole(*args, **kwargs)
        if now:
            die()
        return result

    setattr(point.owner, point.name, wrapped)


if __name__ == "__main__":
    if "CRASH" in os.environ:
        install(POINTS[os.environ["CRASH"]])
    main.run(sys.argv[1:])
