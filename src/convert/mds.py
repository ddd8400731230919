"""Shards of streaming: MDS, and its shards of JSON, CSV and TSV, compressed or not.

Replaces streaming's LocalDataset, which reads no compressed shard, decodes pickles, and does not notice damage.
"""

import itertools
import json
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from src.common.errors import DataError, first_line
from src.convert.files import COLUMNS, BadText, Form, Rows, Span, form_of, missing, outer

OTHER = re.compile(r"(shard\.\d{5}\.(?:json|csv|tsv|xsv))((?:\.\w+)?)$")
"""Names of shards that are not MDS; the offsets of their samples lie in a second file."""


def is_shard(path: str) -> bool:
    """Whether a file is a shard of streaming."""
    return _is_mds(path) or (OTHER.search(path) is not None and Path(_meta(path)).is_file())


def _is_mds(path: str) -> bool:
    form = form_of(path)
    return form is not None and form.kind == "mds"


def _meta(path: str) -> str:
    return OTHER.sub(r"\1.meta\2", path)


def files(folder: Path, column: str) -> list[Path]:
    """The shards of a split, in the order of its index; the uncompressed file if it exists.

    Raises:
        DataError: the index is broken, or its shards do not have the column.
    """
    try:
        shards = json.loads((folder / "index.json").read_text())["shards"]
        raw = [folder / shard["raw_data"]["basename"] for shard in shards]
        stored = [folder / (shard["zip_data"] or shard["raw_data"])["basename"] for shard in shards]
        columns = {name for shard in shards for name in shard.get("column_names") or shard["columns"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / 'index.json'} is not an index of MDS shards ({error!r})") from None
    if outer(column, columns) not in columns:
        hint = "--text_column names the column of text; tokens are none, so convert the text that they were made of"
        raise DataError(f"{folder}: the shards have no column {column!r} ({', '.join(sorted(columns))}); {hint}")
    # A merged index names its shards with their folders.
    outside = [
        path for path in (*raw, *stored) if folder not in path.parents or ".." in path.parts[len(folder.parts) :]
    ]
    if outside:
        raise DataError(f"{folder / 'index.json'} names {outside[0]}, outside its folder")
    return [a if a.exists() else b for a, b in zip(raw, stored, strict=True)]


def rows(span: Span, form: Form, column: str) -> Rows:
    """The samples of a shard."""
    path, number = span.path, 0
    try:
        samples = _mds_samples(path, column) if _is_mds(path) else _other_samples(path)
        for number, row in enumerate(samples, start=1):
            yield f"{path}:{number}", row
    except BadText as error:
        yield f"{path}:{number + 1}", error
    except Exception as error:  # each compression has its own error type
        yield f"{path}:{number + 1}", BadText(f"the rest of the shard cannot be read ({first_line(error)})")


def _content(path: str) -> Any:
    """The bytes of a file, decompressed if it ends with a compression of streaming."""
    from streaming.base.compression import decompress, is_compression  # takes seconds to import

    suffix = path.rsplit(".", 1)[1].lower()
    with open(path, "rb") as file:
        if is_compression(suffix):
            return decompress(suffix, file.read())
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _mds_samples(path: str, column: str) -> Iterator[Any]:
    """Number of samples, offsets of all samples and of the end (uint32), columns as JSON, samples."""
    from streaming.base.format.mds.encodings import mds_decode

    data = _content(path)
    (samples,) = np.frombuffer(data, "<u4", 1).tolist()
    offsets = np.frombuffer(data, "<u4", samples + 1, 4).tolist()
    config = json.loads(data[4 * (samples + 2) : offsets[0]])
    columns = [config[key] for key in ("column_names", "column_encodings", "column_sizes")]
    readable = [name for name, encoding, _ in zip(*columns, strict=True) if encoding != "pkl"]  # it could run any code
    wanted = {outer(column, readable), *COLUMNS[1:]}
    if outer(column, readable) not in readable:
        raise missing(column, readable)
    variable = config["column_sizes"].count(None)  # a sample begins with the sizes of these columns
    for begin, end in itertools.pairwise(offsets):
        sizes = iter(np.frombuffer(data, "<u4", variable, begin).tolist())
        at, row = begin + 4 * variable, {}
        for name, encoding, fixed in zip(*columns, strict=True):
            size = next(sizes) if fixed is None else fixed
            if name in wanted and name in readable:
                value = data[at : at + size]
                row[name] = value if encoding == "str" else mds_decode(encoding, value)
            at += size
        if at != end or end > len(data):
            raise DataError(f"the sample does not end at byte {end:,} as the shard says")
        yield row


def _other_samples(path: str) -> Iterator[Any]:
    """Samples of JSON, or values with a separator, without quotes."""
    data, meta = _content(path), _content(_meta(path))
    (samples,) = np.frombuffer(meta, "<u4", 1).tolist()
    offsets = np.frombuffer(meta, "<u4", samples + 1, 4).tolist()
    config = json.loads(meta[4 * (samples + 2) :])
    newline = config["newline"].encode()
    separator = str({"json": "", "csv": ",", "tsv": "\t"}.get(config["format"], config.get("separator"))).encode()
    for begin, end in itertools.pairwise(offsets):
        line = data[begin:end]
        if len(line) != end - begin:
            raise DataError(f"the sample does not end at byte {end:,} as the shard says")
        values = line.removesuffix(newline)
        yield dict(zip(config["column_names"], values.split(separator), strict=True)) if separator else values
