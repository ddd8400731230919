"""Atomic writes of files and folders, and locks on folders.

A name appears by renaming what is already on the disk, so a reader, a kill or a full disk never leaves half a file.
"""

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

PARTIAL = ".partial"
"""Suffix of the name while a file or folder is written."""


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Path to write to; renamed to ``path`` if the block ends without an error. Makes the folder.

    After an error, ``path`` is as it was and the partial file is removed.
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
    """Write a text, or its parts, in UTF-8, atomically."""
    with atomic(path) as partial, partial.open("w", encoding="utf-8") as out:
        out.writelines([text] if isinstance(text, str) else text)


@contextlib.contextmanager
def locked(folder: Path, timeout: float = 0.0) -> Iterator[None]:
    """Hold ``folder``, which need not exist, against other processes, by the lock file ``.<name>.lock`` next to it.

    Raises ValueError if another live process still holds it after ``timeout`` seconds.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))  # never removed, or two processes could hold two files
    try:
        held = lock.acquire(timeout)
    except Timeout:
        raise ValueError(f"another process is writing {folder}; wait for it to end") from None
    with held:
        yield


def replace_folder(new: Path, folder: Path) -> None:
    """Rename the complete folder ``new`` to ``folder``, and remove an older one of that name.

    After an error the older one is back. After a kill between the two renames, ``settle_folder`` brings it back.

    Raises:
        ValueError: ``folder`` is a link.
    """
    check_no_link(folder)
    settle_folder(folder)
    try:
        if folder.exists():
            folder.rename(_replaced(folder))
        new.rename(folder)
        sync(folder.parent)
    finally:
        settle_folder(folder)


def check_no_link(folder: Path) -> None:
    """Raise a ValueError if ``folder`` is a link, so that ``replace_folder`` would leave what it leads to."""
    if folder.is_symlink():
        raise ValueError(f"{folder} is a link to {os.readlink(folder)}, so it is not replaced; remove it, or name that")


def settle_folder(folder: Path) -> None:
    """Finish an interrupted ``replace_folder``: the older folder gets its name back, or is removed."""
    replaced = _replaced(folder)
    if replaced.exists() and folder.exists():
        shutil.rmtree(replaced)
    elif replaced.exists():
        replaced.rename(folder)


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")
