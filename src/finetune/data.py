"""Labelled files -> checked rows; an error names the file and the row.

The standard library reads CSV and JSON: pandas, pyarrow and ``datasets`` convert values ("NA", dates, "01"), drop or
shift values of a row of the wrong length, and name no file and row in an error.
"""

import csv
import functools
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from src.common.errors import DataError
from src.finetune import squad
from src.finetune.config import LabelledData
from src.finetune.kinds import KINDS, Row
from src.train.schema import nearest


def matching_files(pattern: str) -> list[str]:
    """The file, or the files that match a pattern, sorted by name; raises DataError if there is none."""
    found = [pattern] if Path(pattern).is_file() else sorted(filter(os.path.isfile, glob.glob(pattern)))
    if not found:
        raise DataError(f"{pattern}: no such file")
    return found


def file_hashes(pattern: str) -> list[str]:
    """SHA-256 of each of the files, in hex."""
    hashes = []
    for path in matching_files(pattern):
        with open(path, "rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashes


def _check_columns(place: str, columns: Sequence[str], known: list[str]) -> None:
    for name in columns:
        if name not in known:
            raise DataError(f"{place}: no column {name!r}; {nearest(name, known)}")


def _read_separated(path: str, columns: Sequence[str], **dialect: Any) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default, 128 kB, is less than a long document
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True, **dialect)
        try:
            header = next(reader, [])
            for values in filter(None, reader):  # blank lines are skipped
                if len(values) != len(header):
                    raise csv.Error(f"expected {len(header)} values, as in the header, got {len(values)}")
                yield reader.line_num, dict(zip(header, values, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: {error}") from None


def _read_json(path: str, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """A list of objects, or one object per line; or SQuAD's form."""
    place = path
    try:
        with open(path, encoding="utf-8-sig") as file:
            is_list = file.read(4096).lstrip().startswith("[")
            file.seek(0)
            if is_list:
                yield from enumerate(json.loads(file.read()), start=1)
                return
            for number, line in enumerate(file, start=1):
                place = f"{path}:{number}"
                if line.strip():
                    value = json.loads(line)
                    yield from enumerate(squad.questions(value), 1) if squad.is_squad(value) else [(number, value)]
    except UnicodeDecodeError:  # a ValueError too, with a message of its own in ``read_set``
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON: {error}") from None


def _read_parquet(path: str, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        _check_columns(path, columns, file.schema_arrow.names)
        batches = file.iter_batches(columns=list(columns))
        yield from enumerate((record for batch in batches for record in batch.to_pylist()), start=1)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet: {error}") from None


READERS: dict[str, Callable[[str, Sequence[str]], Iterator[tuple[int, Any]]]] = {
    ".csv": _read_separated,
    # Without quotes, as GLUE's own .tsv: a value holds neither tab nor line break, and " is a character.
    ".tsv": functools.partial(_read_separated, delimiter="\t", quoting=csv.QUOTE_NONE),
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
}


def read_set(pattern: str, data: LabelledData) -> list[Row]:
    """Every row of a set's files.

    Raises:
        DataError: a file is missing, empty or unreadable, lacks a column, or has a value that does not fit ``data``.
    """
    kind, rows = KINDS[data.kind](data), []
    columns = kind.columns()
    for path in matching_files(pattern):
        suffix = Path(path).suffix.lower()
        if suffix not in READERS:
            raise DataError(f"{path}: expected a file name that ends in {', '.join(READERS)}")
        try:
            for number, record in READERS[suffix](path, columns):
                place = f"{path}:{number}"
                if not isinstance(record, dict):
                    raise DataError(f"{place}: expected an object with columns, got {record!r:.40}")
                _check_columns(place, columns, list(record))
                rows.append(kind.row(place, record))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    if not rows:
        raise DataError(f"{pattern}: no rows")
    return rows


def read_sets(data: LabelledData) -> dict[str, list[Row]]:
    """All sets of a task by name: ``train``, ``validation`` or the names that ``data`` gives, ``test``.

    Raises:
        DataError: as ``read_set``; or holding out a share of the rows leaves one of the two sets empty.
    """
    rows, files = read_set(data.train, data), data.validation
    if isinstance(files, (int, float)):
        parts: tuple[list[Row], list[Row]] = [], []
        for row in rows:
            texts = json.dumps([row.text] if row.pair is None else [row.text, row.pair])
            number = int.from_bytes(hashlib.sha256(texts.encode()).digest()[:8], "big")
            parts[number < files * 2**64].append(row)
        if not all(parts):
            raise DataError(f"validation: holding out {files} of {len(rows)} rows leaves one of the two sets empty")
        sets = {"train": parts[0], "validation": parts[1]}
    else:
        named = files if isinstance(files, dict) else {"validation": files}
        sets = {"train": rows, **{name: read_set(pattern, data) for name, pattern in named.items()}}
    if data.test is not None:
        sets["test"] = read_set(data.test, data)
    return sets


def classes_of(data: LabelledData, sets: dict[str, list[Row]]) -> list[str]:
    """The classes in the order of their numbers; empty for regression.

    Raises:
        DataError: a set has a class that ``labels`` (default: the training set) lacks, or a metric does not fit the
            classes.
    """
    kind = KINDS[data.kind](data)
    if not kind.has_classes:
        return []
    found = {name: {label for row in rows for label in kind.classes(row)} for name, rows in sets.items()}
    numbers = all(name.lstrip("-").isdecimal() for name in found["train"])
    classes = data.labels or sorted(found["train"], key=int if numbers else None)
    for name, there in found.items():
        unknown = sorted(there - set(classes))
        if unknown:
            of = "labels" if data.labels else "the training set"
            raise DataError(
                f"{name}: class {unknown[0]!r} is not in {of} ({', '.join(classes[:20])}). A test split with hidden "
                "labels, such as GLUE's, cannot be evaluated"
            )
    if len(classes) < 2:
        raise DataError(f"{data.train}: all rows have the class {classes[0]!r}; expected two classes or more")
    kind.check_classes(classes)
    return classes
