"""main.py in a process that kills itself at a named point: what benchmarks/faults.py launches.

    CRASH="after rename" composer -n 2 -m benchmarks.restarts.crash yamls/quickstart.yaml ...

Without CRASH it is main.py. The process dies of SIGKILL, the ``TIMES``-th time that it comes to the point.
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


class Counter:
    """Dies at the ``TIMES``-th call."""

    def __init__(self) -> None:
        self.calls = 0

    def due(self) -> bool:
        self.calls += 1
        return self.calls == TIMES

    def __call__(self) -> None:
        if self.due():
            die()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def around(target: Any, name: str, before: Callable[..., Any] | None, after: Callable[..., Any] | None) -> None:
    """Put calls before and after a method or function of ``target``."""
    whole = getattr(target, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args)
        result = whole(*args, **kwargs)
        if after is not None:
            after(*args)
        return result

    setattr(target, name, wrapped)


def is_checkpoint(held: Any) -> bool:
    """Composer also saves random states, on their way to other processes."""
    return isinstance(held, dict) and "state" in held


def in_write(count: Counter) -> None:
    """When the first half of a checkpoint has reached the disk."""
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
    around(torch, "save", None, lambda held, *_: count() if is_checkpoint(held) else None)


def before_rename(count: Counter) -> None:
    around(Path, "replace", lambda old, new: None if "latest" in old.name else count(), None)


def after_rename(count: Counter) -> None:
    around(Path, "replace", None, lambda old, new: None if "latest" in old.name else count())


def in_evaluation(count: Counter) -> None:
    """Training calls it with the outputs that it has."""
    around(MosaicBert, "eval_forward", lambda model, batch, outputs=None: count() if outputs is None else None, None)


def in_backward(count: Counter) -> None:
    """Where the gradient of a loss begins its way."""
    around(torch.Tensor, "backward", lambda loss, *_: loss.register_hook(lambda gradient: count()), None)


def in_all_reduce(count: Counter) -> None:
    """The last process does not come: the others wait within."""
    if int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
        around(torch.distributed, "all_reduce", lambda *_: count(), None)


POINTS: dict[str, Callable[[Counter], None]] = {
    "before write": lambda count: around(checkpoint, "write", lambda *_: count(), None),
    "in write": in_write,
    "after write": after_write,
    "before rename": before_rename,
    "after rename": after_rename,
    "before latest": lambda count: around(checkpoint.RunFolder, "point_latest", lambda *_: count(), None),
    "after latest": lambda count: around(checkpoint.RunFolder, "point_latest", None, lambda *_: count()),
    "in evaluation": in_evaluation,
    "in backward": in_backward,
    "in all-reduce": in_all_reduce,
}
"""What makes a process die at a point, by name."""


if __name__ == "__main__":
    if "CRASH" in os.environ:
        POINTS[os.environ["CRASH"]](Counter())
    main.run(sys.argv[1:])
