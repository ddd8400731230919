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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.callbacks import CheckpointSaver
from composer.core import State, Timestamp
from composer.loggers import Logger
from composer.utils import (
    ObjectStoreTransientError,
    dist,
    is_compressed_pt,
    is_tar,
    maybe_create_object_store_from_uri,
    reproducibility,
    retry,
    validate_credentials,
)
from composer.utils import checkpoint as composers
from filelock import FileLock, Timeout
from torch.distributed.tensor import DTensor
from torch.torch_version import TorchVersion
from transformers import PreTrainedTokenizerFast

from src.common.errors import CheckpointError, ConfigError, DataError, Finished, TrainingError, first_line
from src.common.files import PARTIAL, atomic, replace_folder, settle_folder, write_text
from src.data.tokenizer import load_tokenizer, save_tokenizer, tokenizer_fingerprint

log = logging.getLogger(__name__)

NAME, LATEST = "ep{epoch}-ba{batch}-rank{rank}.pt", "latest-rank{rank}.pt"
PATTERN = re.compile(r"ep(?P<epoch>\d+)-ba(?P<step>\d+)-rank0\.pt")
TOKENIZER = "tokenizer"
"""Folder next to the checkpoints with the tokenizer of the run."""


def load_as_data() -> None:
    """Make every torch.load of this process refuse pickled code; Composer's uses ``weights_only=False``."""
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    reconstruct = np._core.multiarray._reconstruct  # pyright: ignore[reportAttributeAccessIssue]
    dtypes = {type(np.dtype(code)) for code in np.typecodes["All"]}
    # What Composer's checkpoints hold besides tensors and plain values: times, versions, random states.
    torch.serialization.add_safe_globals([datetime.timedelta, TorchVersion, np.ndarray, np.dtype, reconstruct, *dtypes])


def damage(path: Path) -> str | None:
    """What is damaged in a file of torch.save, or None. Reads the whole file and compares each record's CRC-32."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (OSError, zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:
        return first_line(error)  # the last two: a damaged header of a record
    return None if bad is None else f"wrong CRC of {bad}"


def load_data(path: str | Path) -> Any:
    """What torch.save wrote, on the CPU, memory-mapped if the file format allows it. Runs no code in the file.

    Raises:
        CheckpointError: the file is damaged, or holds more than tensors and plain values.
    """
    load_as_data()
    try:
        return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except pickle.UnpicklingError as error:
        reason = f"holds more than data, or is damaged; no code in it was run ({str(error)[:300]})"
    except Exception as error:  # torch's reader can raise anything for a damaged file
        reason = f"is damaged ({first_line(error)[:300]})"
    raise CheckpointError(f"{path}: the file {reason}")


def not_finite(tree: Any, name: str = "") -> str | None:
    """Which tensor of nested dicts and sequences is the first with NaN or infinity, or without values; or None."""
    if isinstance(tree, torch.Tensor):
        values = tree.to_local() if isinstance(tree, DTensor) else tree
        if values.layout != torch.strided or values.is_meta:
            return f"{name} is not a dense tensor"
        values = values.float() if values.element_size() == 1 else values  # of 8 bits: torch has no isfinite for them
        return None if values.isfinite().all() else f"{name} is NaN or infinite"
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    found = (not_finite(part, f"{name}.{key}" if name else str(key)) for key, part in items)
    return next(filter(None, found), None)


def is_weights(value: Any) -> bool:
    """Whether ``value`` has tensors by name, and at least one."""
    named = isinstance(value, dict) and all(isinstance(name, str) for name in value)
    return named and bool(value) and all(isinstance(weight, torch.Tensor) for weight in value.values())


def _is_timestamp(value: Any) -> bool:
    try:
        Timestamp().load_state_dict(value["Timestamp"])
    except Exception:  # whatever Composer's raises for junk
        return False
    return True


def _are_states(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(each, dict) for each in value.values())


def _are_callbacks(value: Any) -> bool:
    """Whether the states of callbacks are dicts, and of those with the fields that this code reads."""
    if not isinstance(value, dict) or not all(isinstance(each, dict) for each in value.values()):
        return False
    stopped = value.get("RunEnd", {}).get("stopped")
    by = isinstance(stopped, dict) and isinstance(stopped.get("name"), str) and "options" in stopped
    return (stopped is None or by) and all(isinstance(path, str) for path in value.get("ResumeCheck", {}))


def _is_place(value: Any) -> bool:
    """Whether streaming finds its place in the training data. None: the run begins an epoch."""
    train = value.get("train") if isinstance(value, dict) else 0
    fields = ("epoch", "sample_in_epoch", "num_canonical_nodes", "shuffle_seed")
    return train is None or (isinstance(train, dict) and all(type(train.get(name)) is int for name in fields))


FIELDS: dict[str, Callable[[Any], bool]] = {
    "model": is_weights,
    "callbacks": _are_callbacks,
    "timestamp": _is_timestamp,
}
"""What each checkpoint's ``state`` has, and a check of it."""
TO_RESUME: dict[str, Callable[[Any], bool]] = {
    "optimizers": _are_states,
    "schedulers": _are_states,
    "algorithms": lambda value: isinstance(value, list),
    "dataset_state": _is_place,
}
"""What a resumed run needs as well. If one of them is missing, Composer only warns, and trains without it."""


def read(path: str | Path, to_resume: bool = False) -> dict[str, Any]:
    """The ``state`` of a checkpoint that Composer wrote, after its fields, the CRC of each record and its numbers are
    checked: weights, averages of weights and, ``to_resume``, the optimizer's.

    Raises:
        CheckpointError: as ``load_data``; the file is not a checkpoint of a run; or it is damaged.
    """
    state, reason = _read(path, to_resume)
    reason = damage(Path(path)) or reason
    if reason is not None:
        raise CheckpointError(f"{path}: the checkpoint is damaged: {reason}")
    return state


def _read(path: str | Path, to_resume: bool) -> tuple[dict[str, Any], str | None]:
    """A checkpoint's state, and which number in it is not finite."""
    held = load_data(path)
    state = held.get("state") if isinstance(held, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not a checkpoint of a run: it has no 'state'")
    for name, check in {**FIELDS, **(TO_RESUME if to_resume else {})}.items():
        if name not in state or not check(state[name]):
            raise CheckpointError(f"{path}: not a checkpoint of a run: its {name!r} is missing or of another form")
    if to_resume and not isinstance(held.get("rng"), list):
        raise CheckpointError(f"{path}: not a checkpoint of a run: its 'rng' is missing or of another form")
    numbers = ("model", "algorithms", *(["optimizers"] if to_resume else []))
    return state, not_finite({name: state[name] for name in numbers if name in state})


def check_store(key: str, uri: str | None, writes: bool) -> None:
    """Raise ConfigError if a URI is of no known object store, or its client or, to write, its credentials are missing.

    Composer would raise the store's own error. Does nothing for a path, nor for dbfs://, whose store starts an MLflow
    run.
    """
    if uri is None or "://" not in uri or uri.startswith("dbfs:"):
        return
    try:
        store = maybe_create_object_store_from_uri(uri)
        if writes and dist.get_global_rank() == 0:  # writes a small object, which Composer will write again
            name = ".credentials_validated_successfully"
            retry(ObjectStoreTransientError, 3)(lambda: validate_credentials(store, name))()  # pyright: ignore
    except Exception as error:  # each object store has errors of its own
        raise ConfigError(f"{key}: {uri} cannot be used ({first_line(error)})") from None


def check_name(path: str, where: str) -> None:
    """Raise CheckpointError for a name by which Composer would unpack a file, which writes others, or follow it."""
    if is_tar(path) or is_compressed_pt(path) or path.endswith(".symlink"):
        raise CheckpointError(f"{where}: an archive or a link by its name, which is not opened; expected a .pt")


@contextlib.contextmanager
def loading(where: str) -> Iterator[None]:
    """Turn what Composer raises for parts of a checkpoint that do not fit the run into a CheckpointError."""
    load = composers.load_checkpoint

    def checked(*args: Any, **options: Any) -> Any:
        try:
            return load(*args, **options)
        except (CheckpointError, ConfigError, DataError, Finished):
            raise
        except Exception as error:  # each part of a run has errors of its own
            reason = f"{type(error).__name__}: {first_line(error)[:300]}"
            raise CheckpointError(f"{where}: the checkpoint does not fit this run ({reason})") from error

    composers.load_checkpoint = checked
    try:
        yield
    finally:
        composers.load_checkpoint = load


@contextlib.contextmanager
def checked_loading(where: str, check: Callable[[dict[str, Any]], None], to_resume: bool) -> Iterator[None]:
    """Make Composer load only what ``read`` and ``check`` accept, from places that only Composer can find.

    They are object stores, and names with ``{rank}``. Composer has no hook between download and loading.

    Args:
        where: what the config calls the place, for messages.
        check: gets the checkpoint's ``state``.
        to_resume: as for ``read``.
    """
    download = composers.download_checkpoint

    def checked(path: str, **options: Any) -> Any:
        check_name(path.removesuffix(".symlink"), where)  # in object stores, ``latest`` is a file that names another
        try:
            found = download(path=path, **options)
        except Exception as error:  # each object store has errors of its own
            raise CheckpointError(f"{where}: cannot be read ({first_line(error)})") from None
        try:
            check(read(found[0], to_resume))
        except CheckpointError as error:  # names the temporary file
            raise CheckpointError(str(error).replace(found[0], where)) from None
        return found

    composers.download_checkpoint = checked
    try:
        with loading(where):
            yield
    finally:
        composers.download_checkpoint = download


def check_fits(path: str, weights: Mapping[str, torch.Tensor], model: torch.nn.Module) -> None:
    """Raise CheckpointError if the weights of the checkpoint at ``path`` differ from a model's in name or shape."""
    there = {name: tuple(weight.shape) for name, weight in weights.items()}
    here = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    differing = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"{path}: the checkpoint is of another model: {len(differing)} weights differ, for example {name}: "
            f"{there.get(name, 'absent')} there, {here.get(name, 'absent')} here. Set model.model_config to its shape"
        )


def check_optimizer(path: str, states: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Raise CheckpointError if the checkpoint at ``path`` has no state of an optimizer of this class.

    Composer only warns, and trains without it.

    Args:
        states: the checkpoint's, by name of the class.
    """
    name = type(optimizer).__qualname__
    if name not in states:
        raise CheckpointError(
            f"{path}: the checkpoint has the state of another optimizer: {', '.join(states)} there, {name} here. Set "
            "optimizer.name back, or start a new run with load_weights_only: true"
        )


def _position(name: str) -> tuple[int, int] | None:
    """Step and epoch of a checkpoint, from its name."""
    match = PATTERN.fullmatch(name)
    return (int(match["step"]), int(match["epoch"])) if match else None


class RunFolder:
    """A ``save_folder`` on this machine or a mounted file system, locked by one live run. Used on rank 0 only.

    Args:
        path: of the folder; created if absent.
        timeout: seconds to wait for a run that is just ending.

    Raises:
        ConfigError: another run has locked it.
    """

    def __init__(self, path: str, timeout: float = 10.0):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / ".lock")
        holder = self.path / ".lock.holder"  # a file of its own: filelock may empty the lock's
        try:
            self._lock.acquire(timeout=timeout)
        except Timeout:
            who = holder.read_text().strip() if holder.exists() else "just started"
            raise ConfigError(
                f"{self.path}: another run uses this folder ({who}). Wait until it ends, or change run_name or "
                "save_folder"
            ) from None
        for partial in self.path.glob(f"*{PARTIAL}"):  # of a run that was killed while writing
            if not partial.is_dir():
                partial.unlink()
        write_text(holder, f"process {os.getpid()} on {socket.gethostname()}\n")

    def close(self) -> None:
        """Release the folder."""
        self._lock.release()

    def saved(self, until: str | None = None) -> list[Path]:
        """Checkpoints up to that named ``until``, sorted by step; at the end of an epoch, a step can have two."""
        found = {path: at for path in self.path.iterdir() if (at := _position(path.name)) is not None}
        last = None if until is None else _position(until)
        return sorted((path for path, at in found.items() if last is None or at <= last), key=lambda path: found[path])

    def newest(self) -> str | None:
        """The checkpoint to resume from: that of ``latest``, or the newest undamaged one before it with finite weights.

        Renames damaged ones and warns. Ignores checkpoints after ``latest``: they are of an earlier run, or of one that
        was killed before it updated ``latest``.

        Raises:
            CheckpointError: all checkpoints are damaged, or one is not data or not of a run.
        """
        latest = self.path / LATEST.format(rank=0)
        if latest.exists() and not latest.is_symlink():  # a user copied it here
            candidates = [latest]
        else:
            candidates = self.saved(until=Path(os.readlink(latest)).name if latest.is_symlink() else None)
        for path in reversed(candidates):
            reason = damage(path) or _read(path, to_resume=True)[1]
            if reason is None:
                if not (latest.exists() and latest.samefile(path)):
                    self.point_latest(path)
                return str(path)
            log.warning("%s is damaged (%s): renamed to .damaged, falling back to the one before", path, reason)
            path.rename(f"{path}.damaged")
        if candidates or latest.is_symlink():
            raise CheckpointError(
                f"{self.path}: every checkpoint is damaged. Copy a good one here as {latest.name}, or start a new run "
                "in another save_folder"
            )
        return None

    def point_latest(self, path: Path) -> None:
        """Make ``latest`` a link to a checkpoint, atomically."""
        with atomic(self.path / LATEST.format(rank=0)) as link:
            link.symlink_to(path.name)

    def keep_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Write the tokenizer next to the checkpoints, unless the same one is there; the folder can then be moved."""
        folder, fingerprint = self.path / TOKENIZER, tokenizer_fingerprint(tokenizer)
        settle_folder(folder)
        with contextlib.suppress(ValueError, OSError):  # replaces a damaged one
            if folder.exists() and tokenizer_fingerprint(load_tokenizer(str(folder))) == fingerprint:
                return
        partial = folder.with_name(f"{TOKENIZER}{PARTIAL}")
        shutil.rmtree(partial, ignore_errors=True)
        save_tokenizer(tokenizer, partial)
        fault = None
        try:
            if tokenizer_fingerprint(load_tokenizer(str(partial))) != fingerprint:
                fault = "it gives other ids"
        except ValueError as error:
            fault = str(error)
        if fault is None:
            replace_folder(partial, folder)
        else:
            log.warning("%s: not kept, because once saved: %s. Name the tokenizer at each use", folder, fault)
            shutil.rmtree(partial)


def find(path: str | None, resume: bool) -> tuple[RunFolder | None, str | None]:
    """Lock a run's folder on rank 0, and return it and, on every rank, the checkpoint to resume from.

    Args:
        path: of the folder; None if the run has no local one.
        resume: whether to look for a checkpoint.

    Raises:
        ConfigError: another run has locked the folder.
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


class Saver(CheckpointSaver):
    """Composer's CheckpointSaver for a local folder, with atomic writes: ``latest`` always names a complete checkpoint.

    Rotation includes checkpoints of earlier starts.

    Args:
        folder: of the run; None on ranks other than 0.
        path: of that folder.
        tokenizer: of the run; written next to the checkpoints before the first step.
        options: save_interval, overwrite, num_checkpoints_to_keep of CheckpointSaver.

    Raises:
        TrainingError: a checkpoint cannot be written; no partial file stays.
    """

    def __init__(self, folder: RunFolder | None, path: str, tokenizer: PreTrainedTokenizerFast, **options: Any):
        super().__init__(path, filename=NAME, latest_filename=LATEST, **options)
        self.run_folder, self.tokenizer = folder, tokenizer

    def fit_start(self, state: State, logger: Logger) -> None:
        super().fit_start(state, logger)  # first, because it refuses a folder with another run's checkpoints
        if self.run_folder is not None:
            self.run_folder.keep_tokenizer(self.tokenizer)

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        self.last_checkpoint_batch = state.timestamp.batch
        epoch, step = state.timestamp.epoch.value, state.timestamp.batch.value
        path = Path(self.folder, NAME.format(epoch=epoch, batch=step, rank=0))
        # Before the write, so that the checkpoint lists itself.
        self.all_saved_checkpoints_to_timestamp[str(path)] = state.timestamp
        torch.cuda.empty_cache()  # as Composer does: gathering the state takes memory
        held = {"state": state.state_dict(), "rng": reproducibility.get_rng_state()}
        reasons: list[str | None] = [None]
        if self.run_folder is not None:
            reasons[0] = write(held, path)
            if reasons[0] is None:
                self.run_folder.point_latest(path)
                if self.num_checkpoints_to_keep > 0:
                    for old in self.run_folder.saved(until=path.name)[: -self.num_checkpoints_to_keep]:
                        old.unlink()
        dist.broadcast_object_list(reasons, src=0)  # all ranks wait until it is written
        if reasons[0] is not None:
            raise TrainingError(
                f"{path}: cannot write the checkpoint of step {step} ({reasons[0]}). Earlier checkpoints are intact; "
                "free disk space or set save_num_checkpoints_to_keep, and start again"
            )
        if self.run_folder is not None:
            self.saved_checkpoints.append(str(path))
            # For loggers that store files, such as W&B.
            logger.upload_file(f"{self.folder}/{path.name}".lstrip("/"), str(path), overwrite=self.overwrite)

    def post_close(self) -> None:
        super().post_close()
        if self.run_folder is not None:
            self.run_folder.close()


def write(held: Any, path: Path) -> str | None:
    """Write a checkpoint atomically; returns the reason if that fails."""
    try:
        with atomic(path) as partial, partial.open("wb") as file:
            torch.save(held, file)
    except (OSError, RuntimeError) as error:  # torch's writer raises a RuntimeError from an OSError
        return first_line(error if isinstance(error, OSError) else error.__context__ or error)
    return None
