"""Where text comes from: C4 on the hub, C4's own files, or yours; one document after another, whatever the size.

.json.gz, .jsonl.gz, .jsonl, .json    one JSON object a line, with a field "text"
.txt, .txt.gz                         one document a line
.parquet                              a column "text"
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Document = dict[str, str]
"""``text``, and where the source has them ``timestamp`` and ``url``."""

COLUMNS = ("text", "timestamp", "url")

SUFFIXES = (".json.gz", ".jsonl.gz", ".jsonl", ".json", ".txt", ".txt.gz", ".parquet")

C4_SPLITS = {"train": "train", "val": "validation"}
"""Our names of C4's splits, and its own."""


class BadText(ValueError):
    """A line, or a file from some line on, that cannot be read; the message begins with ``file:line``."""


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


def is_c4_folder(source: str) -> bool:
    """Whether this folder holds C4's own files."""
    return any(_c4_files(source, name) for name in C4_SPLITS.values())


def _c4_files(source: str, name: str) -> list[Path]:
    folder = Path(source)
    pattern = f"c4-{name}.*.json.gz"
    return sorted(folder.glob(pattern)) or sorted((folder / "en").glob(pattern))


def iter_documents(
    source: str | None = None, split: str = "train", skip_bad: bool = False, counts: Counts | None = None
) -> Iterator[Document]:
    """The documents of a source, in a fixed order.

    Args:
        source: None for C4 on the Hugging Face hub, or a file, or a folder (read with its subfolders, in sorted order).
        split: ``train`` or ``val`` of C4; other sources have no splits.
        skip_bad: count and leave out what cannot be read, in place of raising.
        counts: filled in along the way.

    Raises:
        BadText: something cannot be read, and ``skip_bad`` is off.
        ValueError: the source is not there, or holds nothing that can be read.
    """
    counts = Counts() if counts is None else counts
    if source is None:
        raw = _hub_documents(split)
    elif is_c4_folder(source):
        files = _c4_files(source, C4_SPLITS[split])
        if not files:
            raise ValueError(f"{source}: of C4's own files, those of this split (c4-{C4_SPLITS[split]}.*) are not here")
        raw = _file_documents(files, skip_bad, counts)
    else:
        raw = _file_documents(find_files(source), skip_bad, counts)
    for document in raw:
        if not document["text"].strip():
            counts.empty += 1
            continue
        counts.documents += 1
        yield document


def find_files(source: str) -> list[Path]:
    """The files of a source that can be read."""
    path = Path(source)
    if not path.exists():
        raise ValueError(f"{source}: there is no such file or folder")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    files = [file for file in files if file.name.endswith(SUFFIXES)]
    if not files:
        raise ValueError(f"{source}: nothing here can be read; known are {', '.join(SUFFIXES)}")
    return files


def _hub_documents(split: str) -> Iterator[Document]:
    from datasets import load_dataset  # takes seconds to import

    try:
        dataset = load_dataset("allenai/c4", "en", split=C4_SPLITS[split], streaming=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"C4 cannot be had from the hub ({error}); offline, give files with --source") from None
    for row in dataset:
        yield {name: str(row[name]) for name in COLUMNS if row.get(name) is not None}  # pyright: ignore


def _file_documents(files: list[Path], skip_bad: bool, counts: Counts) -> Iterator[Document]:
    for file in files:
        for item in _parquet(file) if file.suffix == ".parquet" else _lines(file):
            if isinstance(item, BadText):
                if not skip_bad:
                    raise item
                counts.bad += 1
                if len(counts.first_bad) < 5:
                    counts.first_bad.append(str(item))
            else:
                yield item


def _lines(file: Path) -> Iterator[Document | BadText]:
    """Documents of a file of lines; what cannot be read as a BadText in its place."""
    parse = _text_line if file.name.endswith((".txt", ".txt.gz")) else _json_line
    number = 0
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    yield parse(line)
                except ValueError as error:
                    yield BadText(f"{file}:{number}: {error}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield BadText(f"{file}:{number + 1}: the rest of the file cannot be unpacked ({error})")


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


def _parquet(file: Path) -> Iterator[Document | BadText]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        reader = pyarrow.parquet.ParquetFile(file)
        columns = [name for name in COLUMNS if name in reader.schema_arrow.names]
        for batch in reader.iter_batches(batch_size=1024, columns=columns):
            for i in range(batch.num_rows):
                number += 1
                try:
                    yield _row({name: batch[name][i].as_py() for name in columns})
                except ValueError as error:
                    yield BadText(f"{file}:{number}: {error}")
    except (pyarrow.ArrowInvalid, OSError) as error:
        yield BadText(f"{file}:{number + 1}: the rest of the file cannot be read as parquet ({error})")
