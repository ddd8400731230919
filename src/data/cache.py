"""Files of a source on this machine. Every download, unpacking and deletion of a shard is here.

A cache is a folder that was new or empty when a run began to stream into it:

    index.json, lengths.bin, shards     of the remote; each is compared with the index before it gets its name
    .mosaic_bert_cache                  says that no file here is the only copy; without it nothing is evicted
    .downloads/HOST/                    what is being downloaded or unpacked; removed at the next start
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from socket import gethostname
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from streaming import Stream
from streaming.base.compression import decompress
from streaming.base.format import FileInfo, Reader
from streaming.base.hashing import get_hash
from streaming.base.util import retry

from src.common.errors import DataError, first_line
from src.data.index import TOKENS_KEY, header_size, parse_index, read_index
from src.data.source import Source, without_password

log = logging.getLogger(__name__)

MARKER, DOWNLOADS, HALF = ".mosaic_bert_cache", ".downloads", ".tmp-"
ABANDONED = 24 * 3600
"""Seconds after which another host's downloads are removed: hosts that share a cache may be gone for good."""

MDS_CONFIG = ("version", "format", "compression", "hashes", "size_limit")
MDS_CONFIG += ("column_names", "column_encodings", "column_sizes")
"""Fields of a shard in index.json that MDSWriter also writes into the shard."""

CLIENTS = {
    "azure": "azure-storage-blob azure-identity",
    "azure-dl": "azure-storage-file-datalake azure-identity",
    "gs": "google-cloud-storage",
    "oci": "oci",
    "sftp": "paramiko",
}
"""Packages that streaming imports for a remote, by the scheme of its URI, as pip names them."""


class SourceStream(Stream):
    """Streaming's Stream of a source, in which nothing of the user's is deleted and no half file is read.

    Streaming's own downloads to the final name, deletes a complete dataset's unpacked shards if their archives are
    gone, and its archives after unpacking (tests/data/test_cache.py).

    Raises:
        DataError: the remote is of no known kind, or needs another package.
    """

    def __init__(self, source: Source, download_retry: int = 2, download_timeout: float = 60):
        # Streaming compares these paths with those of other runs.
        place = {"local": os.path.realpath(source.local or ""), "remote": None if source.complete else source.remote}
        options = {"download_retry": download_retry, "download_timeout": download_timeout}
        try:
            super().__init__(**{**vars(source), **place, **options})
        except Exception as error:  # each object store has errors of its own
            packages = CLIENTS.get(str(source.remote).split(":")[0]) if isinstance(error, ImportError) else None
            install = f"; pip install {packages}" if packages else ""
            message = f"remote: {source.remote} cannot be opened ({first_line(error)}){install}"
            raise DataError(without_password(message)) from None
        self.source, self.folder = source, Path(place["local"] or "", source.split or "")
        self.damaged = frozenset[str]()
        """Names of files that differ from the index (``check_shards``); they are replaced, not read."""

    def open_cache(self, limited: bool) -> None:
        """Compare the index.json of the remote with the cache's, or make the folder a cache if it is new or empty.

        Streaming would use a cached index whatever the remote, and one that it fetches without any check.

        Args:
            limited: whether shards will be evicted.

        Raises:
            DataError: the folder holds other files, or with ``limited`` shards that may be the only copy; the index
                cannot be fetched, is broken, or is another than the cache's.
        """
        cached, marker, remote = self.folder / "index.json", self.folder / MARKER, without_password(self.source.origin)
        if not cached.exists() and self.folder.exists():
            # What begins with a dot or ends in .tmp is never read: a file system's own, or a killed run's.
            names = (each.name for each in self.folder.iterdir() if each.name != "lost+found")
            if foreign := sorted(name for name in names if not name.startswith(".") and not name.endswith(".tmp")):
                raise DataError(
                    f"{self.folder} cannot be the cache of {remote}: it has no index.json, and holds {foreign[0]}. "
                    "Name another folder, new or empty, as local"
                )
        if limited and cached.exists() and not marker.exists():
            raise DataError(
                f"{self.folder} may be the only copy of a dataset, and cache_limit would delete its shards. Name "
                f"another folder as local; or, if it is only a cache of {remote}, make the file {marker}"
            )
        try:
            with self.fetched("index.json") as fetched:
                index = parse_index(fetched.read_bytes(), f"{remote}/index.json")
                if not cached.exists():
                    marker.write_text(f"A cache of {remote}. Runs may delete the shards.\n")
                    fetched.replace(cached)
        except DataError:
            raise
        except Exception as error:  # each object store has errors of its own
            alone = f"; if {self.folder} holds all shards, it can be used without the remote" if cached.exists() else ""
            message = f"{remote}: index.json cannot be fetched ({first_line(error)})"
            advice = f"Check the address, the credentials and the network{alone}"
            raise DataError(without_password(f"{message}. {advice}")) from error
        if read_index(self.folder) != index:
            if marker.exists():
                message = (
                    f"{self.folder} is the cache of another dataset than {remote} holds; name another local folder"
                )
                raise DataError(f"{message}, or delete this one")
            raise DataError(f"{self.folder} holds another dataset than {remote}; name another local folder")

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: NDArray[np.int64]) -> None:
        """Note the bytes (N,) of each shard that is in the cache, 0 for a complete source. Called by the first process
        of the node, once no other run of it uses the cache and before any process reads."""
        if self.source.complete:
            return
        with contextlib.suppress(FileNotFoundError):
            for host in (self.folder / DOWNLOADS).iterdir():
                if host.name == gethostname() or time.time() - host.stat().st_mtime > ABANDONED:
                    for half in host.glob(f"{HALF}*"):  # what has another name is not ours
                        shutil.rmtree(half, ignore_errors=True)
                    with contextlib.suppress(OSError):
                        host.rmdir()
        for i, shard in enumerate(shards):
            raw = _raw(shard)
            if raw.basename not in self.damaged and (self.folder / raw.basename).exists():
                cache_usage_per_shard[i] = raw.bytes

    def prepare_shard(self, shard: Reader) -> int:
        """Download and unpack a shard if it is not there, or differs from the index. Returns the bytes that it takes
        of the cache, 0 for a complete source.

        Raises:
            FileNotFoundError: a complete source lacks it.
            DataError: as ``fetch_shard``.
        """
        raw, packed = _raw(shard), _packed(shard)
        path = self.folder / raw.basename
        if self.source.complete:
            if not path.exists():
                archive = self.folder / (packed or raw).basename
                if not archive.exists():
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(archive))
                with self._temporary() as folder:
                    self._unpack(shard, archive, folder)
            return 0
        if path.exists() and not fault_of(path, raw):  # another node has fetched it
            return raw.bytes
        if packed and (archive := self.folder / packed.basename).exists() and not fault_of(archive, packed):
            try:
                with self._temporary() as folder:
                    self._unpack(shard, archive, folder)
                return raw.bytes
            except Exception as error:  # each compression has errors of its own
                log.warning("%s in the cache is damaged (%s). Fetching it again", archive, error)
        self.fetch_shard(shard)
        return raw.bytes

    def fetch_shard(self, shard: Reader) -> None:
        """Download a shard and unpack it. It replaces a damaged one, which stays if this fails.

        Raises:
            DataError: it differs from the index; the cache cannot be written, or is full.
            Exception: the object store's own, if it cannot be fetched.
        """
        info = _packed(shard) or _raw(shard)
        with self.fetched(info.basename, info) as path:
            self._unpack(shard, path, path.parent)

    @contextlib.contextmanager
    def fetched(self, name: str, info: FileInfo | None = None) -> Iterator[Path]:
        """A file of the remote, compared with what the index says of it, in a folder that is removed at the end."""

        def attempt() -> None:
            path.unlink(missing_ok=True)
            self._downloader.download(
                os.path.join(self.remote or "", self.split, name), str(path), self.download_timeout
            )
            if info and (fault := fault_of(path, info)):
                raise DataError(
                    f"{without_password(self.source.origin)}/{name} {fault}: the dataset there was replaced since its "
                    "index.json was read, or is damaged. Copy or convert it again; stream a new one into a new folder"
                )

        with self._temporary() as folder:
            path = folder / os.path.basename(name)
            retry(clean_up_fn=self._downloader.clean_up, num_attempts=self.download_retry)(attempt)()
            yield path

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[Path]:
        """A new folder on the file system of the shards, removed at the end. Raises DataError if the disk is full or
        cannot be written."""
        complete, made = self.source.complete, False
        parent = self.folder if complete else self.folder / DOWNLOADS / gethostname()
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(prefix=HALF, dir=parent) as folder:
                made = True
                yield Path(folder)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            if made and not full:
                raise
            hint = "name a folder that can be written as local"
            if full:
                hint = "free space" if complete else "free space, or set a smaller cache_limit"
            elif complete:
                hint = "its shards are compressed: name it as remote, and a folder that can be written as local"
            raise DataError(f"{self.folder} cannot be written ({error.strerror}); {hint}") from error

    def _unpack(self, shard: Reader, path: Path, folder: Path) -> None:
        """Put a shard from ``path`` in its place, unpacked by way of ``folder``."""
        raw, packed = _raw(shard), _packed(shard)
        if packed:
            data: Any = decompress(shard.compression, path.read_bytes())
            path = folder / f"{os.path.basename(raw.basename)}.unpacked"
            path.write_bytes(data)
            if fault := fault_of(path, raw):
                raise DataError(f"{self.folder / packed.basename}: {raw.basename} {fault} after unpacking")
        final = self.folder / raw.basename
        final.parent.mkdir(parents=True, exist_ok=True)
        path.replace(final)

    def evict(self, shard: Reader) -> int:
        """Delete a shard from a cache. Returns its bytes. Raises DataError if it may be the only copy."""
        if self.source.complete or not (self.folder / MARKER).exists():
            raise DataError(f"{self.folder} may be the only copy of a dataset: nothing in it is deleted")
        (self.folder / _raw(shard).basename).unlink(missing_ok=True)
        return _raw(shard).bytes


def _raw(shard: Any) -> FileInfo:
    return shard.raw_data


def _packed(shard: Any) -> FileInfo | None:
    return shard.zip_data


def fault_of(path: Path, info: FileInfo) -> str | None:
    """How a file differs from what the index says of it: its size, or its hash if the index has one. 64 MB take 35 ms
    with SHA-1."""
    if (found := path.stat().st_size) != info.bytes:
        return f"has {found:,} bytes, not {info.bytes:,}"
    for algorithm, expected in info.hashes.items():
        if get_hash(algorithm, path.read_bytes()) != expected:
            return f"has another {algorithm} than the index says"
        break
    return None


def lengths_fault(path: Path, index: dict[str, Any]) -> str | None:
    """How a lengths.bin differs from the index: it is missing, or does not give each shard its number of bytes."""
    if not path.exists():
        return "is missing"
    samples = sum(shard["samples"] for shard in index["shards"])
    if (found := path.stat().st_size) != 2 * samples:
        return f"has {found // 2:,} lengths for {samples:,} samples"
    lengths, size, begin = np.memmap(path, "<u2", "r"), np.dtype(index[TOKENS_KEY]["dtype"]).itemsize, 0
    for shard in index["shards"]:
        count = shard["samples"]
        # MDS: number of samples and their offsets; how they were written; the samples, each after its size (uint32)
        header = header_size(count) + len(json.dumps({name: shard[name] for name in MDS_CONFIG}, sort_keys=True))
        tokens = int(lengths[begin : begin + count].sum(dtype=np.int64))
        if header + 4 * count + size * tokens != shard["raw_data"]["bytes"]:
            return f"does not fit {shard['raw_data']['basename']}"
        begin += count
    return None
