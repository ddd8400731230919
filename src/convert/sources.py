"""Where text comes from: C4 on the hub, C4's own files, or yours; one document after another, whatever the size.

.json.gz, .jsonl.gz, .jsonl, .json    one JSON object a line, with a field "text"
.txt, .txt.gz                         one document a line
.parquet                              a column "text"
a folder with index.json              a split of MDS shards with a column "text"

A source is a sequence of files; a Span is what of a file one worker reads. ``units_of`` groups spans into shares of
work that depend on the source alone.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

Document = dict[str, str]
"""``text``, and where the source has them ``timestamp`` and ``url``."""

COLUMNS = ("text", "timestamp", "url")

SUFFIXES = (".json.gz", ".jsonl.gz", ".jsonl", ".json", ".txt", ".txt.gz", ".parquet")

C4_SPLITS = {"train": "train", "val": "validation"}
"""Our names of C4's splits, and its own."""

MAX_LINE = 1 << 31
"""Bytes. A longer line is bad: it would be held in memory several times over."""

TEXT_BYTES = {".gz": 3, ".parquet": 2}
"""Bytes of text in a byte of such a file, roughly: it shares out work and decides nothing else."""


class BadText(ValueError):
    """A line, or a file from some line on, that cannot be read; the message begins with where."""


@dataclass
class Counts:
    """What went by while documents were read."""

    documents: int = 0
    empty: int = 0
    """Documents of white space only; left out."""
    bad: int = 0
    """Lines, or rests of files, that could not be read; left out when bad ones are skipped."""
    first_bad: list[str] = field(default_factory=list)
    """The first few of them, with file and line."""


class File(NamedTuple):
    """One file of a source."""

    path: str
    size: int
    """Bytes on disk; for a file of the hub, which is not asked, 1 GiB."""
    changed: int
    """Time of the last change in nanoseconds; 0 for the hub."""


class Span(NamedTuple):
    """A part of a file, for one worker to read.

    Lines: those that begin in bytes [start, stop). Parquet: row groups [start, stop). Else the whole file.
    """

    path: str
    start: int = 0
    stop: int | None = None


# ----------------------------------------------------------------------------------------------------------------------
# Files and their parts
# ----------------------------------------------------------------------------------------------------------------------

HUB = "hub:"
"""A path of the hub is ``hub:split@revision#number``."""


def is_c4_folder(source: str) -> bool:
    """Whether this folder holds C4's own files."""
    return any(_c4_files(source, name) for name in C4_SPLITS.values())


def _c4_files(source: str, name: str) -> list[Path]:
    folder = Path(source)
    pattern = f"c4-{name}.*.json.gz"
    return sorted(folder.glob(pattern)) or sorted((folder / "en").glob(pattern))


def files_of(source: str | None, split: str = "train") -> Iterator[File]:
    """The files of a source in a fixed order; no more than one folder's names are in memory.

    Args:
        source: None for C4 on the Hugging Face hub, or a file, or a folder (read with its subfolders, in sorted order).
        split: ``train`` or ``val`` of C4; other sources have no splits.

    Raises:
        ValueError: the source is not there, or holds nothing that can be read.
    """
    if source is None:
        revision = _hub_revision()
        for number in range(_hub_dataset(split, revision).num_shards):
            yield File(f"{HUB}{split}@{revision}#{number}", 1 << 30, 0)
        return
    if is_c4_folder(source):
        paths: Iterable[Path] = _c4_files(source, C4_SPLITS[split])
        if not paths:
            raise ValueError(f"{source}: of C4's own files, those of this split (c4-{C4_SPLITS[split]}.*) are not here")
    elif not Path(source).exists():
        raise ValueError(f"{source}: there is no such file or folder")
    elif (Path(source) / "index.json").is_file():
        paths = _mds_files(Path(source))
    else:
        paths = [Path(source)] if Path(source).is_file() else _walk(source)
        paths = (path for path in paths if path.name.endswith(SUFFIXES))
    found = False
    for path in paths:
        found = True
        stat = path.stat()
        yield File(str(path), stat.st_size, stat.st_mtime_ns)
    if not found:
        raise ValueError(f"{source}: nothing here can be read; known are {', '.join(SUFFIXES)}, and MDS shards of text")


def _walk(folder: str) -> Iterator[Path]:
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path)
        elif entry.is_file():
            yield Path(entry.path)


def units_of(files: Iterable[File], size: int) -> Iterator[list[Span]]:
    """Shares of work of about ``size`` bytes of text: small files together, large ones in parts where they allow it.

    Nothing but the files and ``size`` decides which; gzip cannot be entered in its middle and is one part.
    """
    unit: list[Span] = []
    weight = 0
    for file in files:
        for span, bytes_of_text in _spans(file, size):
            if unit and weight + bytes_of_text > size:
                yield unit
                unit, weight = [], 0
            unit.append(span)
            weight += max(bytes_of_text, 4096)  # so that a unit of tiny files is no endless list
    if unit:
        yield unit


def text_bytes(file: File) -> int:
    """About how much text the file holds."""
    return file.size * TEXT_BYTES.get(os.path.splitext(file.path)[1], 1)


def _spans(file: File, size: int) -> Iterator[tuple[Span, int]]:
    weight = text_bytes(file)
    if weight <= size or file.path.endswith(".gz") or not file.path.endswith(SUFFIXES):  # the last: of the hub, or MDS
        yield Span(file.path), weight
    elif file.path.endswith(".parquet"):
        groups = _row_groups(file.path)
        for group in range(groups):
            yield Span(file.path, group, group + 1), weight // groups
        if not groups:  # broken: whoever reads it says so
            yield Span(file.path), weight
    else:
        for start in range(0, file.size, size):
            stop = min(start + size, file.size)
            yield Span(file.path, start, stop), stop - start


def _row_groups(path: str) -> int:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(path).num_row_groups
    except (pyarrow.ArrowInvalid, OSError):
        return 0


# ----------------------------------------------------------------------------------------------------------------------
# Documents
# ----------------------------------------------------------------------------------------------------------------------


def iter_documents(
    source: str | None = None, split: str = "train", skip_bad: bool = False, counts: Counts | None = None
) -> Iterator[Document]:
    """The documents of a source, in a fixed order.

    Args:
        source, split: as for ``files_of``.
        skip_bad: count and leave out what cannot be read, in place of raising.
        counts: filled in along the way.

    Raises:
        BadText: something cannot be read, and ``skip_bad`` is off.
        ValueError: the source is not there, or holds nothing that can be read.
    """
    counts = Counts() if counts is None else counts
    for file in files_of(source, split):
        for _, document in read(Span(file.path), skip_bad, counts):
            yield document


def read(span: Span, skip_bad: bool, counts: Counts) -> Iterator[tuple[str, Document]]:
    """The documents of a span, each with its place in the source, empty ones left out; errors as ``iter_documents``."""
    if span.path.startswith(HUB):
        items = _hub_documents(span.path)
    elif span.path.endswith(".parquet"):
        items = _parquet(span)
    elif span.path.endswith(SUFFIXES):
        items = _lines(span)
    else:
        items = _mds_documents(Path(span.path))
    for place, item in items:
        if isinstance(item, str):
            message = f"{place}: {item}"
            if not skip_bad:
                raise BadText(message)
            counts.bad += 1
            if len(counts.first_bad) < 5:
                counts.first_bad.append(message)
        elif not item["text"].strip():
            counts.empty += 1
        else:
            counts.documents += 1
            yield place, item


Item = tuple[str, Document | str]
"""A place and its document, or what is bad there."""


@cache
def _hub_revision() -> str:
    import huggingface_hub

    try:
        return str(huggingface_hub.dataset_info("allenai/c4").sha)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"C4 cannot be had from the hub ({error}); offline, give a source of files") from None


@cache
def _hub_dataset(split: str, revision: str) -> Any:
    from datasets import load_dataset  # takes seconds to import

    try:
        return load_dataset("allenai/c4", "en", split=C4_SPLITS[split], streaming=True, revision=revision)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"C4 cannot be had from the hub ({error}); offline, give a source of files") from None


def _hub_documents(path: str) -> Iterator[Item]:
    name, number = path.removeprefix(HUB).split("#")
    dataset = _hub_dataset(*name.split("@"))
    for row_number, row in enumerate(dataset.shard(num_shards=dataset.num_shards, index=int(number)), start=1):
        document = {name: str(row[name]) for name in COLUMNS if row.get(name) is not None}
        yield f"{path}:{row_number}", document


def _lines(span: Span) -> Iterator[Item]:
    """Those lines of a file that begin within the span."""
    path = span.path
    parse = _text_line if path.endswith((".txt", ".txt.gz")) else _json_line
    stop = float("inf") if span.stop is None else span.stop
    offset = number = 0

    def place() -> str:  # lines before the span are not counted: that would read them all
        return f"{path}:{number}" if span.start == 0 else f"{path}:byte {offset}"

    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as lines:
            if span.start:  # the line that runs into the span is its predecessor's
                offset = lines.seek(span.start - 1)
                while offset < stop and (piece := lines.readline(1 << 20)):
                    offset += len(piece)
                    if piece.endswith(b"\n"):
                        break
            while offset < stop and (line := lines.readline(MAX_LINE)):
                number += 1
                too_long = len(line) == MAX_LINE and not line.endswith(b"\n")
                try:
                    if too_long:
                        raise ValueError(f"a line of more than {MAX_LINE:,} bytes; cut it into several documents")
                    yield place(), parse(line)
                except ValueError as error:
                    yield place(), str(error)
                offset += len(line)
                while too_long and not line.endswith(b"\n") and (line := lines.readline(MAX_LINE)):
                    offset += len(line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        number += 1
        yield place(), f"the rest of the file cannot be unpacked ({error})"


def _text_line(line: bytes) -> Document:
    return {"text": _utf8(line).rstrip("\r\n")}


def _json_line(line: bytes) -> Document:
    text = _utf8(line)
    if not text.strip():
        return {"text": ""}
    try:
        row = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"no JSON ({error})") from None
    return _row(row)


def _utf8(line: bytes) -> str:
    try:
        return line.decode("utf-8-sig")  # Windows begins files with a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 ({error.reason} at byte {error.start})") from None


def _row(row: Any) -> Document:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError("no field 'text' that holds a text")
    document = {name: str(row[name]) for name in COLUMNS if row.get(name) is not None}
    try:
        "".join(document.values()).encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair; no file and no tokenizer takes it
        raise ValueError(f"no Unicode text ({error.reason})") from None
    return document


def _parquet(span: Span) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

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
                    yield f"{span.path}:{number}", _row({name: batch[name][i].as_py() for name in columns})
                except ValueError as error:
                    yield f"{span.path}:{number}", str(error)
    except (pyarrow.ArrowInvalid, OSError) as error:
        yield f"{span.path}:{number + 1}", f"the rest of the file cannot be read as parquet ({error})"


def _mds_files(folder: Path) -> list[Path]:
    """The shards of a split, in its order."""
    try:
        shards = json.loads((folder / "index.json").read_text())["shards"]
        names = [(shard["zip_data"] or shard["raw_data"])["basename"] for shard in shards]
        raw = [shard["raw_data"]["basename"] for shard in shards]
        columns = {name for shard in shards for name in shard["column_names"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'index.json'} is no index of MDS shards ({error!r})") from None
    if "text" not in columns:
        raise ValueError(f"{folder}: the shards have no column 'text' ({', '.join(sorted(columns))})")
    return [folder / (a if (folder / a).exists() else b) for a, b in zip(raw, names, strict=True)]


def _mds_documents(path: Path) -> Iterator[Item]:
    """A shard: a count, the offsets of all samples and of the end (uint32), the columns as JSON, the samples.

    Not by streaming's LocalDataset: it reads no compressed shard, decodes pickled columns, too, and notices no damage.
    """
    import numpy as np
    from streaming.base.compression import decompress
    from streaming.base.format.mds.encodings import mds_decode

    data = path.read_bytes()
    if path.suffix != ".mds":
        data = decompress(path.suffix[1:], data)
    (samples,) = np.frombuffer(data, "<u4", 1)
    offsets = np.frombuffer(data, "<u4", int(samples) + 1, 4).tolist()
    config = json.loads(data[4 * (int(samples) + 2) : offsets[0]])
    variable = [i for i, size in enumerate(config["column_sizes"]) if size is None]
    for number, (begin, end) in enumerate(zip(offsets, offsets[1:], strict=False), start=1):
        sizes = list(config["column_sizes"])
        for i, size in zip(variable, np.frombuffer(data, "<u4", len(variable), begin).tolist(), strict=True):
            sizes[i] = size
        at, row = begin + 4 * len(variable), {}
        for name, encoding, size in zip(config["column_names"], config["column_encodings"], sizes, strict=True):
            if name in COLUMNS:
                row[name] = mds_decode(encoding, data[at : at + size])
            at += size
        if at != end:
            raise ValueError(f"{path}:{number}: the sample ends at byte {at:,} and not at {end:,}: damaged")
        yield f"{path}:{number}", _row(row)
