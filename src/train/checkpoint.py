"""Checkpoints: data, not programs; written whole, or not at all; found sound, or passed over for the one before."""

import contextlib
import datetime
import fcntl
import logging
import os
import re
import socket
import time
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from composer.callbacks import CheckpointSaver
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist, reproducibility
from torch.torch_version import TorchVersion

from src.common.errors import ConfigError, TrainingError

log = logging.getLogger(__name__)

NAME, LATEST = "ep{epoch}-ba{batch}-rank{rank}.pt", "latest-rank{rank}.pt"
PATTERN = re.compile(r"ep\d+-ba(\d+)-rank0\.pt")
PARTIAL, DAMAGED = ".partial", ".damaged"
"""Ends of the names of a checkpoint while it is written, and of one that cannot be read any more."""


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


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint's file, or None. Reads all of it: torch.save states a CRC-32 of each record."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (OSError, zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:
        return str(error)  # the last two: bytes changed where the archive says how it is packed
    return None if bad is None else f"{bad} in it has other bytes than were written"


class RunFolder:
    """A ``save_folder`` on this machine or a file system that it mounts, for one live run; used by rank 0 alone.

    Args:
        path: of the folder, which is made.
        patience: seconds to wait for a run that is just ending, or being killed.

    Raises:
        ConfigError: another run lives in it.
    """

    def __init__(self, path: str, patience: float = 10.0):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock: IO[str] = (self.path / ".lock").open("a+")
        give_up = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    self._lock.seek(0)
                    raise ConfigError(
                        f"{self.path}: another run lives in this folder ({self._lock.read().strip()}). "
                        "Wait until it ends, or give this one another run_name or save_folder"
                    ) from None
                time.sleep(0.1)
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()
        for partial in self.path.glob(f"*{PARTIAL}"):  # of a run that was killed while it wrote
            partial.unlink()

    def close(self) -> None:
        """Let other runs in."""
        if not self._lock.closed:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # for workers too, which a fork gave the file
            self._lock.close()

    def saved(self, until: float = float("inf")) -> list[Path]:
        """Checkpoints of steps up to ``until``, by name, the oldest first."""
        steps = {path: int(match[1]) for path in self.path.iterdir() if (match := PATTERN.fullmatch(path.name))}
        return sorted((path for path in steps if steps[path] <= until), key=lambda path: (steps[path], path.name))

    def newest(self) -> str | None:
        """The checkpoint to go on from: that of ``latest``, or the newest sound one before it.

        What is damaged gets another name, and a warning. Later ones than ``latest`` are not looked at: they are an
        earlier run's, or of a run that was killed before it said that they were complete.

        Raises:
            ConfigError: there are checkpoints, and none of them is sound.
        """
        latest = self.path / LATEST.format(rank=0)
        if latest.exists() and not latest.is_symlink():  # copied here by somebody
            candidates = [latest]
        else:
            match = PATTERN.fullmatch(Path(os.readlink(latest)).name) if latest.is_symlink() else None
            candidates = self.saved(until=int(match[1])) if match else self.saved()
        for path in reversed(candidates):
            reason = fault(path)
            if reason is None:
                if path != latest and (not latest.is_symlink() or os.readlink(latest) != path.name):
                    self.point_latest(path)
                return str(path)
            log.warning("%s is damaged (%s): it is now %s, and the one before is taken", path, reason, DAMAGED)
            path.rename(f"{path}{DAMAGED}")
        if candidates or latest.is_symlink():
            raise ConfigError(
                f"{self.path}: no checkpoint here can be read any more. Copy a sound one here as {latest.name}, or "
                "begin anew in another save_folder"
            )
        return None

    def point_latest(self, path: Path) -> None:
        """Make ``latest`` name a checkpoint; it names one at any moment."""
        latest = self.path / LATEST.format(rank=0)
        swap = latest.with_name(f"{latest.name}{PARTIAL}")
        swap.unlink(missing_ok=True)
        swap.symlink_to(path.name)
        swap.replace(latest)
        _sync(self.path)

    def rotate(self, keep: int, until: int) -> None:
        """Delete all but the last ``keep`` checkpoints of steps up to ``until``, an earlier start's too."""
        for path in self.saved(until)[:-keep]:
            path.unlink()


def find(path: str | None, resume: bool) -> tuple[RunFolder | None, str | None]:
    """Claim a run's folder, on rank 0, and find the checkpoint in it to go on from, the same on every rank.

    Args:
        path: of the folder; None when there is none here.
        resume: whether to look for a checkpoint.

    Raises:
        ConfigError: another run lives in the folder, all checkpoints in it are damaged, or a node does not see it.
    """
    folder = None
    found: list[str | None] = [None, None]  # the checkpoint, and what is wrong
    if path is not None and dist.get_global_rank() == 0:
        try:
            folder = RunFolder(path)
            found[0] = folder.newest() if resume else None
        except (ConfigError, OSError) as error:
            found[1] = str(error)
    dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise ConfigError(found[1])
    sees = found[0] is None or Path(found[0]).exists()
    blind = {node for node in dist.all_gather_object(None if sees else dist.get_node_rank()) if node is not None}
    if blind:
        raise ConfigError(
            f"node {', '.join(map(str, sorted(blind)))} does not see {found[0]}, which node 0 goes on from: "
            "save_folder must be on a file system that all nodes share, or that file be copied to each"
        )
    return folder, found[0]


def read(path: str) -> dict[str, Any]:
    """The ``state`` of a checkpoint, as Composer writes it; a tensor is read from the file when it is used.

    Raises:
        ConfigError: it cannot be read, holds more than data, or is no checkpoint of a run.
    """
    load_as_data()
    try:
        held = torch.load(path, map_location="cpu", mmap=True)
    except Exception as error:  # whatever a broken file makes of torch's reader
        text = str(error)
        what = "holds more than data, and running what it holds is refused" if "nsupported" in text else "is damaged"
        raise ConfigError(f"{path}: the checkpoint {what}: {text[:300]}") from None
    if not isinstance(held, dict) or not isinstance(held.get("state"), dict):
        raise ConfigError(f"{path}: this is no checkpoint of a run: it has no 'state'")
    return held["state"]


def settings_of(path: str) -> dict[str, Any] | None:
    """What a checkpoint states of the run that it is of (``ResumeCheck``); ``read`` says what can be wrong."""
    return read(path)["callbacks"].get("ResumeCheck")


class Saver(CheckpointSaver):
    """Composer's, for a folder here: a checkpoint is complete or absent, and ``latest`` names a complete one.

    Written under another name, flushed to the disk, and renamed. One that cannot be written leaves no half of itself
    and ends the run with the reason. Rotation knows the checkpoints of earlier starts.

    Args:
        folder: of the run; None on ranks other than 0.
        path: of that folder.
        save_interval, overwrite, num_checkpoints_to_keep: CheckpointSaver's.
    """

    def __init__(
        self, folder: RunFolder | None, path: str, save_interval: str, overwrite: bool, num_checkpoints_to_keep: int
    ):
        super().__init__(
            path,
            filename=NAME,
            latest_filename=LATEST,
            remote_file_name=f"{path}/{NAME}",  # for loggers that keep files too, such as W&B
            latest_remote_file_name=f"{path}/{LATEST}",
            save_interval=save_interval,
            overwrite=overwrite,
            num_checkpoints_to_keep=num_checkpoints_to_keep,
        )
        self.run_folder = folder

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        self.last_checkpoint_batch = state.timestamp.batch
        epoch, step = state.timestamp.epoch.value, state.timestamp.batch.value
        path = Path(self.filename.format(state)).with_name(NAME.format(epoch=epoch, batch=step, rank=0))
        # Before it is written, so that it knows itself.
        self.all_saved_checkpoints_to_timestamp[str(path)] = state.timestamp
        torch.cuda.empty_cache()  # as Composer does: gathering states takes memory
        held = {"state": state.state_dict(), "rng": reproducibility.get_rng_state()}
        reasons: list[str | None] = [None]
        if self.run_folder is not None:
            reasons[0] = _write(held, path)
            if reasons[0] is None:
                self.run_folder.point_latest(path)
                if self.num_checkpoints_to_keep > 0:
                    self.run_folder.rotate(self.num_checkpoints_to_keep, step)
        dist.broadcast_object_list(reasons, src=0)  # nobody goes on before it is written
        if reasons[0] is not None:
            raise TrainingError(
                f"{path}: the checkpoint of step {step} cannot be written ({reasons[0]}). "
                "Earlier ones are as they were; make room, or set save_num_checkpoints_to_keep, and start again"
            )
        if self.run_folder is not None:
            self.saved_checkpoints.append(str(path))
            assert self.remote_file_name is not None
            logger.upload_file(self.remote_file_name.format(state).lstrip("/"), str(path), overwrite=self.overwrite)

    def post_close(self) -> None:
        super().post_close()
        if self.run_folder is not None:
            self.run_folder.close()


def _write(held: Any, path: Path) -> str | None:
    """Write a checkpoint, whole or not at all; why it cannot be, or None."""
    partial = path.with_name(f"{path.name}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(held, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync(path.parent)
    except (OSError, RuntimeError) as error:  # torch's writer makes RuntimeErrors of what the system says
        with contextlib.suppress(OSError):
            partial.unlink()
        return str(error.__context__ or error).splitlines()[0]
    return None


def _sync(folder: Path) -> None:
    """Flush a folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
