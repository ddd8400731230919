"""Files that are whole or absent, and locks on folders."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path


def publish(partial: Path, out: Path) -> None:
    """Give the folder its name, in place of an older one, which stays if that fails."""
    replaced = out.with_name(f".{out.name}.replaced")
    if not out.exists():
        partial.rename(out)
        return
    shutil.rmtree(replaced, ignore_errors=True)
    out.rename(replaced)
    try:
        partial.rename(out)
    except OSError:
        replaced.rename(out)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk: a rename must not outlive what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: Iterable[str]) -> None:
    """Write a file that is there as a whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w") as out:
        out.writelines(text)
    sync(partial)
    partial.rename(path)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` (which need not exist) against other processes.

    Raises:
        ValueError: another live process holds it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    with path.open("w") as lock:  # free again when its process is killed; never removed, or two could hold it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing {folder}; wait for it to end") from None
        yield
