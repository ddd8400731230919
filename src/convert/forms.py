"""Forms of text: a file -> its documents.

.json.gz, .jsonl.gz, .jsonl, .json    one JSON object per line, with a field "text"
.txt, .txt.gz                         one document per line
.parquet                              a column "text"
.mds                                  a shard of MDS, with a column "text"

A ``Span`` is a part of a file.
"""

import gzip
import io
import itertools
import json
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet

from src.common.errors import DataError, first_line
from src.convert import hub
from src.convert.stats import QUOTED, Stats

Document = dict[str, str]
"""``text``, and ``timestamp`` and ``url`` if the source has them."""

COLUMNS = ("text", "timestamp", "url")

SUFFIXES = (".json.gz", ".jsonl.gz", ".jsonl", ".json", ".txt", ".txt.gz", ".parquet")

MAX_LINE = 1 << 31
"""Longest line in bytes. A longer one is an error, because memory would hold it several times."""

TEXT_BYTES = {".gz": 3, ".parquet": 2}
"""Approximate bytes of text per byte of such a file, used only to divide the work."""


class BadText(DataError):
    """A line, or the rest of a file, that cannot be read."""


class File(NamedTuple):
    """One file of a source."""

    path: str
    size: int
    """Bytes on disk; for a file of the hub always 1 GiB."""
    changed: int
    """Time of the last change in nanoseconds; 0 for the hub."""

    @property
    def text_bytes(self) -> int:
        """About how many bytes of text the file holds."""
        return self.size * TEXT_BYTES.get(os.path.splitext(self.path)[1], 1)


class Span(NamedTuple):
    """A part of a file.

    Files of lines: the lines that begin in bytes [start, stop). Parquet: row groups [start, stop). Others: the whole.
    """

    path: str
    start: int = 0
    stop: int | None = None


Rows = Iterator[tuple[str, Any]]
"""Places (file and line), each with its unparsed row, or with the error why it cannot be read."""


def spans_of(file: File, size: int) -> Iterator[tuple[Span, int]]:
    """Parts of a file, each with its bytes of text."""
    path, weight = file.path, file.text_bytes
    if weight <= size or path.endswith(".gz") or not path.endswith(SUFFIXES):  # the last: on the hub, or MDS
        yield Span(path), weight
    elif path.endswith(".parquet"):
        try:
            groups = pyarrow.parquet.read_metadata(path).num_row_groups
        except (pyarrow.ArrowInvalid, OSError):
            groups = 0
        for group in range(groups):
            yield Span(path, group, group + 1), weight // groups
        if not groups:  # damaged; reading it raises
            yield Span(path), weight
    else:
        for start in range(0, file.size, size):
            stop = min(start + size, file.size)
            yield Span(path, start, stop), stop - start


def read(span: Span, text_column: str, skip_bad: bool, stats: Stats) -> Iterator[tuple[str, Document]]:
    """The non-empty documents of a span, each with its place (file and line); raises as ``sources.iter_documents``."""
    parse = _parse_row
    if span.path.startswith(hub.PREFIX):
        rows = hub.rows(span.path)
    elif span.path.endswith(".parquet"):
        rows = _parquet_rows(span)
    elif span.path.endswith(SUFFIXES):
        rows, parse = _lines(span), _parse_text if span.path.endswith((".txt", ".txt.gz")) else _parse_json
    else:
        rows = _mds_rows(span.path)
    for place, row in rows:
        try:
            if isinstance(row, Exception):
                raise row
            document = parse(row)
        except UnicodeDecodeError as error:
            fault = f"invalid UTF-8 ({error.reason} at byte {error.start})"
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair; files and tokenizers refuse it
            fault = f"invalid Unicode ({error.reason})"
        except (json.JSONDecodeError, RecursionError) as error:
            fault = f"invalid JSON ({error})"
        except BadText as error:
            fault = str(error)
        else:
            if document["text"].strip():
                stats.documents += 1
                yield place, document
            else:
                stats.empty += 1
            continue
        if not skip_bad:
            raise BadText(f"{place}: {fault}")
        stats.bad += 1
        if len(stats.first_bad) < QUOTED:
            stats.first_bad.append(f"{place}: {fault}")


def _parse_text(line: bytes) -> Document:
    return {"text": line.decode("utf-8-sig").rstrip("\r\n")}  # Windows begins files with a byte order mark


def _parse_json(line: bytes) -> Document:
    document = _parse_text(line)
    return _parse_row(json.loads(document["text"])) if document["text"].strip() else document


def _parse_row(row: Any) -> Document:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise BadText("expected a field 'text' that holds a string")
    document = {name: str(row[name]) for name in COLUMNS if row.get(name) is not None}
    "".join(document.values()).encode()
    return document


def _lines(span: Span) -> Rows:
    """The lines of a file that begin within the span."""
    path, offset, number = span.path, span.start, 0
    stop = math.inf if span.stop is None else span.stop

    def place() -> str:  # lines before the span are not counted, because that would read all of them
        return f"{path}:{number}" if span.start == 0 else f"{path}:byte {offset}"

    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as lines:
            if span.start:  # the line that crosses the start belongs to the span before
                offset = lines.seek(span.start - 1)
                offset += _skip_line(lines, stop - offset)
            while offset < stop and (line := lines.readline(MAX_LINE)):
                number += 1
                if len(line) == MAX_LINE and not line.endswith(b"\n"):
                    yield place(), BadText(f"line longer than {MAX_LINE:,} bytes; divide it into several documents")
                    offset += _skip_line(lines, math.inf)
                else:
                    yield place(), line
                offset += len(line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        number += 1
        yield place(), BadText(f"the rest of the file cannot be decompressed ({error})")


def _skip_line(lines: gzip.GzipFile | io.BufferedReader, limit: float) -> int:
    """Read to the end of the line, or past ``limit`` bytes, 1 MB at a time; returns the number of bytes."""
    skipped, piece = 0, b""
    while skipped < limit and not piece.endswith(b"\n") and (piece := lines.readline(1 << 20)):
        skipped += len(piece)
    return skipped


def _parquet_rows(span: Span) -> Rows:
    number = 0
    try:
        reader = pyarrow.parquet.ParquetFile(span.path)
        groups = range(span.start, reader.num_row_groups if span.stop is None else span.stop)
        number = sum(reader.metadata.row_group(group).num_rows for group in range(span.start))
        columns = [name for name in COLUMNS if name in reader.schema_arrow.names]
        for batch in reader.iter_batches(batch_size=1024, row_groups=list(groups), columns=columns):
            for i in range(batch.num_rows):
                number += 1
                try:
                    row = {name: batch[name][i].as_py() for name in columns}
                except UnicodeDecodeError as error:
                    row = error
                yield f"{span.path}:{number}", row
    except (pyarrow.ArrowInvalid, OSError) as error:
        yield f"{span.path}:{number + 1}", BadText(f"the rest of the file cannot be read as parquet ({error})")


def _mds_rows(path: str) -> Rows:
    """An MDS shard: number of samples, offsets of all samples and of the end (uint32), columns as JSON, samples.

    Replaces streaming's LocalDataset, which reads no compressed shard, decodes pickles, and does not notice damage.
    """
    from streaming.base.compression import decompress  # takes seconds to import
    from streaming.base.format.mds.encodings import mds_decode

    number = 0
    try:
        data = Path(path).read_bytes()
        if not path.endswith(".mds"):
            data = decompress(path.rsplit(".", 1)[1], data)
        (samples,) = np.frombuffer(data, "<u4", 1).tolist()
        offsets = np.frombuffer(data, "<u4", samples + 1, 4).tolist()
        config = json.loads(data[4 * (samples + 2) : offsets[0]])
        columns = [config[key] for key in ("column_names", "column_encodings", "column_sizes")]
        variable = config["column_sizes"].count(None)  # a sample begins with the sizes of these columns
        for begin, end in itertools.pairwise(offsets):
            sizes = iter(np.frombuffer(data, "<u4", variable, begin).tolist())
            at, row = begin + 4 * variable, {}
            for name, encoding, fixed in zip(*columns, strict=True):
                size = next(sizes) if fixed is None else fixed
                if name in COLUMNS and encoding != "pkl":  # a pickle could run any code
                    row[name] = mds_decode(encoding, data[at : at + size])
                at += size
            if at != end or end > len(data):
                raise DataError(f"the sample does not end at byte {end:,} as the shard says")
            number += 1
            yield f"{path}:{number}", row
    except Exception as error:  # each compression has its own error type
        yield f"{path}:{number + 1}", BadText(f"the rest of the shard cannot be read ({first_line(error)})")
