"""What all readers share: files and their forms by name, parts of files, rows and the errors in them."""

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

from src.common.errors import DataError
from src.common.streams import damage

COLUMNS = ("text", "timestamp", "url")
"""Names in a document. The text may have another name in its file."""

BATCH = 1024
"""Rows of a table that are Python objects at the same time."""


class BadText(DataError):
    """A line, or the rest of a file, that cannot be read."""


def cannot_decompress(error: Exception) -> BadText:
    """The error for the rest of a stream; raises errors of the disk and the network again."""
    return BadText(f"the rest of the file cannot be decompressed ({damage(error)})")


class Span(NamedTuple):
    """A part of a file.

    Files of lines: the lines that begin in bytes [start, stop). Parquet: row groups [start, stop). Others: the whole.
    """

    path: str
    start: int = 0
    stop: int | None = None


class Form(NamedTuple):
    """How a file holds its documents."""

    kind: str
    """One of KINDS."""
    compression: str = ""
    """gz, bz2, xz or zst; empty if the file is not compressed as a whole."""


KINDS = ("jsonl", "json", "ndjson", "csv", "tsv", "txt", "parquet", "arrow", "mds")
SUFFIXES = tuple(f".{kind}" for kind in KINDS)


def form_of(name: str) -> Form | None:
    """The form that the name of a file says, in any case; None if it is unknown."""
    name = name.lower()
    if "://" in name:
        name = name.split("?")[0]
    if match := re.search(r"\.mds(?:\.(gz|zstd|br|bz2|snappy))?$", name):
        return Form("mds", "gz" if match[1] == "gz" else "")  # the others weigh as none in the division of the work
    match = re.search(r"\.(jsonl?|ndjson|csv|tsv|txt)(?:\.(gz|bz2|xz|zstd?))?$|\.(parquet|arrow)$", name)
    return None if match is None else Form(match[1] or match[3], (match[2] or "").removesuffix("d"))


class File(NamedTuple):
    """One file of a source."""

    path: str
    """A local path, a URL, or a part of a dataset of the hub (``hub.files``)."""
    size: int
    """Bytes on disk; 1 GiB for a part of a dataset of the hub, 0 for a URL whose server does not tell."""
    changed: int | str
    """Time of the last change in nanoseconds; for a URL, what its server tells; 0 for the hub."""

    @property
    def text_bytes(self) -> int:
        """About how many bytes of text the file holds."""
        form = form_of(self.path) or Form("")
        return self.size * TEXT_BYTES.get(form.compression or form.kind, 1)


TEXT_BYTES = {"gz": 3, "bz2": 4, "xz": 4, "zst": 3, "parquet": 2}
"""Approximate bytes of text per byte of such a file, used only to divide the work."""


Rows = Iterator[tuple[str, Any]]
"""Places (file and line), each with its row, or with the error why it cannot be read.

A row is a dict, in which strings may be bytes of UTF-8, or a line of JSON as bytes."""


def outer(column: str, names: Collection[Any]) -> str:
    """The one of ``names`` that holds a column: itself, or ``a`` for the field ``a.b``, whether it is there or not."""
    return column if column in names else column.split(".")[0]


def missing(column: str, names: Iterable[Any]) -> BadText:
    """The error for a row or file that has only these columns."""
    there = ", ".join(map(str, names)) or "none"
    return BadText(f"expected a field {column!r} that holds a string; there are: {there} (--text_column names one)")


def named(names: list[str], column: str) -> list[str]:
    """The columns to read, of those of a table.

    Raises:
        BadText: the column of text is missing, or one to read occurs twice.
    """
    found = [name for name in (column, *COLUMNS[1:]) if name in names]
    if column not in found:
        if outer(column, names) not in names:
            raise missing(column, names)
        found.insert(0, column)  # a field of a column
    if repeated := [name for name in found if names.count(name) > 1]:
        raise BadText(f"there are {names.count(repeated[0])} columns {repeated[0]!r}; rename all but one")
    return found
