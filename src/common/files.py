"""Files and folders that are complete or absent, and folders that one process holds.

Every name appears by a rename of what is already on the disk, so no reader, kill or full disk ever meets half of it.
"""

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

PARTIAL = ".partial"
"""End of the name of what is being written."""


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path to write to in place of ``path``, which it becomes if the block ends without an error.

    Its folder is made. After an error, ``path`` is as it was and the partial file is gone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}{PARTIAL}")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    sync(path.parent)


def write_text(path: Path, text: str | Iterable[str]) -> None:
    """Write a text, or its parts, in UTF-8; the file is complete or as it was."""
    with atomic(path) as partial, partial.open("w", encoding="utf-8") as out:
        out.writelines([text] if isinstance(text, str) else text)


@contextlib.contextmanager
def locked(folder: Path, timeout: float = 0.0) -> Iterator[None]:
    """Hold ``folder``, which need not exist, against other processes; the lock file ``.<name>.lock`` lies beside it.

    Args:
        folder: to hold.
        timeout: seconds to wait for a process that holds it.

    Raises:
        ValueError: another live process holds it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Kept when it is released: two processes could else hold two files of one name.
    lock = FileLock(folder.with_name(f".{folder.name}.lock"), timeout=timeout)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"another process is writing {folder}; wait for it to end") from None
    try:
        yield
    finally:
        lock.release()


def replace_folder(new: Path, folder: Path) -> None:
    """Give the complete folder ``new`` the name ``folder``, in place of an older one.

    Killed between its two renames, it is finished by ``settle_folder``. After an error the older one is there again.
    """
    replaced = _replaced(folder)
    settle_folder(folder)
    try:
        if folder.exists():
            folder.rename(replaced)
        new.rename(folder)
        sync(folder.parent)
    finally:
        settle_folder(folder)


def settle_folder(folder: Path) -> None:
    """End a replacement that stopped between its two renames: the older folder gets its name back, or is removed."""
    replaced = _replaced(folder)
    if replaced.exists() and folder.exists():
        shutil.rmtree(replaced)
    elif replaced.exists():
        replaced.rename(folder)


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")
