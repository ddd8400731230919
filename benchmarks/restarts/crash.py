"""main.py in a process that kills itself at a named point; benchmarks/restarts/faults.py launches it.

    CRASH="after rename" composer -n 2 -m benchmarks.restarts.crash yamls/quickstart.yaml ...

Without CRASH it is main.py. SIGKILL comes when the process reaches the point for the ``TIMES``-th time.
"""

import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import main
from src.mosaic_bert import MosaicBert
from src.train import checkpoint

TIMES = 2


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Counter:
    """Kills the process at the ``TIMES``-th call."""

    def __init__(self) -> None:
        self.calls = 0

    def due(self) -> bool:
        self.calls += 1
        return self.calls == TIMES

    def __call__(self) -> None:
        if self.due():
            die()


def nothing(*args: Any) -> None:
    pass


def around(target: Any, name: str, before: Callable[..., Any] = nothing, after: Callable[..., Any] = nothing) -> None:
    """Call ``before`` and ``after`` around a method or function of ``target``, with its arguments."""
    whole = getattr(target, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before(*args)
        result = whole(*args, **kwargs)
        after(*args)
        return result

    setattr(target, name, wrapped)


def is_checkpoint(held: Any) -> bool:
    """Composer also calls torch.save to send random states to other processes."""
    return isinstance(held, dict) and "state" in held


def in_write(count: Counter) -> None:
    """When half of a checkpoint is on the disk."""
    whole = torch.save

    def save(held: Any, file: Any, **options: Any) -> None:
        if is_checkpoint(held) and count.due():
            content = io.BytesIO()
            whole(held, content, **options)
            file.write(content.getbuffer()[: content.tell() // 2])
            file.flush()
            os.fsync(file.fileno())
            die()
        whole(held, file, **options)

    torch.save = save


def after_write(count: Counter) -> None:
    """Before it is flushed."""
    around(torch, "save", after=lambda held, *_: count() if is_checkpoint(held) else None)


def at_rename(old: Path, count: Counter) -> None:
    if "latest" not in old.name:
        count()


def in_evaluation(count: Counter) -> None:
    """Only in an evaluation: in training, ``outputs`` are given."""
    around(MosaicBert, "eval_forward", lambda model, batch, outputs=None: count() if outputs is None else None)


def in_backward(count: Counter) -> None:
    """When the gradient of the loss is computed."""
    around(torch.Tensor, "backward", lambda loss, *_: loss.register_hook(lambda gradient: count()))


def in_all_reduce(count: Counter) -> None:
    """Only the last process, while the others wait for it."""
    if int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
        around(torch.distributed, "all_reduce", lambda *_: count())


POINTS: dict[str, Callable[[Counter], None]] = {
    "before write": lambda count: around(checkpoint, "write", lambda *_: count()),
    "in write": in_write,
    "after write": after_write,
    "before rename": lambda count: around(Path, "replace", lambda old, new: at_rename(old, count)),
    "after rename": lambda count: around(Path, "replace", after=lambda old, new: at_rename(old, count)),
    "before latest": lambda count: around(checkpoint.RunFolder, "point_latest", lambda *_: count()),
    "after latest": lambda count: around(checkpoint.RunFolder, "point_latest", after=lambda *_: count()),
    "in evaluation": in_evaluation,
    "in backward": in_backward,
    "in all-reduce": in_all_reduce,
}
"""By name, what installs a kill at that point."""


if __name__ == "__main__":
    if "CRASH" in os.environ:
        POINTS[os.environ["CRASH"]](Counter())
    main.run(sys.argv[1:])
