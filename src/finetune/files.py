"""Files of rows -> records: columns by name, each with its place in the file. Imports no torch.

    matching_files   a path, a pattern, a folder of one set, or a dataset of the hub -> files
    read_records     a file -> its records; an error names the file and the line
    class_names      the names that a file gives to its class numbers

The standard library reads CSV and JSON: pandas, pyarrow and ``datasets`` convert values ("NA", dates, "01"), drop or
shift values of a row of the wrong length, and name no file and row in an error.
"""

import contextlib
import csv
import functools
import glob
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from src.common import hub
from src.common.errors import DataError
from src.common.streams import UNREADABLE, damage, open_stream
from src.finetune import squad
from src.train.schema import nearest

Records = Iterator[tuple[int, Any]]
"""Line, or number of the row from 1, and the record, which should be a dict."""

COMPRESSIONS = {"gz": "gz", "bz2": "bz2", "xz": "xz", "zst": "zst", "zstd": "zst"}
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
"""Last bytes of Arrow's format of streams."""
CONLLU = "id form lemma upos xpos feats head deprel deps misc".split()
"""Columns of Universal Dependencies' format."""


class MissingColumn(DataError):
    """A file or a row lacks a column."""

    def __init__(self, place: str, column: str, known: Sequence[str]):
        super().__init__(f"{place}: no column {column!r}; {nearest(column, list(known))}")
        self.column = column


def matching_files(pattern: str) -> list[str]:
    """The files of a set, sorted by name.

    Args:
        pattern: a path, or a pattern of paths; a folder of one set, as ``datasets`` or Spark write it; or a dataset of
            the hub as ``hub.FORM`` names it.

    Raises:
        DataError: there is none, or a folder seems to have several sets.
    """
    if hub.is_dataset(pattern):
        return hub.dataset_files(pattern)
    if Path(pattern).is_dir():
        return _files_in(Path(pattern))
    found = [pattern] if Path(pattern).is_file() else sorted(filter(os.path.isfile, glob.glob(pattern)))
    if not found:
        raise DataError(f"{pattern}: no such file")
    return found


def _files_in(folder: Path) -> list[str]:
    if (folder / "dataset_dict.json").is_file():  # DatasetDict.save_to_disk
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        raise DataError(f"{folder}: it has the splits {', '.join(splits)}; name one, such as {folder / splits[0]}")
    if (folder / "state.json").is_file():  # Dataset.save_to_disk
        state = json.loads((folder / "state.json").read_text())
        return [str(folder / file["filename"]) for file in state["_data_files"]]
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name[0] not in "._")
    # By the letters that a name begins with: train-00000-of-00002.parquet and part-00000-1f3a.parquet are of one set.
    sets = {(re.split("[^A-Za-z]", file.name)[0], _form(file.name)[0]): str(file) for file in files}
    sets = {key: file for key, file in sets.items() if key[1] in READERS}
    if not sets:
        raise DataError(f"{folder}: no file that ends in {', '.join(READERS)}")
    if len(sets) > 1:
        raise DataError(f"{folder}: files of several sets, such as {' and '.join(sorted(sets.values())[:2])}; name one")
    return [str(file) for file in files if _form(file.name)[0] in READERS]


def file_hashes(pattern: str) -> list[str]:
    """SHA-256 of each of the files, in hex."""
    hashes = []
    for path in matching_files(pattern):
        with open(path, "rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashes


def _form(path: str) -> tuple[str, str]:
    """Suffix, such as .csv, and compression of a file, by its name."""
    stem, suffix = os.path.splitext(path.lower())
    compression = COMPRESSIONS.get(suffix[1:], "")
    return (os.path.splitext(stem)[1], compression) if compression else (suffix, "")


def read_records(path: str, columns: Sequence[str], of_words: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """The place (file and line, or number of the row) and the columns of each row.

    Args:
        columns: those that every row must have; the first one has the text.
        of_words: whether a text is a list of words.

    Raises:
        DataError: the file is of no known format, or damaged, or lacks a column, or has it twice.
    """
    suffix = _form(path)[0]
    if suffix not in READERS:
        raise DataError(f"{path}: expected a file name that ends in {', '.join(READERS)}")
    try:
        for number, record in READERS[suffix](path, columns, of_words):
            place = f"{path}:{number}"
            if not isinstance(record, dict):
                raise DataError(f"{place}: expected an object with columns, got {record!r:.40}")
            _check_columns(place, columns, list(record))
            yield place, record
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    except UNREADABLE as error:
        raise DataError(f"{path}: cannot be decompressed: {damage(error)}") from None


def _check_columns(place: str, columns: Iterable[str], known: Sequence[str]) -> None:
    for name in columns:
        if name not in known:
            raise MissingColumn(place, name, known)
        if known.count(name) > 1:
            raise DataError(f"{place}: {known.count(name)} columns have the name {name!r}; rename all but one")


@contextlib.contextmanager
def _text(path: str, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
    with open_stream(path, _form(path)[1]) as stream:
        yield io.TextIOWrapper(stream, "utf-8-sig", newline=newline)


def _read_separated(path: str, columns: Sequence[str], of_words: bool, **dialect: Any) -> Records:
    csv.field_size_limit(2**31 - 1)  # the default, 128 kB, is less than a long document
    with _text(path, newline="") as file:
        reader = csv.reader(file, strict=True, **dialect)
        try:
            header = next(reader, [])
            _check_columns(f"{path}:1", columns, header)
            for values in filter(None, reader):  # blank lines are skipped
                if len(values) != len(header):
                    raise csv.Error(f"expected {len(header)} values, as in the header, got {len(values)}")
                yield reader.line_num, dict(zip(header, values, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: {error}") from None


def _read_json(path: str, columns: Sequence[str], of_words: bool) -> Records:
    """One object per line; in .json also one value for the whole file."""

    def read(text: str) -> Any:
        return json.loads(text, object_pairs_hook=once)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):  # json would keep the last one
            names = [name for name, _ in pairs]
            for name in columns:
                if names.count(name) > 1:
                    raise ValueError(f"an object has the column {name!r} twice; rename one")
        return record

    place = path
    try:
        with _text(path) as file:
            if _form(path)[0] == ".json" and not _has_lines(file):
                yield from enumerate(_rows_of(read(file.read()), columns, of_words), start=1)
                return
            for number, line in enumerate(file, start=1):
                place = f"{path}:{number}"
                if line.strip():
                    yield number, read(line)
    except UnicodeDecodeError:  # a ValueError too, with a message of its own in ``read_records``
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON: {error}") from None


def _has_lines(file: io.TextIOWrapper) -> bool:
    """Whether a file of JSON has one object per line, and more than one; it is left at its beginning."""
    lines = filter(str.strip, file)
    first, second = next(lines, ""), next(lines, "")
    file.seek(0)
    try:
        return second != "" and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _rows_of(value: Any, columns: Sequence[str], of_words: bool) -> list[Any]:
    """The rows in the value of a file: a list, ``{"data": [...]}``, SQuAD's form, or columns as lists or from pandas.

    An object with these columns may also be one row, whose text is a list of words.
    """
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    if squad.is_squad(value):
        return list(squad.questions(value))
    found = [value[name] for name in columns if name in value]
    if len(found) < len(columns):
        return value["data"] if isinstance(value.get("data"), list) else [value]
    if all(isinstance(column, dict) for column in found):  # DataFrame.to_json(): by the index
        found = [list(column.values()) for column in found]
    is_row = of_words and all(isinstance(word, str) for word in found[0])
    if is_row or not all(isinstance(column, list) for column in found):
        return [value]
    if len({len(column) for column in found}) > 1:
        raise ValueError(f"its columns have {', '.join(str(len(column)) for column in found)} rows")
    return [dict(zip(columns, values, strict=True)) for values in zip(*found, strict=True)]


def _read_lines(path: str, columns: Sequence[str], of_words: bool) -> Records:
    """A text per line; for words, a word per line with its columns (``_read_conll``)."""
    if of_words:
        yield from _read_conll(path, columns, of_words)
        return
    with _text(path) as file:
        for number, line in enumerate(file, start=1):
            yield number, {columns[0]: line.rstrip("\n")}


def _read_conll(path: str, columns: Sequence[str], of_words: bool) -> Records:
    """A word per line, and a blank line after each sentence, as in the shared tasks of CoNLL.

    Columns are separated by tabs, or by blanks. They have numbers from 1; ``text`` is the first one, ``label`` the last
    one. Those of .conllu have their names, in small letters. -DOCSTART- and comments are skipped: lines that begin with
    # before the first word of a sentence, and have other columns than words or end in no label of a word.
    """
    if not of_words:
        raise DataError(f"{path}: has a word per line, which is for kind tokens")
    with _text(path) as file:
        lines = [(number, _values(line)) for number, line in enumerate(file, start=1)]
    blocks = [list(block) for has_values, block in itertools.groupby(lines, lambda line: line[1] != []) if has_values]
    words = [values for block in blocks for _, values in itertools.dropwhile(lambda line: line[1][0][:1] == "#", block)]
    width, labels = len(words[0]) if words else 0, {values[-1] for values in words}
    names = {str(i + 1): i for i in range(width)} | {"text": 0, "label": width - 1}
    if _form(path)[0] == ".conllu":
        names = {name: i for i, name in enumerate(CONLLU)}

    def is_comment(line: tuple[int, list[str]]) -> bool:
        other = len(line[1]) != width or (width > 1 and line[1][-1] not in labels)
        return line[1][0].startswith("#") and other

    def is_word(values: list[str]) -> bool:  # in .conllu "1-2" is a contraction of two words, "1.1" is not in the text
        return names.get("id") != 0 or not re.fullmatch(r"\d+[-.]\d+", values[0])

    for block in blocks:
        sentence = [line for line in itertools.dropwhile(is_comment, block) if is_word(line[1])]
        for number, values in sentence:
            if len(values) != width:
                raise DataError(f"{path}:{number}: expected {width} columns, as in other lines, got {len(values)}")
        if sentence:
            _check_columns(path, columns, list(names))
            yield sentence[0][0], {name: [values[names[name]] for _, values in sentence] for name in columns}


def _values(line: str) -> list[str]:
    """The columns of a line; none if it is blank, or begins a document."""
    line = line.rstrip("\r\n")
    if not line.strip() or line.startswith("-DOCSTART-"):
        return []
    return line.split("\t") if "\t" in line else re.split(" +", line.strip(" "))


def _read_table(path: str, columns: Sequence[str], of_words: bool) -> Records:
    import pyarrow

    try:
        with _table(path) as (schema, batches):
            _check_columns(path, columns, schema.names)
            records = (record for batch in batches(list(columns)) for record in batch.to_pylist())
            yield from enumerate(records, start=1)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as {_form(path)[0][1:]}: {error}") from None


@contextlib.contextmanager
def _table(path: str) -> Iterator[tuple[Any, Callable[[list[str]], Iterable[Any]]]]:
    """Schema and batches of a table: Parquet, or Arrow's format of streams, in which ``datasets`` writes."""
    import pyarrow.ipc
    import pyarrow.parquet

    if _form(path)[0] == ".parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file.schema_arrow, lambda columns: file.iter_batches(columns=columns)
        return
    with pyarrow.OSFile(path) as source, pyarrow.ipc.open_stream(source) as reader:

        def batches(columns: list[str]) -> Iterator[Any]:
            yield from (batch.select(columns) for batch in reader)
            source.seek(-len(END_OF_STREAM), os.SEEK_END)
            if source.read() != END_OF_STREAM:  # pyarrow takes a file that is cut between batches for a whole one
                raise OSError("it ends without the mark of its end, so rows may be missing")

        yield reader.schema, batches


def class_names(path: str) -> dict[str, list[str]]:
    """Names of class numbers by column: the features ClassLabel, also in lists, that ``datasets`` writes to a table."""
    if READERS.get(_form(path)[0]) is not _read_table:
        return {}
    import pyarrow

    with contextlib.suppress(pyarrow.ArrowException, OSError), _table(path) as (schema, _):  # reading it says why
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
        features = {column: _innermost(feature) for column, feature in info.get("features", {}).items()}
        return {column: feature["names"] for column, feature in features.items() if "names" in feature}
    return {}


def _innermost(feature: Any) -> dict[str, Any]:
    """The feature of the values in lists of any depth."""
    while isinstance(feature, list) or (isinstance(feature, dict) and "feature" in feature):
        feature = feature[0] if isinstance(feature, list) else feature["feature"]
    return feature if isinstance(feature, dict) else {}


READERS: dict[str, Callable[[str, Sequence[str], bool], Records]] = {
    ".csv": _read_separated,
    # Without quotes, as GLUE's own .tsv: a value holds neither tab nor line break, and " is a character.
    ".tsv": functools.partial(_read_separated, delimiter="\t", quoting=csv.QUOTE_NONE),
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_table,
    ".arrow": _read_table,
    ".txt": _read_lines,
    **dict.fromkeys((".conll", ".conllu", ".iob", ".iob2", ".bio"), _read_conll),
}
"""By the suffix of a file; those of text may be compressed."""
