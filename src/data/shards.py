"""MDS shards on disk: checking files against their index.json, and reading samples."""

import bisect
import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from streaming.base.compression import is_compression
from streaming.base.format.mds.encodings import get_mds_encoded_size, is_mds_encoding_safe
from streaming.base.hashing import get_hash, is_hash
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from src.common.errors import DataError, first_line
from src.data.source import Source
from src.data.tokenizer import tokenizer_fingerprints

log = logging.getLogger(__name__)


TOKENS_KEY = "mosaic_bert_tokens"
"""Key of index.json that describes shards of tokens; streaming ignores it. Shards of text have none."""

LENGTHS = "lengths.bin"
"""File next to the index.json of shards of tokens: the length of each sample, little-endian uint16, in their order."""


def token_dtype(vocab_size: int) -> str:
    """Type of the ids on disk. uint16 takes half the bytes on disk and in memory; most vocabularies fit."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


Fields = Mapping[str, tuple[str, Callable[[Any], bool]]]
"""Of a JSON object: what each field must be, in words and as a test."""

COUNT = "a number of at most 32 bits", lambda x: type(x) is int and 0 <= x < 2**32  # not a bool, which is an int
POSITIVE = "a positive number", lambda x: type(x) is int and 0 < x < 2**32
STRING = "a string", lambda x: type(x) is str
LIST = "a list", lambda x: type(x) is list
STRINGS = "a list of strings", lambda x: type(x) is list and all(type(item) is str for item in x)
SIZES = "a list of numbers or null", lambda x: type(x) is list and all(type(i) in (int, type(None)) for i in x)
VERSION = "2", lambda x: type(x) is int and x == 2

INDEX: Fields = {"version": VERSION, "shards": LIST}
TOKENS: Fields = {
    "dtype": ("uint16 or uint32", lambda x: x in ("uint16", "uint32")),
    "fingerprint": STRING,
    "max_seq_len": POSITIVE,
    "tokenizer": STRING,
    "vocab_size": POSITIVE,
}
SHARD: Fields = {
    "version": VERSION,
    "format": ("'mds', the only one that is read", lambda x: x == "mds"),
    "column_names": STRINGS,
    "column_encodings": STRINGS,
    "column_sizes": SIZES,
    "compression": ("null or a compression", lambda x: x is None or (type(x) is str and is_compression(x))),
    "hashes": STRINGS,
    "raw_data": ("an object", lambda x: type(x) is dict),
    "samples": COUNT,
    "size_limit": ("null or a number", lambda x: x is None or (type(x) is int and x >= 0)),
    "zip_data": ("an object or null", lambda x: x is None or type(x) is dict),
}
FILE: Fields = {
    "basename": ("the name of a file in its folder", lambda x: type(x) is str and _is_plain(x)),
    "bytes": COUNT,
    "hashes": (
        "digests by hash",
        lambda x: type(x) is dict and all(is_hash(name) and type(digest) is str for name, digest in x.items()),
    ),
}


def read_index(folder: Path) -> dict[str, Any]:
    """The index.json of a split; raises what ``parse_index`` does."""
    return parse_index((folder / "index.json").read_bytes(), str(folder / "index.json"))


def parse_index(content: bytes, name: str) -> dict[str, Any]:
    """An index.json, in which every field that streaming or this project uses was checked.

    Raises:
        DataError: a field is missing, unknown, ill-typed, or does not fit the others; a file is not in the index's
            folder. The message has the index's ``name`` and the field.
    """
    try:
        index = json.loads(content.decode())
        _check_index(index)
    except (ValueError, RecursionError) as error:
        hint = "copy or convert the split again; delete it if it is a cache"
        raise DataError(f"{name} is broken ({first_line(error)}); {hint}") from None
    if not any(shard["samples"] for shard in index["shards"]):
        raise DataError(f"{name} lists no samples; convert the text again")
    return index


def _check_index(index: Any) -> None:
    """Raise a ValueError with the first field that is wrong."""
    _check_fields(index, INDEX, "", closed=False)
    if TOKENS_KEY in index:
        _check_fields(index[TOKENS_KEY], TOKENS, f"{TOKENS_KEY}.", closed=False)
        found, entries = index[TOKENS_KEY]["dtype"], index[TOKENS_KEY]["vocab_size"]
        if found != token_dtype(entries):
            raise ValueError(
                f"{TOKENS_KEY}.dtype: expected {token_dtype(entries)} for {entries:,} entries, got {found}"
            )
    first, names = None, set[str]()
    for i, shard in enumerate(index["shards"]):
        path = f"shards[{i}]."
        _check_fields(shard, SHARD, path)
        columns = shard["column_names"], shard["column_encodings"], shard["column_sizes"]
        if first is None:
            _check_columns(*columns, tokens=TOKENS_KEY in index)
        elif columns != first:
            raise ValueError(f"{path}column_names: other columns than in shards[0]")
        first = columns
        if (shard["zip_data"] is None) != (shard["compression"] is None):
            raise ValueError(f"{path}zip_data: expected an object with compression, else null")
        for kind in ("raw_data", "zip_data"):
            if shard[kind] is not None:
                _check_fields(shard[kind], FILE, f"{path}{kind}.")
                if (name := shard[kind]["basename"]) in names:
                    raise ValueError(f"{path}{kind}.basename: {name!r} is another file's name, too")
                names.add(name)
        if shard["raw_data"]["bytes"] < _header_size(shard["samples"]):
            raise ValueError(f"{path}samples: {shard['samples']:,} are more than its bytes can hold")


def _check_columns(names: list[str], encodings: list[str], sizes: list[int | None], tokens: bool) -> None:
    """Check the columns of the first shard; one that is read must be a string, or bytes with ``tokens``."""
    if len({*names}) < len(names):
        raise ValueError(f"shards[0].column_names: expected different names, got {names!r:.80}")
    try:
        expected = [get_mds_encoded_size(encoding) for encoding in encodings]
    except Exception as error:  # each encoding has errors of its own
        raise ValueError(f"shards[0].column_encodings: unknown in {encodings!r:.80} ({first_line(error)})") from None
    if len(names) != len(encodings) or not all(map(is_mds_encoding_safe, encodings)):  # unpickling runs code
        raise ValueError("shards[0].column_encodings: expected one for each of column_names, without pkl")
    if sizes != expected:
        raise ValueError(f"shards[0].column_sizes: expected {expected!r:.80}, got {sizes!r:.80}")
    column, encoding = ("tokens", "bytes") if tokens else ("text", "str")
    found = dict(zip(names, encodings, strict=True)).get(column)
    if found != encoding and (found or tokens):
        raise ValueError(f"shards[0].column_encodings: expected {encoding!r} for column {column!r}, got {found!r}")
    if tokens and len(names) > 1:
        raise ValueError(f"shards[0].column_names: expected 'tokens' alone, got {names!r:.80}")


def _check_fields(entry: Any, fields: Fields, path: str, closed: bool = True) -> None:
    """Check an object's fields. ``closed`` refuses others, as streaming does."""
    if type(entry) is not dict:
        raise ValueError(f"{path.rstrip('.') or 'top level'}: expected an object, got {entry!r:.80}")
    for name, (what, fits) in fields.items():
        if name not in entry:
            raise ValueError(f"{path}{name}: missing")
        if not fits(entry[name]):
            raise ValueError(f"{path}{name}: expected {what}, got {entry[name]!r:.80}")
    if closed and (unknown := sorted(entry.keys() - fields.keys())):
        raise ValueError(f"{path}{unknown[0]!r:.80}: unknown field")


def _is_plain(name: str) -> bool:
    return name.isprintable() and "/" not in name and name not in ("", ".", "..", "index.json", LENGTHS)


def check_index(source: Source) -> None:
    """Raise DataError if a dataset on this machine has no index.json."""
    origin, split = Path(source.remote or source.local or ""), source.split or ""
    if "://" not in str(source.remote) and not (origin / split / "index.json").is_file():
        splits = ", ".join(sorted(path.parent.name for path in origin.glob("*/index.json")))
        hint = f"splits there: {splits}" if splits else "make one with convert_c4.py"
        raise DataError(f"{origin / split} holds no dataset (no index.json); {hint}")


def check_shards(folder: Path, complete: bool, verify: str = "size") -> None:
    """Compare the files of a split with its index.json. Takes less than a second for 20,000 shards without hashes.

    Args:
        folder: of the split, with index.json.
        complete: whether every shard must be there. Else the folder is a cache: missing shards are skipped, and damaged
            ones are deleted with a warning, so they are downloaded again.
        verify: ``size`` compares sizes; ``hash`` also reads each file, on all cores, under a progress bar; ``off``
            checks the index alone.

    Raises:
        DataError: the index is broken (``parse_index``); a shard is missing, or has another size or hash; the index has
            no hashes to compare.
    """
    files = [
        [info for info in (shard["raw_data"], shard["zip_data"]) if info is not None]
        for shard in read_index(folder)["shards"]
    ]
    if verify == "off":
        return
    faults, sound = dict[str, str](), []  # faults by file name
    for infos in files:
        present = [info for info in infos if (folder / info["basename"]).exists()]
        if complete and not present:
            faults[infos[0]["basename"]] = "is missing"
        for info in present:
            found = (folder / info["basename"]).stat().st_size
            if found == info["bytes"]:
                sound.append(info)
            else:
                faults[info["basename"]] = f"has {found:,} bytes, not {info['bytes']:,}"
    if verify == "hash":
        faults |= dict.fromkeys(_changed(folder, sound), "has other bytes than when it was written")
    if not faults:
        return
    shown = "; ".join(f"{name} {fault}" for name, fault in list(faults.items())[:3])
    shown += f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
    if complete:
        raise DataError(f"{folder}: {shown}. Copy these shards again, or convert the split again")
    log.warning("%s: %s. Downloading the damaged ones again", folder, shown)
    for name in faults:
        (folder / name).unlink()


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
    raise DataError(f"{folder / 'index.json'} has no hashes to compare; convert again, or set data_verify to size")


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
    found, header = os.fstat(file.fileno()).st_size, _header_size(samples)
    if found != size:
        raise DataError(f"{path} has {found:,} bytes, not {size:,}; copy or convert it again")
    count, offsets = np.split(np.frombuffer(file.read(header), np.uint32), [1])
    if count != samples or offsets[0] < header or (offsets[1:] < offsets[:-1]).any():
        raise DataError(f"{path} is not a shard of {samples:,} samples, or is damaged; copy or convert it again")
    return offsets


def _header_size(samples: int) -> int:
    """Bytes of a shard's header: the number of samples, their offsets, and that of the end."""
    return 4 * (samples + 2)


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


def token_description(folder: Path) -> dict[str, Any] | None:
    """What a split's index says of its tokens (``Tokens.description``); None for shards of text."""
    return read_index(folder).get(TOKENS_KEY)


def check_tokens(description: dict[str, Any], tokenizer: PreTrainedTokenizerFast, max_seq_len: int, name: Path) -> None:
    """Raise DataError if shards of tokens were made by another tokenizer or for another length."""
    known = description["fingerprint"] in tokenizer_fingerprints(tokenizer)
    if not known or description["vocab_size"] != len(tokenizer):
        raise DataError(
            f"{name} was tokenized with another tokenizer ({description['tokenizer']!r}, {description['vocab_size']} "
            f"entries; this one has {len(tokenizer)}). Set tokenizer_name to it, or convert the text again"
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
