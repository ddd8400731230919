"""index.json of a split of MDS shards: every field that streaming or this project uses is checked."""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from streaming.base.compression import is_compression
from streaming.base.format.mds.encodings import get_mds_encoded_size, is_mds_encoding_safe
from streaming.base.hashing import is_hash

from src.common.errors import DataError, first_line
from src.data.columns import READ, name_of

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

CONVERTIBLE = {"csv", "json", "tsv", "xsv"}
"""Formats of streaming's that convert_c4.py reads, and training does not."""

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
    "basename": ("a file in the index's folder or below", lambda x: type(x) is str and _is_plain(x)),
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
            folder or below; the shards are of another format of streaming's. The message has the index's ``name`` and
            the field.
    """
    try:
        index = json.loads(content.decode())
        others = _formats(index) & CONVERTIBLE
        if not others:
            _check_index(index)
    except (ValueError, RecursionError) as error:
        hint = remedy(name, "copy or convert the split again; delete it if it is a cache")
        raise DataError(f"{name} is broken ({first_line(error)}); {hint}") from None
    if others:
        folder = name.removesuffix("/index.json")
        raise DataError(
            f"{name} describes shards of format {min(others)!r}, and only MDS is read; convert them: python "
            f"convert_c4.py --out_root NEW --splits {os.path.basename(folder)} --source {folder}"
        )
    if not any(shard["samples"] for shard in index["shards"]):
        raise DataError(f"{name} lists no samples; {remedy(name, 'convert the text again')}")
    return index


def remedy(path: str | Path, again: str) -> str:
    """What to do about a damaged file: ``again``, which replaces it, unless its folder is read-only."""
    folder = os.path.dirname(path)
    read_only = os.path.isdir(folder) and not os.access(folder, os.W_OK)
    return "its folder is read-only: use another copy of the dataset, or ask its owner" if read_only else again


def _formats(index: Any) -> set[str]:
    """Formats of the shards of an index that was not checked."""
    shards = index.get("shards") if type(index) is dict else None
    return {str(shard.get("format")) for shard in shards if type(shard) is dict} if type(shards) is list else set()


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
        if shard["raw_data"]["bytes"] < header_size(shard["samples"]):
            raise ValueError(f"{path}samples: {shard['samples']:,} are more than its bytes can hold")


def _check_columns(names: list[str], encodings: list[str], sizes: list[int | None], tokens: bool) -> None:
    """Check the columns of the first shard. With ``tokens``, they are one of bytes; else the one that is read fits."""
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
    if tokens and names != ["tokens"]:
        raise ValueError(f"shards[0].column_names: expected 'tokens' alone, got {names!r:.80}")
    column = name_of(names)
    if column is None:  # convert_c4.py reads it
        return
    found = encodings[names.index(column)]
    what, pattern = ("bytes", re.compile("bytes")) if tokens else READ[column]
    if not pattern.fullmatch(found):
        raise ValueError(f"shards[0].column_encodings: expected {what} for column {column!r}, got {found!r:.80}")


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
    """Whether a name is a relative path, as MDSWriter and merge_index write it: ``00000/shard.00000.mds``."""
    plain = name.isprintable() and "\\" not in name
    return plain and all(part[:1] not in ("", ".") and part not in ("index.json", LENGTHS) for part in name.split("/"))


def header_size(samples: int) -> int:
    """Bytes of a shard's header: the number of samples, their offsets, and that of the end."""
    return 4 * (samples + 2)
