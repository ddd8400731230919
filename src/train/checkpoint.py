"""Checkpoint I/O: ``weights_only`` loading, atomic writes, and fallback to an older checkpoint if one is damaged."""

import contextlib
import datetime
import logging
import os
import pickle
import re
import shutil
import socket
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.callbacks import CheckpointSaver
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist, reproducibility
from filelock import FileLock, Timeout
from torch.torch_version import TorchVersion
from transformers import PreTrainedTokenizerFast

from src.common.errors import CheckpointError, ConfigError, TrainingError, first_line
from src.common.files import PARTIAL, atomic, replace_folder, settle_folder, write_text
from src.data.tokenizer import load_tokenizer, save_tokenizer, tokenizer_fingerprint

log = logging.getLogger(__name__)

NAME, LATEST = "ep{epoch}-ba{batch}-rank{rank}.pt", "latest-rank{rank}.pt"
PATTERN = re.compile(r"ep\d+-ba(\d+)-rank0\.pt")
DAMAGED = ".damaged"
"""End of the name of a checkpoint that cannot be read any more."""
TOKENIZER = "tokenizer"
"""Folder next to the checkpoints with the tokenizer of the run."""


# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------


def load_as_data() -> None:
    """Make every torch.load of this process, including Composer's, refuse pickled code.

    Composer loads checkpoints with ``weights_only=False``, and such a file can run any command. Besides tensors and
    plain values, its checkpoints need only the classes named here (random states, times, versions).
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


def damage(path: Path) -> str | None:
    """What is damaged in a file of torch.save, or None. Reads all of it: it has a CRC-32 for each record."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (OSError, zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:
        return first_line(error)  # the last two: changed bytes in the description of how a record is packed
    return None if bad is None else f"wrong CRC of {bad}"


def load_data(path: str | Path) -> Any:
    """What torch.save wrote, on the CPU; only tensors and plain values, and no code is run.

    Tensors of the current file format are read from the file when they are used.

    Raises:
        CheckpointError: it is damaged, or holds more than data.
    """
    load_as_data()
    try:
        return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except pickle.UnpicklingError as error:
        reason = f"holds more than data, or is damaged; no code in it was run ({str(error)[:300]})"
    except Exception as error:  # a damaged file can raise anything in torch's reader
        reason = f"is damaged ({first_line(error)[:300]})"
    raise CheckpointError(f"{path}: the file {reason}")


def read(path: str | Path) -> dict[str, Any]:
    """The ``state`` of a checkpoint, as Composer writes it.

    Raises:
        CheckpointError: it is damaged, holds more than data, or is no checkpoint of a run.
    """
    held = load_data(path)
    if not isinstance(held, dict) or not isinstance(held.get("state"), dict):
        raise CheckpointError(f"{path}: not a checkpoint of a run: it has no 'state'")
    return held["state"]


def settings_of(path: str) -> dict[str, Any] | None:
    """Settings of the run that wrote a checkpoint (``ResumeCheck``); raises what ``read`` does."""
    return read(path)["callbacks"].get("ResumeCheck")


def check_fits(path: str, model: torch.nn.Module) -> None:
    """Compare a checkpoint's weights with a model's by name and shape.

    Raises:
        CheckpointError: they differ; or what ``read`` raises.
    """
    there = {name: tuple(weight.shape) for name, weight in read(path).get("model", {}).items()}
    here = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    differing = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"{path}: the checkpoint is of another model: {len(differing)} weights differ, for example {name}, "
            f"{there.get(name, 'absent')} there and {here.get(name, 'absent')} here. Give model.model_config its shape"
        )


# ----------------------------------------------------------------------------------------------------------------------
# The folder of a run
# ----------------------------------------------------------------------------------------------------------------------


class RunFolder:
    """A ``save_folder`` on this machine or a mounted file system, locked by one live run. Used on rank 0 only.

    Args:
        path: of the folder, which is made.
        timeout: seconds to wait for a run that is just ending.

    Raises:
        ConfigError: another run has it.
    """

    def __init__(self, path: str, timeout: float = 10.0):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / ".lock")
        holder = self.path / ".lock.holder"  # opening a lock's own file empties it
        try:
            self._lock.acquire(timeout=timeout)
        except Timeout:
            who = holder.read_text().strip() if holder.exists() else "just started"
            raise ConfigError(
                f"{self.path}: another run uses this folder ({who}). Wait until it ends, or change run_name or "
                "save_folder"
            ) from None
        for partial in self.path.glob(f"*{PARTIAL}"):  # of a run that was killed while it wrote
            if not partial.is_dir():
                partial.unlink()
        write_text(holder, f"process {os.getpid()} on {socket.gethostname()}\n")

    def close(self) -> None:
        """Release the folder."""
        self._lock.release()

    def saved(self, until: float = float("inf")) -> list[Path]:
        """Checkpoints of steps up to ``until``, sorted by step."""
        steps = {path: int(match[1]) for path in self.path.iterdir() if (match := PATTERN.fullmatch(path.name))}
        return sorted((path for path in steps if steps[path] <= until), key=lambda path: (steps[path], path.name))

    def newest(self) -> str | None:
        """The checkpoint to resume from: that of ``latest``, or the newest undamaged one before it.

        Renames damaged ones, with a warning. Ignores checkpoints after ``latest``: they are an earlier run's, or of a
        run that was killed before it updated ``latest``.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged.
        """
        latest = self.path / LATEST.format(rank=0)
        if latest.exists() and not latest.is_symlink():  # a user copied it here
            candidates = [latest]
        else:
            match = PATTERN.fullmatch(Path(os.readlink(latest)).name) if latest.is_symlink() else None
            candidates = self.saved(until=int(match[1])) if match else self.saved()
        for path in reversed(candidates):
            reason = damage(path)
            if reason is None:
                if path != latest and (not latest.is_symlink() or os.readlink(latest) != path.name):
                    self.point_latest(path)
                return str(path)
            log.warning("%s is damaged (%s): renamed to %s, falling back to the one before", path, reason, DAMAGED)
            path.rename(f"{path}{DAMAGED}")
        if candidates or latest.is_symlink():
            raise CheckpointError(
                f"{self.path}: every checkpoint is damaged. Copy a good one here as {latest.name}, or start a new run "
                "in another save_folder"
            )
        return None

    def point_latest(self, path: Path) -> None:
        """Make ``latest`` a link to a checkpoint; it is never absent in between."""
        with atomic(self.path / LATEST.format(rank=0)) as link:
            link.symlink_to(path.name)

    def rotate(self, keep: int, until: int) -> None:
        """Delete all but the newest ``keep`` checkpoints of steps up to ``until``, whichever start wrote them."""
        for path in self.saved(until)[:-keep]:
            path.unlink()

    def keep_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Write the tokenizer next to the checkpoints, unless the same one is there, so that they can be moved."""
        folder, fingerprint = self.path / TOKENIZER, tokenizer_fingerprint(tokenizer)
        settle_folder(folder)
        with contextlib.suppress(ValueError, OSError):  # a damaged one is replaced
            if folder.exists() and tokenizer_fingerprint(load_tokenizer(str(folder))) == fingerprint:
                return
        partial = folder.with_name(f"{TOKENIZER}{PARTIAL}")
        shutil.rmtree(partial, ignore_errors=True)
        save_tokenizer(tokenizer, partial)
        if tokenizer_fingerprint(load_tokenizer(str(partial))) == fingerprint:
            replace_folder(partial, folder)
        else:
            log.warning(
                "%s: the saved tokenizer gives other ids, so none is kept next to the checkpoints. Name the tokenizer "
                "wherever they are used",
                folder,
            )
            shutil.rmtree(partial)


def find(path: str | None, resume: bool) -> tuple[RunFolder | None, str | None]:
    """Lock a run's folder, on rank 0, and find the checkpoint to resume from, the same on every rank.

    Args:
        path: of the folder; None if there is no local one.
        resume: whether to look for a checkpoint.

    Raises:
        ConfigError: another run has the folder.
        CheckpointError: all checkpoints in it are damaged, or a node does not see the one to resume from.
    """
    folder = None
    found: list[Any] = [None, None]  # the checkpoint, and the error
    if path is not None and dist.get_global_rank() == 0:
        try:
            folder = RunFolder(path)
            found[0] = folder.newest() if resume else None
        except (ValueError, OSError) as error:
            found[1] = error
    dist.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise found[1]
    sees = found[0] is None or Path(found[0]).exists()
    blind = {node for node in dist.all_gather_object(None if sees else dist.get_node_rank()) if node is not None}
    if blind:
        raise CheckpointError(
            f"node {', '.join(map(str, sorted(blind)))} does not see {found[0]}, which node 0 resumes from: put "
            "save_folder on a file system that all nodes share, or copy that file to each node"
        )
    return folder, found[0]


# ----------------------------------------------------------------------------------------------------------------------
# Writing
# ----------------------------------------------------------------------------------------------------------------------


class Saver(CheckpointSaver):
    """Composer's CheckpointSaver for a local folder, with atomic writes: ``latest`` always names a complete checkpoint.

    If a checkpoint cannot be written, the run ends with the reason, and no partial file stays. Rotation includes
    checkpoints of earlier starts.

    Args:
        folder: of the run; None on ranks other than 0.
        path: of that folder.
        tokenizer: of the run, written next to the checkpoints before the first step.
        save_interval, overwrite, num_checkpoints_to_keep: as CheckpointSaver's.
    """

    def __init__(
        self,
        folder: RunFolder | None,
        path: str,
        tokenizer: PreTrainedTokenizerFast,
        save_interval: str,
        overwrite: bool,
        num_checkpoints_to_keep: int,
    ):
        super().__init__(
            path,
            filename=NAME,
            latest_filename=LATEST,
            remote_file_name=f"{path}/{NAME}",  # for loggers that store files too, such as W&B
            latest_remote_file_name=f"{path}/{LATEST}",
            save_interval=save_interval,
            overwrite=overwrite,
            num_checkpoints_to_keep=num_checkpoints_to_keep,
        )
        self.run_folder, self.tokenizer = folder, tokenizer

    def fit_start(self, state: State, logger: Logger) -> None:
        super().fit_start(state, logger)  # refuses a folder with another run's checkpoints, whose tokenizer stays
        if self.run_folder is not None:
            self.run_folder.keep_tokenizer(self.tokenizer)

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        self.last_checkpoint_batch = state.timestamp.batch
        epoch, step = state.timestamp.epoch.value, state.timestamp.batch.value
        path = Path(self.filename.format(state)).with_name(NAME.format(epoch=epoch, batch=step, rank=0))
        # Before the write, so that the checkpoint lists itself.
        self.all_saved_checkpoints_to_timestamp[str(path)] = state.timestamp
        torch.cuda.empty_cache()  # as Composer does: gathering states takes memory
        held = {"state": state.state_dict(), "rng": reproducibility.get_rng_state()}
        reasons: list[str | None] = [None]
        if self.run_folder is not None:
            reasons[0] = write(held, path)
            if reasons[0] is None:
                self.run_folder.point_latest(path)
                if self.num_checkpoints_to_keep > 0:
                    self.run_folder.rotate(self.num_checkpoints_to_keep, step)
        dist.broadcast_object_list(reasons, src=0)  # all ranks wait until it is written
        if reasons[0] is not None:
            raise TrainingError(
                f"{path}: cannot write the checkpoint of step {step} ({reasons[0]}). Earlier checkpoints are intact; "
                "free disk space or set save_num_checkpoints_to_keep, and start again"
            )
        if self.run_folder is not None:
            self.saved_checkpoints.append(str(path))
            assert self.remote_file_name is not None
            logger.upload_file(self.remote_file_name.format(state).lstrip("/"), str(path), overwrite=self.overwrite)

    def post_close(self) -> None:
        super().post_close()
        if self.run_folder is not None:
            self.run_folder.close()


def write(held: Any, path: Path) -> str | None:
    """Write a checkpoint atomically; returns the reason if that fails."""
    try:
        with atomic(path) as partial, partial.open("wb") as file:
            torch.save(held, file)
    except (OSError, RuntimeError) as error:  # torch's writer turns errors of the system into RuntimeErrors
        return first_line(error if isinstance(error, OSError) else error.__context__ or error)
    return None
