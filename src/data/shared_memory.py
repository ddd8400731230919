"""Shared memory of mosaicml-streaming: a record of its owner, and removal of what killed runs left."""

import atexit
import contextlib
import fcntl
import json
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

log = logging.getLogger(__name__)

# Each dataset of a node has a number, its prefix, in the names of its segments and lock files. A killed run leaves
# them, and then streaming refuses its cache ("Reused local directory"). Streaming does not record the owner. We do, in
# a file that stays locked (flock) while the process or one of its workers lives. If a record can be locked, its run is
# dead. Segments without a record belong to other programs, and stay.

SHARED = Path("/dev/shm")

_owned: list[tuple[int, str, IO[str]]] = []
"""Of this process's datasets: prefix, folder of the lock files, open record."""


def own_shared_memory(prefix: int, lock_folder: str) -> None:
    """Record that this process, the first of its node, owns a dataset's segments, and lock files in ``lock_folder``."""
    if not SHARED.is_dir():
        return
    made, path = SHARED / f".{prefix:06}_owner-{os.getpid()}", _segment(prefix, "owner")
    made.unlink(missing_ok=True)
    record = made.open("x")  # everybody may write to the folder: never through what is there
    fcntl.flock(record, fcntl.LOCK_EX)
    inode = _segment(prefix, "locals").stat().st_ino
    json.dump({"locks": lock_folder, "locals": inode, "pid": os.getpid()}, record)
    record.flush()
    try:
        made.rename(path)  # nobody sees it unlocked or empty
    except OSError as error:  # another user's, or a folder
        made.unlink()
        reason = "%s cannot be replaced (%s), so the shared memory of this run stays if it is killed"
        log.warning(reason, path, error.strerror)
    _owned.append((prefix, lock_folder, record))


def remove_stale_shared_memory() -> list[int]:
    """Remove the segments and lock files of this user's dead runs on this node. Returns their prefixes."""
    stale = []
    for path in sorted(SHARED.glob("[0-9]" * 6 + "_owner")):
        prefix = int(path.name[:6])
        with contextlib.suppress(OSError), open(path, opener=_open_own) as record:  # OSError: a live run's, or no file
            fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
            owned = _read(record)
            if owned is None:
                log.warning("%s is no record of a run's shared memory; delete it", path)
                continue
            lock_folder, inode = owned
            first = _segment(prefix, "locals")
            segments = {*SHARED.glob(f"{prefix:06}_*")} - {path, first}
            if first.exists() and first.stat().st_ino != inode:  # of a new run without a record yet
                continue
            # A new run takes a prefix without segments and lock files. What it looks at first is removed last; what it
            # makes meanwhile is not in the list.
            for leftover in [*segments, path, first, *_locks(prefix, lock_folder)]:
                with contextlib.suppress(OSError):  # gone, another user's, or a folder
                    leftover.unlink()
            stale.append(prefix)
    return stale


def user_of(folder: str, unpack: Callable[[bytes], tuple[list[str], int]]) -> str | None:
    """The dataset of this node that uses ``folder``, an absolute path, in words; None if there is none.

    ``unpack`` gives the folders that a segment ``locals`` names.
    """
    for path in SHARED.glob("[0-9]" * 6 + "_locals"):
        prefix = int(path.name[:6])
        with contextlib.suppress(OSError, ValueError):
            if folder in unpack(path.read_bytes())[0]:
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                    return f"process {json.loads(_segment(prefix, 'owner').read_text())['pid']}"
                return f"if none runs, a killed one left its shared memory: delete {SHARED}/{prefix:06}_*"
    return None


def foreign_prefixes(unpack: Callable[[bytes], Any]) -> set[int]:
    """Prefixes that have a file, but are not a dataset's of this user.

    ``unpack`` raises ValueError for bytes that are not those of a segment ``locals``.
    """
    found: dict[int, list[Path]] = {}
    for path in SHARED.glob("[0-9]" * 6 + "_*"):
        found.setdefault(int(path.name[:6]), []).append(path)
    foreign = set[int]()
    for prefix, paths in found.items():
        try:
            for state in (path.lstat() for path in paths):
                if not stat.S_ISREG(state.st_mode) or state.st_uid != os.getuid() or not state.st_size:
                    raise ValueError
            unpack(_segment(prefix, "locals").read_bytes())
        except (OSError, ValueError):
            foreign.add(prefix)
    return foreign


def _open_own(path: str, flags: int) -> int:
    """Open a regular file of this user; raises OSError for anything else, as everybody may write to the folder."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would wait for a writer
    found = os.fstat(descriptor)
    if found.st_uid != os.getuid() or not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise PermissionError(path)
    return descriptor


def _read(record: IO[str]) -> tuple[str, int] | None:
    """Folder of the lock files, and inode of the first segment; None if the record is broken."""
    try:
        owned: Any = json.load(record)
        found = owned["locks"], owned["locals"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    sound = [type(each) for each in found] == [str, int] and "\0" not in found[0]
    return found if sound else None


def _segment(prefix: int, name: str) -> Path:
    """A file in shared memory. Streaming makes ``locals`` first; ``owner`` is our record."""
    return SHARED / f"{prefix:06}_{name}"


def _locks(prefix: int, folder: str) -> list[Path]:
    """The lock files. Streaming never removes them, and never takes a prefix that has one."""
    return [Path(folder) / f"{prefix:06}_{name}_filelock" for name in ("barrier", "cache")]


@atexit.register  # at import, so it runs after streaming has removed the segments
def _disown() -> None:
    for prefix, lock_folder, record in _owned:
        with contextlib.suppress(OSError):
            if os.fstat(record.fileno()).st_ino == _segment(prefix, "owner").stat().st_ino:
                for leftover in [_segment(prefix, "owner"), *_locks(prefix, lock_folder)]:
                    leftover.unlink(missing_ok=True)
