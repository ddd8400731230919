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
from src.data.index import header_size, read_index, remedy
from src.data.source import Source
from src.data.tokenizer import tokenizer_fingerprints, vocab_size

log = logging.getLogger(__name__)

AGAIN = "copy or convert it again"


def check_index(source: Source) -> None:
    """Raise DataError if a dataset on this machine has no index.json."""
    origin, split = Path(source.remote or source.local or ""), source.split or ""
    if "://" not in str(source.remote) and not (origin / split / "index.json").is_file():
        splits = ", ".join(sorted(path.parent.name for path in origin.glob("*/index.json")))
        hint = f"splits there: {splits}" if splits else "make one with convert_c4.py"
        if (origin / "index.json").is_file():
            folder, name = os.path.split(os.path.realpath(origin))
            hint = f"{origin} is a split itself: name {folder} as the folder, and {name} as the split"
        raise DataError(f"{origin / split} holds no dataset (no index.json); {hint}")


def check_shards(folder: Path, complete: bool, verify: str = "size") -> frozenset[str]:
    """Compare the files of a split with its index.json. Takes less than a second for 20,000 shards without hashes.

    Args:
        folder: of the split, with index.json.
        complete: whether every shard must be there. Else the folder is a cache: missing shards are skipped, and damaged
            ones give a warning.
        verify: ``size`` compares sizes; ``hash`` also reads each file, on all cores, under a progress bar; ``off``
            checks the index alone.

    Returns:
        Names of the damaged files of a cache, which are to be downloaded again.

    Raises:
        DataError: the index is broken (``parse_index``); a shard is missing, or has another size or hash, or is
            compressed in a read-only folder; the index has no hashes to compare.
    """
    files = [
        [info for info in (shard["raw_data"], shard["zip_data"]) if info is not None]
        for shard in read_index(folder)["shards"]
    ]
    if verify == "off":
        return frozenset()
    faults, sound = dict[str, str](), []  # faults by file name
    for infos in files:
        present = [info for info in infos if (folder / info["basename"]).exists()]
        if complete and not present:
            faults[infos[0]["basename"]] = "is missing"
        elif complete and infos[0] not in present and not os.access((folder / infos[0]["basename"]).parent, os.W_OK):
            raise DataError(
                f"{folder} is read-only, and its shards are compressed, so they cannot be unpacked there: give this "
                "dataset as the remote (data_remote), and a folder of your own as the local one (data_local)"
            )
        for info in present:
            found = (folder / info["basename"]).stat().st_size
            if found == info["bytes"]:
                sound.append(info)
            else:
                faults[info["basename"]] = f"has {found:,} bytes, not {info['bytes']:,}"
    if verify == "hash":
        faults |= dict.fromkeys(_changed(folder, sound), "has other bytes than when it was written")
    if not faults:
        return frozenset()
    shown = "; ".join(f"{name} {fault}" for name, fault in list(faults.items())[:3])
    shown += f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
    if complete:
        advice = remedy(folder / "index.json", "copy these shards again, or convert the split again")
        raise DataError(f"{folder}: {shown}; {advice}")
    log.warning("%s: %s. Downloading the damaged ones again", folder, shown)
    return frozenset(faults)


def _changed(folder: Path, files: Sequence[dict[str, Any]]) -> list[str]:
    """Names of those of ``files`` (entries of index.json) whose bytes have another hash than the index states."""

    def differs(info: dict[str, Any]) -> bool:
        algorithm, expected = _hash(folder, info)
        return get_hash(algorithm, (folder / info["basename"]).read_bytes()) != expected

    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        progress = tqdm(pool.map(differs, files), f"hashes of {folder}", len(files), unit="shard", delay=1)
        return [info["basename"] for info, differing in zip(files, progress, strict=True) if differing]


def _hash(folder: Path, info: dict[str, Any]) -> tuple[str, str]:
    """Algorithm and digest of a file, as its index states them."""
    for expected in info["hashes"].items():
        return expected
    raise DataError(f"{folder / 'index.json'} has no hashes to compare; set data_verify to size")


def hash_algorithm(folder: Path) -> str:
    """Name of the hash by which a split's index describes each shard as it is downloaded."""
    first = read_index(folder)["shards"][0]
    return _hash(folder, first["zip_data"] or first["raw_data"])[0]


class OpenShards:
    """Shards that stay open in this process, so a sample costs one read. At most 64 files, oldest closed first.

    Replaces streaming's MDSReader and LocalDataset, which open the file for each sample. Files are read, not mapped:
    one that shrinks raises an error and does not kill the process.
    """

    def __init__(self):
        self.files: dict[str, tuple[io.FileIO, NDArray[np.uint32]]] = {}

    def read(self, path: str, index: int, size: int, samples: int) -> bytes:
        """Bytes of a sample in a shard that has, by its index.json, ``size`` bytes and ``samples`` samples.

        MDS: the number of samples, their offsets and that of the end (all uint32), the samples.

        Raises:
            FileNotFoundError: the shard is not there.
            DataError: it has another size, or its header is damaged; it was cut off since it was opened.
        """
        if path not in self.files:
            for opened, (file, _) in list(self.files.items()):  # an evicted shard takes disk space until closed
                if len(self.files) >= 64 or not os.fstat(file.fileno()).st_nlink:
                    self.files.pop(opened)[0].close()
            file = io.FileIO(path)  # shared after a fork, which pread allows: it moves no offset
            self.files[path] = file, _offsets(file, path, size, samples)
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


def _offsets(file: io.FileIO, path: str, size: int, samples: int) -> NDArray[np.uint32]:
    """Offsets (samples + 1,) of a shard's samples and of their end. Raises what ``OpenShards.read`` does."""
    found, header = os.fstat(file.fileno()).st_size, header_size(samples)
    if found != size:
        raise DataError(f"{path} has {found:,} bytes, not {size:,}; {remedy(path, AGAIN)}")
    count, offsets = np.split(np.frombuffer(file.read(header), np.uint32), [1])
    if count != samples or offsets[0] < header or (offsets[1:] < offsets[:-1]).any():
        fault = f"{path} is not a shard of {samples:,} samples, or is damaged"
        raise DataError(f"{fault}; {remedy(path, AGAIN)}")
    return offsets


class Locator:
    """Shard and position of each sample, by binary search. Ids past the end start over: later draws of the same samples
    in an epoch (``Sample.sample_id``).

    Replaces streaming's Spanner, which raises IndexError for such ids and keeps an array for every 1,024 samples.
    """

    def __init__(self, samples_per_shard: NDArray[np.int64]):
        self.starts = [0, *np.cumsum(samples_per_shard).tolist()]
        self.num_samples = self.starts.pop()

    def __getitem__(self, sample_id: int) -> tuple[int, int]:
        """Shard, and position in it."""
        index = int(sample_id) % self.num_samples
        shard_id = bisect.bisect_right(self.starts, index) - 1
        return shard_id, index - self.starts[shard_id]


def check_tokens(description: dict[str, Any], tokenizer: PreTrainedTokenizerFast, max_seq_len: int, name: Path) -> None:
    """Raise DataError if shards of tokens were made by another tokenizer or for another length."""
    known = description["fingerprint"] in tokenizer_fingerprints(tokenizer)
    if not known or description["vocab_size"] != vocab_size(tokenizer):
        raise DataError(
            f"{name} was tokenized with another tokenizer ({description['tokenizer']!r}, {description['vocab_size']} "
            f"entries; this one has {vocab_size(tokenizer)}). Set tokenizer_name to it, or convert the text again"
        )
    if description["max_seq_len"] != max_seq_len:
        raise DataError(
            f"{name} holds samples of up to {description['max_seq_len']} tokens and max_seq_len is {max_seq_len}. "
            "Set max_seq_len to the former, or convert the text again"
        )


def dataset_fingerprints(folders: Iterable[Path]) -> tuple[str, str]:
    """SHA-256, in hex, of the samples listed in the index.json of each split; the same for every copy of the data.

    The second is what earlier versions computed: it does not tell where one of several datasets ends.
    """
    datasets = [
        [
            [shard["samples"], shard["raw_data"]["bytes"], shard["raw_data"]["hashes"]]
            for shard in read_index(folder)["shards"]
        ]
        for folder in folders
    ]
    flat = [shard for shards in datasets for shard in shards]
    nested, earlier = (
        hashlib.sha256(json.dumps(each, sort_keys=True).encode()).hexdigest()
        for each in (datasets if len(datasets) > 1 else flat, flat)
    )
    return nested, earlier
