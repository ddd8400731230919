"""Labelled files -> checked rows -> token ids -> batches.

    read_set      the rows of one set; an error names the file and the row
    read_sets     all sets of a task: train, validation, test
    encode        token ids and label numbers of a set
    collate       examples -> a padded batch

Nothing is cached: docs/finetune.md says what tokenizing costs.

CSV and JSON are read by the standard library. pandas, pyarrow and ``datasets`` convert values ("NA", dates, "01"), drop
or shift values of a row of the wrong length, and name no file and row in an error; ``datasets`` also writes a cache.
``collate`` is ours: transformers' collators return equal batches, but take 20 times as long, in the training process,
and pad on the tokenizer's side.
"""

import csv
import functools
import glob
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from src.common.errors import DataError
from src.data.microbatches import Batch
from src.finetune.config import LabelledData
from src.masked_lm_loss import IGNORED
from src.train.schema import nearest

Record = dict[str, Any]
"""A row of a file: values by column."""
Example = dict[str, Any]
"""``input_ids`` (L,) int32; ``token_type_ids`` (L,) int8 for pairs; ``labels``: int, float, or (L,) int64 for words."""

ROWS_AT_ONCE = 1000
"""Rows in one call of the tokenizer, whose output takes much memory."""


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


def matching_files(pattern: str) -> list[str]:
    """The file, or the files that match a pattern, sorted by name.

    Raises:
        DataError: no file matches.
    """
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


def read_records(pattern: str, columns: Sequence[str]) -> Iterator[tuple[str, Record]]:
    """Each row as (``file:number``, record), the number being a line, or a row where the format has no lines.

    Raises:
        DataError: a file is not in the format of its suffix, or lacks one of ``columns``; names the file and row.
    """
    for path in matching_files(pattern):
        suffix = Path(path).suffix.lower()
        if suffix not in READERS:
            raise DataError(f"{path}: expected a file name that ends in {', '.join(READERS)}")
        try:
            for number, record in READERS[suffix](path, columns):
                _check_columns(f"{path}:{number}", columns, list(record))
                yield f"{path}:{number}", record
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None


def _check_columns(place: str, columns: Sequence[str], known: list[str]) -> None:
    for name in columns:
        if name not in known:
            raise DataError(f"{place}: no column {name!r}; {nearest(name, known)}")


def _read_separated(path: str, columns: Sequence[str], **dialect: Any) -> Iterator[tuple[int, Record]]:
    csv.field_size_limit(2**31 - 1)  # the default, 128 kB, is less than a long document
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True, **dialect)
        try:
            header = next(reader, [])
            for values in filter(None, reader):  # blank lines are skipped
                if len(values) != len(header):
                    found = f"expected {len(header)} values, as in the header, got {len(values)}"
                    raise DataError(f"{path}:{reader.line_num}: {found}")
                yield reader.line_num, dict(zip(header, values, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: {error}") from None


def _read_json(path: str, columns: Sequence[str]) -> Iterator[tuple[int, Record]]:
    """A list of objects, or one object per line."""

    def parse(text: str, place: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: not JSON: {error}") from None

    with open(path, encoding="utf-8-sig") as file:
        is_list = file.read(4096).lstrip().startswith("[")
        file.seek(0)
        if is_list:
            numbered = enumerate(parse(file.read(), path), start=1)
        else:
            lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
            numbered = ((number, parse(line, f"{path}:{number}")) for number, line in lines)
        for number, record in numbered:
            if not isinstance(record, dict):
                raise DataError(f"{path}:{number}: expected an object with columns, got {record!r:.40}")
            yield number, record


def _read_parquet(path: str, columns: Sequence[str]) -> Iterator[tuple[int, Record]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        _check_columns(path, columns, file.schema_arrow.names)
        batches = file.iter_batches(columns=list(columns))
        yield from enumerate((record for batch in batches for record in batch.to_pylist()), start=1)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet: {error}") from None


READERS: dict[str, Callable[[str, Sequence[str]], Iterator[tuple[int, Record]]]] = {
    ".csv": _read_separated,
    # Without quotes, as GLUE's own .tsv: a value holds neither tab nor line break, and " is a character.
    ".tsv": functools.partial(_read_separated, delimiter="\t", quoting=csv.QUOTE_NONE),
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
}


# ----------------------------------------------------------------------------------------------------------------------
# Sets
# ----------------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A labelled text, or pair of texts."""

    text: Any
    """A text, or for ``tokens`` a list of words."""
    pair: str | None
    """The second text of a pair."""
    label: Any
    """A class as text, a number, or a list of tags as texts."""


def read_set(pattern: str, data: LabelledData) -> list[Row]:
    """Every row of a set's files.

    Raises:
        DataError: a file cannot be read, has no rows, or a value does not fit ``data``; names the file and row.
    """
    columns = [name for name in (data.text, data.text_pair, data.label) if name is not None]
    rows = []
    for place, record in read_records(pattern, columns):
        try:
            rows.append(_row(record, data))
        except ValueError as error:
            raise DataError(f"{place}: {error}") from None
    if not rows:
        raise DataError(f"{pattern}: no rows")
    return rows


def _row(record: Record, data: LabelledData) -> Row:
    """Raises ValueError if a value does not fit."""

    def fault(column: str, expected: str) -> ValueError:
        return ValueError(f"column {column!r}: expected {expected}, got {record[column]!r:.60}")

    def is_class(value: Any) -> bool:
        return isinstance(value, (str, int)) and value != ""

    text, label = record[data.text], record[data.label]
    if data.kind == "tokens":
        words, tags = (value.split() if isinstance(value, str) else value for value in (text, label))
        if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
            raise fault(data.text, "words")
        if not isinstance(tags, list) or len(tags) != len(words) or not all(map(is_class, tags)):
            raise fault(data.label, f"{len(words)} tags, one for each word")
        return Row(words, None, [str(tag) for tag in tags])
    for column in (data.text, data.text_pair):
        if column is not None and not isinstance(record[column], str):
            raise fault(column, "a text")
    if data.kind == "regression":
        try:
            label = float(label)
        except (TypeError, ValueError):
            label = math.nan
        if not math.isfinite(label):
            raise fault(data.label, "a number")
    elif not is_class(label):
        raise fault(data.label, "a class")
    else:
        label = str(label)
    return Row(text, None if data.text_pair is None else record[data.text_pair], label)


def hold_out(rows: list[Row], share: float) -> tuple[list[Row], list[Row]]:
    """Rows to train on and held-out rows, split by a hash of the text.

    Raises:
        DataError: one of them is empty.
    """
    parts: tuple[list[Row], list[Row]] = [], []
    for row in rows:
        texts = json.dumps([row.text] if row.pair is None else [row.text, row.pair])
        number = int.from_bytes(hashlib.sha256(texts.encode()).digest()[:8], "big")
        parts[number < share * 2**64].append(row)
    if not all(parts):
        raise DataError(f"validation: holding out {share} of {len(rows)} rows leaves one of the two sets empty")
    return parts


def read_sets(data: LabelledData) -> dict[str, list[Row]]:
    """All sets of a task by name: ``train``, ``validation`` or the names that ``data`` gives, ``test``."""
    train = read_set(data.train, data)
    if isinstance(data.validation, (int, float)):
        train, held_out = hold_out(train, data.validation)
        sets = {"train": train, "validation": held_out}
    else:
        named = data.validation if isinstance(data.validation, dict) else {"validation": data.validation}
        sets = {"train": train, **{name: read_set(files, data) for name, files in named.items()}}
    if data.test is not None:
        sets["test"] = read_set(data.test, data)
    return sets


def classes_of(data: LabelledData, sets: dict[str, list[Row]]) -> list[str]:
    """The classes in the order of their numbers; empty for regression.

    Raises:
        DataError: a set has a class that ``labels`` (by default: the training set) lacks, or the metrics do not fit the
            classes.
    """
    if data.kind == "regression":
        return []
    found = {
        name: {tag for row in rows for tag in (row.label if data.kind == "tokens" else [row.label])}
        for name, rows in sets.items()
    }
    classes = data.labels
    if classes is None:
        numbers = all(name.lstrip("-").isdecimal() for name in found["train"])
        classes = sorted(found["train"], key=int) if numbers else sorted(found["train"])
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
    metrics = data.metrics or []
    if "f1" in metrics and len(classes) != 2:
        raise DataError(f"metrics: f1 needs 2 classes, got {len(classes)}; macro_f1 takes any number")
    other = [name for name in classes if name != "O" and not name.startswith(("B-", "I-"))]
    if "entity_f1" in metrics and other:
        raise DataError(f"metrics: entity_f1 expects the tags B-X, I-X and O, got {other[0]!r}; accuracy takes any")
    return classes


# ----------------------------------------------------------------------------------------------------------------------
# Token ids
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Encoded:
    """A set as token ids."""

    examples: list[Example]
    cut: int
    """Rows longer than ``max_seq_len``, which lost their end."""
    unread: int
    """Labelled words that the model does not see: cut off, or without a word piece. No metric counts them."""


def encode(
    rows: Sequence[Row], classes: Sequence[str], kind: str, tokenizer: PreTrainedTokenizerFast, max_seq_len: int
) -> Encoded:
    """Token ids with special tokens, and labels as numbers, one example per row.

    The label of a word stands at its first word piece, IGNORED at the others. A pair that is too long loses the end of
    its longer text first.

    Raises:
        DataError: no word of a row has a word piece.
    """
    number = {name: i for i, name in enumerate(classes)}
    examples: list[Example] = []
    cut = unread = 0
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        is_pair = part[0].pair is not None
        encoded = tokenizer(
            [row.text for row in part],
            [row.pair for row in part] if is_pair else None,  # pyright: ignore[reportArgumentType]
            truncation=True,
            max_length=max_seq_len,
            is_split_into_words=kind == "tokens",
            return_token_type_ids=is_pair,
            return_attention_mask=False,
        )
        for row, encoding in zip(part, encoded.encodings or [], strict=True):
            example: Example = {"input_ids": np.array(encoding.ids, dtype=np.int32)}
            if is_pair:
                example["token_type_ids"] = np.array(encoding.type_ids, dtype=np.int8)
            if kind == "tokens":
                example["labels"] = _at_first_pieces([number[tag] for tag in row.label], encoding.word_ids)
                seen = int((example["labels"] != IGNORED).sum())
                if not seen:
                    place, words = f"row {len(examples) + 1}", " ".join(row.text)
                    raise DataError(f"{place}: the tokenizer makes no word piece of any of its words: {words!r}")
                unread += len(row.label) - seen
            else:
                example["labels"] = row.label if kind == "regression" else number[row.label]
            cut += bool(encoding.overflowing)
            examples.append(example)
    return Encoded(examples, cut, unread)


def _at_first_pieces(numbers: Sequence[int], word_ids: Sequence[int | None]) -> NDArray[np.int64]:
    """Labels (L,) of word pieces from those of words."""
    before = [None, *word_ids]
    firsts = [word is not None and word != last for word, last in zip(word_ids, before, strict=False)]
    labels = [numbers[word] if first else IGNORED for word, first in zip(word_ids, firsts, strict=True)]  # pyright: ignore
    return np.array(labels, dtype=np.int64)


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Examples -> a batch, padded on the right to its longest example.

    ``input_ids``, ``attention_mask`` and, for pairs, ``token_type_ids`` (B, S) int64; ``labels`` (B,) int64, (B,) fp32
    for regression, (B, S) int64 for words. MosaicBERT removes the padding again.
    """

    def pad(name: str, fill: int) -> torch.Tensor:
        rows = [torch.from_numpy(example[name]) for example in examples]
        return pad_sequence(rows, batch_first=True, padding_value=fill).long()

    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    batch: Batch = {"input_ids": pad("input_ids", pad_token_id)}
    batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    if "token_type_ids" in examples[0]:
        batch["token_type_ids"] = pad("token_type_ids", 0)
    if isinstance(examples[0]["labels"], np.ndarray):
        batch["labels"] = pad("labels", IGNORED)
    else:
        batch["labels"] = torch.tensor([example["labels"] for example in examples])
    return batch


def split_batch(batch: Batch, microbatch_size: int) -> list[Batch]:
    """Cut a batch into microbatches, each as long as its longest sequence."""
    parts = []
    for start in range(0, len(batch["labels"]), microbatch_size):
        part = {name: x[start : start + microbatch_size] for name, x in batch.items()}
        longest = int(part["attention_mask"].sum(dim=1).max())
        parts.append({name: x[:, :longest] if x.ndim == 2 else x for name, x in part.items()})
    return parts


def count_tokens(batch: Batch) -> dict[str, int]:
    """Non-padding tokens of a batch, and what its loss is the mean over: rows, or labelled words."""
    labels = batch["labels"]
    loss_generating = int((labels != IGNORED).sum()) if labels.ndim == 2 else len(labels)
    return {"total": int(batch["attention_mask"].sum()), "loss_generating": loss_generating}
