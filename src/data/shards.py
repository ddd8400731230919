"""MDS shards on disk: what an index promises, whether the files keep it, and reading samples."""

import bisect
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from streaming import Stream
from streaming.base.hashing import get_hash
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from src.common.errors import DataError
from src.data.tokenizer import earlier_fingerprint, tokenizer_fingerprint

log = logging.getLogger(__name__)


TOKENS_KEY = "mosaic_bert_tokens"
"""Key of index.json that describes shards of tokens; streaming reads past it. Shards of text have none."""

LENGTHS = "lengths.bin"
"""File beside the index.json of shards of tokens: each sample's length, little-endian uint16, in the index's order."""


def check_shards(folder: Path, complete: bool, verify: str = "size") -> None:
    """Compare a split's index.json with its files: 0.1 s for 20,000 shards, unless their hashes are compared too.

    Args:
        folder: of the split, with index.json.
        complete: every shard must be here, with the size that the index states; else (a cache that fills up) only what
            is here is compared, and what is damaged is deleted, with a warning, to be fetched again.
        verify: ``size``; ``hash`` reads each file, on all cores, under a progress bar; ``off`` compares no files.

    Raises:
        DataError: the index is broken or names a file outside the folder; shards are missing, of another size, or of
            another hash; or the index has no hashes to compare.
    """
    try:
        shards = json.loads((folder / "index.json").read_text())["shards"]
        files = [
            [info for info in (shard["raw_data"], shard["zip_data"]) if info is not None and info["basename"]]
            for shard in shards
        ]
        total = sum(shard["samples"] for shard in shards)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / 'index.json'} is broken ({error!r}); convert or copy the split again") from None
    if not total:
        raise DataError(f"{folder} is an empty dataset; convert the text again")
    faults, damaged, sound = [], [], []
    for either in files:
        for info in either:
            if Path(info["basename"]).name != info["basename"]:
                raise DataError(f"{folder / 'index.json'} names {info['basename']!r}, outside its folder")
        here = [info for info in either if (folder / info["basename"]).exists()] if verify != "off" else []
        if complete and not here and verify != "off":
            faults.append(f"{either[0]['basename']} is missing")
        for info in here:
            found = (folder / info["basename"]).stat().st_size
            if found != info["bytes"]:
                faults.append(f"{info['basename']} has {found:,} bytes, not {info['bytes']:,}")
                damaged.append(info)
            else:
                sound.append(info)
    if verify == "hash":
        others = _other_hashes(folder, sound)
        faults += [f"{info['basename']} has other bytes than when it was written" for info in others]
        damaged += others
    if faults:
        shown = "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")
        if not complete:
            log.warning("%s: %s. Fetching again what is damaged", folder, shown)
            for info in damaged:
                (folder / info["basename"]).unlink()
            return
        raise DataError(f"{folder}: {shown}. Copy these shards again, or convert the split again")


def _other_hashes(folder: Path, files: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of ``files`` (of index.json) whose bytes have another hash than the index states."""
    for info in files:
        if not info["hashes"]:
            raise DataError(f"{folder / 'index.json'} has no hashes to compare; convert again, or data_verify: size")

    def differs(info: dict[str, Any]) -> bool:
        algorithm, want = next(iter(info["hashes"].items()))
        return get_hash(algorithm, (folder / info["basename"]).read_bytes()) != want

    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter's lock
        progress = tqdm(pool.map(differs, files), desc=f"hashes of {folder}", total=len(files), unit="shard", delay=1)
        return [info for info, found in zip(files, progress, strict=True) if found]


class OpenShards:
    """Raw shards that stay open in this process, so that a sample is one read; streaming opens the file for each.

    Reads, not maps: a file that shrinks ends in an error and not in a killed process.

    Args:
        limit: files open at once; the least recently opened is closed for the next.
    """

    def __init__(self, limit: int = 64):
        self.limit = limit
        self.process = 0
        self.files: dict[str, tuple[io.FileIO, NDArray[np.uint32]]] = {}

    def read(self, path: str, index: int) -> bytes:
        """Bytes of a shard's sample (MDS: a count, then the offsets of all samples and of the end, then samples)."""
        if self.process != os.getpid():  # descriptors that a fork shares are left to the parent
            self.process, self.files = os.getpid(), {}
        if path not in self.files:
            for opened, (file, _) in list(self.files.items()):  # an evicted shard takes up disk while it is open
                if len(self.files) >= self.limit or not os.fstat(file.fileno()).st_nlink:
                    self.files.pop(opened)[0].close()
            file = io.FileIO(path)
            (samples,) = np.frombuffer(file.read(4), np.uint32)
            self.files[path] = file, np.frombuffer(file.read(4 * (int(samples) + 1)), np.uint32)
        file, offsets = self.files[path]
        begin, end = offsets[index : index + 2].tolist()
        data = os.pread(file.fileno(), end - begin, begin)
        if len(data) != end - begin:
            raise DataError(f"{path} ends at byte {begin + len(data):,}, within sample {index}")
        return data

    def forget(self, path: str) -> None:
        """Close a shard; the next read opens what is then there."""
        if path in self.files:
            self.files.pop(path)[0].close()


class Locator:
    """Where samples lie, in place of streaming's Spanner: a binary search, and no memory for each sample.

    Ids past the end begin again at the first sample: they are later drawings of the same samples in an epoch.
    """

    def __init__(self, samples_per_shard: NDArray[np.int64]):
        self.starts = [0, *np.cumsum(samples_per_shard).tolist()]
        self.num_samples = self.starts.pop()

    def __getitem__(self, sample_id: int) -> tuple[int, int]:
        """Shard, and position in it."""
        index = int(sample_id) % self.num_samples
        shard_id = bisect.bisect_right(self.starts, index) - 1
        return shard_id, index - self.starts[shard_id]


@dataclass(frozen=True)
class Source:
    """A dataset, alone or one of several that are mixed. At most one of the weights is given, of one kind for all."""

    local: str
    """Folder of the dataset, or the cache when there is a ``remote``."""
    remote: str | None = None
    """Path or object-store URI to stream from; None or the same as ``local`` when the data is here already."""
    split: str | None = None
    """Subfolder."""
    proportion: float | None = None
    """Share of an epoch's samples, relative to the other sources'; an epoch is as long as all of them together."""
    repeat: float | None = None
    """Times that an epoch draws each sample: 0.5 draws half of them, 2 each of them twice."""
    choose: int | None = None
    """Samples that an epoch draws."""

    @property
    def folder(self) -> Path:
        """Of the split, with index.json, here or in the cache."""
        return Path(self.local) / (self.split or "")

    @property
    def complete(self) -> bool:
        """Whether all the data is here, and not in a cache that fills up."""
        return self.remote is None or Path(self.remote) == Path(self.local)

    def check(self, verify: str) -> None:
        """Before streaming looks at it: there is a dataset; if all of it must be here, it is."""
        source = Path(self.remote or self.local)
        if "://" not in str(self.remote) and not (source / (self.split or "") / "index.json").is_file():
            there = sorted(p.parent.name for p in source.glob("*/index.json"))
            raise DataError(
                f"{source / (self.split or '')} holds no dataset (no index.json); "
                f"{'splits there: ' + ', '.join(there) if there else 'make one with convert_c4.py'}"
            )
        if self.complete:
            check_shards(self.folder, True, verify)

    def stream(self) -> Stream:
        """As streaming takes it."""
        weights = {"proportion": self.proportion, "repeat": self.repeat, "choose": self.choose}
        given = {name: weight for name, weight in weights.items() if weight is not None}
        return Stream(local=self.local, remote=self.remote, split=self.split, **given)  # pyright: ignore


def _hash_of_downloads(folder: Path) -> str:
    """Name of the hash that a split's index has of its shards."""
    first = json.loads((folder / "index.json").read_text())["shards"][0]
    hashes = (first["zip_data"] or first["raw_data"])["hashes"]
    if not hashes:
        raise DataError(f"{folder / 'index.json'} has no hashes to compare; convert again, or data_verify: size")
    return next(iter(hashes))


def _check_tokens(
    description: dict[str, Any], tokenizer: PreTrainedTokenizerFast, max_seq_len: int, folder: Path
) -> None:
    """Shards of tokens fit the run: same tokenizer, same length."""
    if description["fingerprint"] not in (tokenizer_fingerprint(tokenizer), earlier_fingerprint(tokenizer)):
        raise DataError(
            f"{folder} was tokenized with another tokenizer ({description['tokenizer']!r}, {description['vocab_size']} "
            f"entries; this one has {len(tokenizer)}). Set tokenizer_name to it, or convert the text again."
        )
    if description["max_seq_len"] != max_seq_len:
        raise DataError(
            f"{folder} holds samples of up to {description['max_seq_len']} tokens and max_seq_len is {max_seq_len}. "
            "Set max_seq_len to the former, or convert the text again."
        )


def dataset_fingerprint(folders: Iterable[Path]) -> str:
    """SHA-256, in hex, of the samples that the index.json of each split promises; the same for every copy of it."""
    shards = []
    for folder in folders:
        index = json.loads((folder / "index.json").read_text())
        shards += [
            [shard["samples"], shard["raw_data"]["bytes"], shard["raw_data"]["hashes"]] for shard in index["shards"]
        ]
    return hashlib.sha256(json.dumps(shards, sort_keys=True).encode()).hexdigest()
