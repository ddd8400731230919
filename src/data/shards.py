"""MDS shards on disk: checking files against their index.json, and reading samples."""

import bisect
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from streaming.base.hashing import get_hash
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from src.common.errors import DataError
from src.data.source import Source
from src.data.tokenizer import earlier_fingerprint, tokenizer_fingerprint

log = logging.getLogger(__name__)


TOKENS_KEY = "mosaic_bert_tokens"
"""Key of index.json that describes shards of tokens; streaming ignores it. Shards of text have none."""

LENGTHS = "lengths.bin"
"""File beside the index.json of shards of tokens: the length of each sample, little-endian uint16, in its order."""


def check_shards(folder: Path, complete: bool, verify: str = "size") -> None:
    """Compare the files of a split with its index.json. Takes 0.1 s for 20,000 shards without hashes.

    Args:
        folder: of the split, with index.json.
        complete: whether every shard must be there. Else the folder is a cache: missing shards are skipped, and damaged
            ones are deleted with a warning, so that they are downloaded again.
        verify: ``size`` compares sizes; ``hash`` also reads each file, on all cores, under a progress bar; ``off``
            checks the index alone.

    Raises:
        DataError: the index is broken or names a file outside the folder; a shard is missing, or has another size or
            hash; the index has no hashes to compare.
    """
    try:
        shards = json.loads((folder / "index.json").read_text())["shards"]
        files = [
            [info for info in (shard["raw_data"], shard["zip_data"]) if info is not None and info["basename"]]
            for shard in shards
        ]
        total = sum(shard["samples"] for shard in shards)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / 'index.json'} is broken ({error!r}); copy or convert the split again") from None
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
        changed = _changed(folder, sound)
        faults += [f"{info['basename']} has other bytes than when it was written" for info in changed]
        damaged += changed
    if faults:
        shown = "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")
        if not complete:
            log.warning("%s: %s. Downloading the damaged ones again", folder, shown)
            for info in damaged:
                (folder / info["basename"]).unlink()
            return
        raise DataError(f"{folder}: {shown}. Copy these shards again, or convert the split again")


def _changed(folder: Path, files: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of ``files`` (entries of index.json) whose bytes have another hash than the index states."""
    hashes = [_hash(folder, info) for info in files]

    def differs(info: dict[str, Any], expected: tuple[str, str]) -> bool:
        return get_hash(expected[0], (folder / info["basename"]).read_bytes()) != expected[1]

    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        found = pool.map(differs, files, hashes)
        progress = tqdm(found, desc=f"hashes of {folder}", total=len(files), unit="shard", delay=1)
        return [info for info, differing in zip(files, progress, strict=True) if differing]


def _hash(folder: Path, info: dict[str, Any]) -> tuple[str, str]:
    """Algorithm and digest of a file, as its index states them."""
    for expected in info["hashes"].items():
        return expected
    raise DataError(f"{folder / 'index.json'} has no hashes to compare; convert again, or set data_verify to size")


class OpenShards:
    """Shards that stay open in this process, so that a sample costs one read.

    In place of streaming's MDSReader and LocalDataset, which open the file for each sample. Files are read, not mapped:
    one that shrinks raises an error and does not kill the process.

    Args:
        limit: files open at once; the one opened first is closed for the next.
    """

    def __init__(self, limit: int = 64):
        self.limit = limit
        self.process = 0
        self.files: dict[str, tuple[io.FileIO, NDArray[np.uint32]]] = {}

    def read(self, path: str, index: int) -> bytes:
        """Bytes of a sample. MDS: the number of samples, their offsets and that of the end (all uint32), the samples.

        Raises:
            FileNotFoundError: the shard is not there.
            DataError: the shard ends within the sample.
        """
        if self.process != os.getpid():  # after a fork: the parent's descriptors are the parent's
            self.process, self.files = os.getpid(), {}
        if path not in self.files:
            for opened, (file, _) in list(self.files.items()):  # an evicted shard takes disk space until closed
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
    """Shard and position of each sample, by binary search. Ids past the end start over: they are later draws of the
    same samples in an epoch (``Sample.sample_id``).

    In place of streaming's Spanner, which raises IndexError for such ids and keeps an array for every 1,024 samples.
    """

    def __init__(self, samples_per_shard: NDArray[np.int64]):
        self.starts = [0, *np.cumsum(samples_per_shard).tolist()]
        self.num_samples = self.starts.pop()

    def __getitem__(self, sample_id: int) -> tuple[int, int]:
        """Shard, and position in it."""
        index = int(sample_id) % self.num_samples
        shard_id = bisect.bisect_right(self.starts, index) - 1
        return shard_id, index - self.starts[shard_id]


def check_source(source: Source, verify: str) -> None:
    """Check that a dataset is there and, if no remote fills it up, ``check_shards`` of it.

    Raises:
        DataError: there is no index.json, or as ``check_shards``.
    """
    origin, split = Path(source.remote or source.local or ""), source.split or ""
    if "://" not in str(source.remote) and not (origin / split / "index.json").is_file():
        splits = ", ".join(sorted(path.parent.name for path in origin.glob("*/index.json")))
        hint = f"splits there: {splits}" if splits else "make one with convert_c4.py"
        raise DataError(f"{origin / split} holds no dataset (no index.json); {hint}")
    if source.complete:
        check_shards(source.folder, True, verify)


def hash_algorithm(folder: Path) -> str:
    """Name of the hash by which a split's index describes each shard as it is downloaded."""
    first = json.loads((folder / "index.json").read_text())["shards"][0]
    return _hash(folder, first["zip_data"] or first["raw_data"])[0]


def token_description(folder: Path) -> dict[str, Any] | None:
    """What a split's index says of its tokens (``Tokens.description``); None for shards of text."""
    return json.loads((folder / "index.json").read_text()).get(TOKENS_KEY)


def check_tokens(description: dict[str, Any], tokenizer: PreTrainedTokenizerFast, max_seq_len: int, name: Path) -> None:
    """Check that shards of tokens fit the run.

    Raises:
        DataError: they were made by another tokenizer or for another length.
    """
    if description["fingerprint"] not in (tokenizer_fingerprint(tokenizer), earlier_fingerprint(tokenizer)):
        raise DataError(
            f"{name} was tokenized with another tokenizer ({description['tokenizer']!r}, {description['vocab_size']} "
            f"entries; this one has {len(tokenizer)}). Set tokenizer_name to it, or convert the text again"
        )
    if description["max_seq_len"] != max_seq_len:
        raise DataError(
            f"{name} holds samples of up to {description['max_seq_len']} tokens and max_seq_len is {max_seq_len}. "
            "Set max_seq_len to the former, or convert the text again"
        )


def dataset_fingerprint(folders: Iterable[Path]) -> str:
    """SHA-256, in hex, of the samples listed in the index.json of each split; the same for every copy of the data."""
    shards = []
    for folder in folders:
        index = json.loads((folder / "index.json").read_text())
        shards += [
            [shard["samples"], shard["raw_data"]["bytes"], shard["raw_data"]["hashes"]] for shard in index["shards"]
        ]
    return hashlib.sha256(json.dumps(shards, sort_keys=True).encode()).hexdigest()
