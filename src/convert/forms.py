"""Forms of text: a file -> its documents.

.jsonl, .ndjson, .json    one JSON object per line; also one array of objects, or objects over several lines
.csv, .tsv                a header, then one row per document; quoted as by Excel
.txt                      one document per line
.parquet, .arrow          a column of strings or of UTF-8 bytes
.mds                      a shard of MDS; streaming's shards of JSON, CSV and TSV (``mds``)

JSON, CSV, TSV and text may also end in .gz, .bz2, .xz, .zst or .zstd. A ``Span`` is a part of a file.
"""

import codecs
import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Any

from src.common.errors import DataError, first_line
from src.common.hub import is_dataset
from src.common.streams import UNREADABLE, open_stream
from src.convert import hub, mds, tables
from src.convert.files import (
    COLUMNS,
    BadText,
    File,
    Form,
    Rows,
    Span,
    cannot_decompress,
    form_of,
    missing,
    named,
    outer,
)
from src.convert.stats import QUOTED, Stats
from src.data.source import without_password

Document = dict[str, str]
"""``text``, and ``timestamp`` and ``url`` if the source has them."""

MAX_LINE = 1 << 31
"""Longest line in bytes. A longer one is an error, because memory would hold it several times."""

MAX_VALUE = 1 << 28
"""Longest field of a CSV file, and element of a JSON array, in characters, for the same reason."""

CHUNK = 1 << 16
"""Least number of characters of JSON values that are read at once."""

BOM = b"\xef\xbb\xbf"


def spans_of(file: File, size: int) -> Iterator[tuple[Span, int]]:
    """Parts of a file, each with its bytes of text."""
    path, weight, form = file.path, file.text_bytes, form_of(file.path)
    if form is None or weight <= size or is_dataset(path) or mds.is_shard(path):
        yield Span(path), weight
    elif form.kind == "parquet" and (groups := tables.row_groups(path)):
        for group in range(groups):
            yield Span(path, group, group + 1), weight // groups
    elif READERS[form.kind] in (_text_rows, _json_rows) and not form.compression and not _holds_values(path, form):
        for start in range(0, file.size, size):
            stop = min(start + size, file.size)
            yield Span(path, start, stop), stop - start
    else:
        yield Span(path), weight


def columns_of(path: str, text_column: str) -> list[str]:
    """Which of COLUMNS a file has: by the schema of a table, else by the first document. A damaged file has none."""
    form = form_of(path)
    if form is not None and form.kind in ("parquet", "arrow"):
        names = tables.names_of(path, form.kind)
        return [name for name in COLUMNS if (outer(text_column, names) if name == "text" else name) in names]
    document = next(read(Span(path), text_column, True, Stats()), ("", {}))[1]
    return [name for name in COLUMNS if name in document]


def read(span: Span, text_column: str, skip_bad: bool, stats: Stats) -> Iterator[tuple[str, Document]]:
    """The non-empty documents of a span, each with its place (file and line); raises as ``sources.iter_documents``."""
    for place, row in _rows(span, text_column):
        try:
            if isinstance(row, Exception):
                raise row
            document = _document(row, text_column)
        except UnicodeDecodeError as error:
            fault = f"invalid UTF-8 ({error.reason} at byte {error.start})"
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair; files and tokenizers refuse it
            fault = f"invalid Unicode ({error.reason})"
        except BadText as error:
            fault = str(error)
        except (ValueError, RecursionError) as error:  # too many digits of a number are no JSONDecodeError
            fault = f"invalid JSON ({error})"
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


def _rows(span: Span, column: str) -> Rows:
    if is_dataset(span.path):
        yield from hub.rows(span.path)
        return
    form = form_of(span.path)
    assert form is not None, span.path
    reader = mds.rows if mds.is_shard(span.path) else READERS[form.kind]
    try:
        if reader in (_json_rows, _csv_rows, _text_rows) and _is_utf16(span.path, form):
            yield f"{span.path}:1", BadText("the file is in UTF-16 or UTF-32 (iconv -f UTF-16 -t UTF-8), or no text")
        else:
            yield from reader(span, form, column)
    except Exception as error:  # each file system has its own
        if "://" not in span.path or isinstance(error, DataError):
            raise
        raise DataError(f"{without_password(span.path)}: {without_password(first_line(error))}") from None


def _is_utf16(path: str, form: Form) -> bool:
    """Whether a file begins as UTF-16 or UTF-32 does. Most bytes of it are UTF-8, too, of other characters."""
    head = _head(path, form)[: 1 << 10]
    return head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 4 * head.count(0) > len(head)


def _head(path: str, form: Form) -> bytes:
    """The beginning of a file, decompressed; empty if it is damaged, which reading it says."""
    try:
        with open_stream(path, form.compression) as stream:
            return stream.peek(1 << 12)
    except UNREADABLE:
        return b""


def _document(row: Any, column: str) -> Document:
    """The document in a row.

    Raises:
        ValueError: it has none; BadText if it has no string in the column.
    """
    if isinstance(row, bytes):  # a line of JSON
        line = row.decode("utf-8-sig")  # Windows begins files with a byte order mark
        name = column.rpartition(".")[2]
        check = partial(_object, name) if line.count(f'"{name}"') > 1 else None
        row = json.loads(line, object_pairs_hook=check) if line.strip() else {column: ""}
    if not isinstance(row, dict):
        raise BadText(f"expected a field {column!r} of an object, got {_kind(row)}")
    value = row
    for name in [column] if column in row else column.split("."):
        if not isinstance(value, dict) or name not in value:
            raise missing(column, row)
        value = value[name]
    text = _string(value)
    if not isinstance(text, str):
        raise BadText(f"expected a field {column!r} that holds a string, got {_kind(text)}")
    document = {"text": text, **{name: str(_string(row[name])) for name in COLUMNS[1:] if row.get(name) is not None}}
    "".join(document.values()).encode()
    return document


def _object(name: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if sum(key == name for key, _ in pairs) > 1:  # json would keep the last one
        raise BadText(f"the field {name!r} occurs twice in one object; rename one")
    return dict(pairs)


def _string(value: Any) -> Any:
    return "" if value is None else value.decode() if isinstance(value, bytes) else value


def _kind(value: Any) -> str:
    return {dict: "an object", list: "an array", str: "a string"}.get(type(value), type(value).__name__)


def _lines(span: Span, form: Form, column: str) -> Rows:
    """The lines of a file that begin within the span."""
    path, offset, number = span.path, span.start, 0
    stop = math.inf if span.stop is None else span.stop

    def place() -> str:  # lines before the span are not counted, because that would read all of them
        return f"{path}:{number}" if span.start == 0 else f"{path}:byte {offset}"

    try:
        with open_stream(path, form.compression) as lines:
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
    except UNREADABLE as error:
        number += 1
        yield place(), cannot_decompress(error)


def _skip_line(lines: IO[bytes], limit: float) -> int:
    """Read to the end of the line, or past ``limit`` bytes, 1 MB at a time; returns the number of bytes."""
    skipped, piece = 0, b""
    while skipped < limit and not piece.endswith(b"\n") and (piece := lines.readline(1 << 20)):
        skipped += len(piece)
    return skipped


def _text_rows(span: Span, form: Form, column: str) -> Rows:
    for place, line in _lines(span, form, column):
        yield place, {column: line.removeprefix(BOM).rstrip(b"\r\n")} if isinstance(line, bytes) else line


def _json_rows(span: Span, form: Form, column: str) -> Rows:
    return (_value_rows if span.start == 0 and _holds_values(span.path, form) else _lines)(span, form, column)


def _holds_values(path: str, form: Form) -> bool:
    """Whether a file of JSON is an array, or objects over several lines, not one object per line."""
    if form.kind == "txt":
        return False
    head = _head(path, form).removeprefix(BOM).lstrip()
    # Each line of a .jsonl may be an array, so there only one of objects counts.
    return (form.kind == "json" and head[:1] == b"[") or re.match(rb"\{[ \t\r]*\n|\[\s*\{", head) is not None


def _value_rows(span: Span, form: Form, column: str) -> Rows:
    """The elements of an array, or values one after another; their places are numbers of values. Strings are texts."""
    number = 0
    try:
        with open_stream(span.path, form.compression) as stream:
            for number, value in enumerate(_values(io.TextIOWrapper(stream, "utf-8-sig")), start=1):
                yield f"{span.path}:{number}", {column: value} if isinstance(value, str) else value
    except UNREADABLE as error:
        yield f"{span.path}:{number + 1}", cannot_decompress(error)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or str(error)  # of a JSONDecodeError, without its place in the buffer
        yield f"{span.path}:{number + 1}", BadText(f"the rest of the file cannot be read as JSON ({reason})")


def _values(stream: IO[str]) -> Iterator[Any]:
    buffer, at, decode, between, closed = "", 0, json.JSONDecoder().raw_decode, re.compile(r"\s*"), True

    def fill() -> bool:
        nonlocal buffer, at
        piece = stream.read(max(CHUNK, len(buffer) - at))
        buffer, at = buffer[at:] + piece, 0
        return bool(piece)

    def following() -> str:
        """The first character after the separators; empty at the end of the file."""
        nonlocal at
        while (at := between.match(buffer, at).end()) == len(buffer) and fill():  # pyright: ignore[reportOptionalMemberAccess]
            pass
        return buffer[at : at + 1]

    if following() == "[":
        at, between, closed = at + 1, re.compile(r"[\s,]*"), False
    while (character := following()) and (closed or character != "]"):
        while True:
            try:
                value, at = decode(buffer, at)
                break
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(buffer) - len("-Infinity")
                if not cut or not fill():
                    raise
                if len(buffer) > 2 * MAX_VALUE:
                    raise ValueError(f"a value longer than {MAX_VALUE:,} characters") from None
        yield value
    if not closed:
        at += 1
        if not character or following():
            raise ValueError("the array is not closed" if not character else "text follows the array")


def _csv_rows(span: Span, form: Form, column: str) -> Rows:
    csv.field_size_limit(MAX_VALUE)
    number, header = 1, None
    try:
        with open_stream(span.path, form.compression) as stream:
            # Bad bytes become surrogates, which make only their own row a bad one.
            lines = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
            rows = csv.reader(lines, delimiter="\t" if form.kind == "tsv" else ",", strict=True)
            while True:
                number, row = rows.line_num + 1, None
                try:
                    row = next(rows)
                    if header is None:
                        header = named(row, column) and row
                        continue
                    if row and len(row) != len(header):
                        raise BadText(f"expected {len(header)} fields as in the header, got {len(row)}")
                    yield f"{span.path}:{number}", dict(zip(header, row, strict=True)) if row else {column: ""}
                except StopIteration:
                    return
                except csv.Error as error:  # an open quote takes the rows up to the next one
                    lines = f"; {rows.line_num + 1 - number:,} lines" if rows.line_num > number else ""
                    yield f"{span.path}:{number}", BadText(f"the row is not {form.kind.upper()} ({error}{lines})")
                except BadText as error:
                    yield f"{span.path}:{number}", error
                if header is None:
                    return
    except UNREADABLE as error:
        yield f"{span.path}:{number}", cannot_decompress(error)


READERS: dict[str, Callable[[Span, Form, str], Rows]] = {
    **dict.fromkeys(("json", "jsonl", "ndjson"), _json_rows),
    **dict.fromkeys(("csv", "tsv"), _csv_rows),
    **dict.fromkeys(("parquet", "arrow"), tables.rows),
    "txt": _text_rows,
    "mds": mds.rows,
}
