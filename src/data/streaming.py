"""What mosaicml-streaming 0.13 lacks."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import gettempdir


@contextlib.contextmanager
def alone_on_node() -> Iterator[None]:
    """Hold a lock of the node and the user while streaming's shared memory is made or removed.

    Streaming looks for the first number that is free and then takes it, so that of two runs that start in the same
    moment one would fail.
    """
    folder = Path("/dev/shm")
    with open((folder if folder.is_dir() else Path(gettempdir())) / f"streaming-{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
