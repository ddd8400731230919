"""Shared memory of mosaicml-streaming: who owns it, and removal of what dead runs left."""

import atexit
import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import IO

# Each dataset of a node has a number, its prefix, in the names of its segments and of its lock files. Killed runs leave
# them, and a dataset with a remote then finds its folder in use for ever. Who owns them is not recorded; so we record
# it: a file, locked for as long as the process, or a worker that it forked, lives. A record that can be locked is of a
# dead run. What has no record belongs to others, and stays.

SHARED = Path("/dev/shm")

_records: dict[int, tuple[IO[str], str]] = {}
"""By prefix: the record, open, and where the lock files are."""


def own_shared_memory(prefix: int, lock_folder: str) -> None:
    """Record that this process owns the segments of a dataset; for the node's first process, which makes them.

    Args:
        prefix: of the dataset, ``_shm_prefix_int``.
        lock_folder: where streaming put its lock files, ``_filelock_root``.
    """
    if not SHARED.is_dir():
        return
    made = SHARED / f".{prefix:06}_owner-{os.getpid()}"
    record = made.open("w")
    fcntl.flock(record, fcntl.LOCK_EX)
    json.dump({"locks": lock_folder, "locals": _locals(prefix).stat().st_ino}, record)
    record.flush()
    made.rename(_record(prefix))  # never there and unlocked, or there and empty
    _records[prefix] = record, lock_folder


def remove_stale_shared_memory() -> list[int]:
    """Remove what dead runs left on this node; the prefixes that it had."""
    stale = []
    for path in sorted(SHARED.glob("[0-9]" * 6 + "_owner")):
        prefix = int(path.name[:6])
        with contextlib.suppress(OSError), path.open() as record:  # OSError: another user's, or of a live run
            fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
            owned = json.load(record)
            segments = {*SHARED.glob(f"{prefix:06}_*")} - {path, _locals(prefix)}
            with contextlib.suppress(FileNotFoundError):
                if _locals(prefix).stat().st_ino != owned["locals"]:  # a new run's, which has yet to record it
                    continue
            # A run takes a prefix when neither segments nor lock files of it are there: so those that it looks at first
            # go last, and whatever comes into being meanwhile is not in the list.
            for leftover in [*segments, path, _locals(prefix), *_locks(prefix, owned["locks"])]:
                leftover.unlink(missing_ok=True)
            stale.append(prefix)
    return stale


def _locals(prefix: int) -> Path:
    """The segment that a run makes first."""
    return SHARED / f"{prefix:06}_locals"


def _locks(prefix: int, folder: str) -> list[Path]:
    """The lock files, which streaming never removes: a number that was used would be passed over for ever."""
    return [Path(folder) / f"{prefix:06}_{name}_filelock" for name in ("barrier", "cache")]


def _record(prefix: int) -> Path:
    return SHARED / f"{prefix:06}_owner"


@atexit.register
def _disown() -> None:
    for prefix, (record, lock_folder) in _records.items():
        with contextlib.suppress(OSError):
            if os.fstat(record.fileno()).st_ino == _record(prefix).stat().st_ino:
                for leftover in [_record(prefix), *_locks(prefix, lock_folder)]:
                    leftover.unlink(missing_ok=True)
