"""Labelled files -> checked rows -> token ids -> batches.

    read_sets     all sets of a task; an error names the file and the row
    encode        token ids and label numbers of a set
    collate       examples -> a padded batch

The standard library reads CSV and JSON: pandas, pyarrow and ``datasets`` convert values ("NA", dates, "01"), drop or
shift values of a row of the wrong length, and name no file and row in an error. transformers' collators return the same
batches as ``collate``, but take 20 times as long, and pad on the tokenizer's side.
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
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from src.common.errors import DataError
from src.data.microbatches import Batch
from src.finetune.config import LabelledData
from src.masked_lm_loss import IGNORED
from src.train.schema import nearest

Example = dict[str, Any]
"""``input_ids`` (L,) int32; ``token_type_ids`` (L,) int8 for pairs; ``labels``: int, float, or (L,) int64 for words."""

ROWS_AT_ONCE = 1000
"""Rows in one call of the tokenizer, whose output takes much memory."""


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
    """A list of objects, or one object per line."""
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
                    yield number, json.loads(line)
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
        DataError: a file is missing, empty or unreadable, lacks a column, or has a value that does not fit ``data``.
    """
    columns = [name for name in (data.text, data.text_pair, data.label) if name is not None]
    rows = []
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
                rows.append(_row(place, record, data))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    if not rows:
        raise DataError(f"{pattern}: no rows")
    return rows


def _row(place: str, record: dict[str, Any], data: LabelledData) -> Row:
    def check(fits: bool, column: str, expected: str) -> None:
        if not fits:
            raise DataError(f"{place}: column {column!r}: expected {expected}, got {record[column]!r:.60}")

    def is_class(value: Any) -> bool:
        return isinstance(value, (str, int)) and value != ""

    text, label = record[data.text], record[data.label]
    if data.kind == "tokens":
        words, tags = (value.split() if isinstance(value, str) else value for value in (text, label))
        fits = isinstance(words, list) and words != [] and all(isinstance(word, str) for word in words)
        check(fits, data.text, "words")
        fits = isinstance(tags, list) and len(tags) == len(words) and all(map(is_class, tags))
        check(fits, data.label, f"{len(words)} tags, one for each word")
        return Row(words, None, [str(tag) for tag in tags])
    pair = None if data.text_pair is None else record[data.text_pair]
    for column in filter(None, (data.text, data.text_pair)):
        check(isinstance(record[column], str), column, "a text")
    if data.kind == "classification":
        check(is_class(label), data.label, "a class")
        return Row(text, pair, str(label))
    try:
        number = float(label)
    except (TypeError, ValueError):
        number = math.nan
    check(math.isfinite(number), data.label, "a number")
    return Row(text, pair, number)


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
    if data.kind == "regression":
        return []
    found = {
        name: {tag for row in rows for tag in (row.label if data.kind == "tokens" else [row.label])}
        for name, rows in sets.items()
    }
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
    metrics = data.metrics or []
    if "f1" in metrics and len(classes) != 2:
        raise DataError(f"metrics: f1 needs 2 classes, got {len(classes)}; macro_f1 takes any number")
    other = [name for name in classes if name != "O" and not name.startswith(("B-", "I-"))]
    if "entity_f1" in metrics and other:
        raise DataError(f"metrics: entity_f1 expects the tags B-X, I-X and O, got {other[0]!r}; accuracy takes any")
    return classes


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

    The label of a word is at its first word piece, IGNORED at the others. A pair that is too long loses the end of its
    longer text first.

    Raises:
        DataError: no word of a row has a word piece.
    """
    number = {name: i for i, name in enumerate(classes)}
    is_pair = rows[0].pair is not None
    encoded = Encoded([], 0, 0)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        tokens = tokenizer(
            [row.text for row in part],
            [row.pair for row in part] if is_pair else None,  # pyright: ignore[reportArgumentType]
            truncation=True,
            max_length=max_seq_len,
            is_split_into_words=kind == "tokens",
            return_token_type_ids=is_pair,
            return_attention_mask=False,
        )
        for row, encoding in zip(part, tokens.encodings or [], strict=True):
            example: Example = {"input_ids": np.array(encoding.ids, dtype=np.int32)}
            if is_pair:
                example["token_type_ids"] = np.array(encoding.type_ids, dtype=np.int8)
            if kind == "tokens":
                # From the end, so that the first piece of a word is the last one written.
                first_piece = {word: i for i, word in reversed([*enumerate(encoding.word_ids)]) if word is not None}
                if not first_piece:
                    place, words = f"row {len(encoded.examples) + 1}", " ".join(row.text)
                    raise DataError(f"{place}: the tokenizer makes no word piece of any of its words: {words!r}")
                example["labels"] = np.full(len(encoding.ids), IGNORED, dtype=np.int64)
                for word, i in first_piece.items():
                    example["labels"][i] = number[row.label[word]]
                encoded.unread += len(row.label) - len(first_piece)
            else:
                example["labels"] = row.label if kind == "regression" else number[row.label]
            encoded.cut += bool(encoding.overflowing)
            encoded.examples.append(example)
    return encoded


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Examples -> a batch, padded on the right to its longest example.

    ``input_ids``, ``attention_mask`` and, for pairs, ``token_type_ids`` (B, S) int64; ``labels`` (B,) int64, (B,) fp32
    for regression, (B, S) int64 for words. MosaicBERT removes the padding again.
    """
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    batch: Batch = {"attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long()}
    fills = {"input_ids": pad_token_id, "token_type_ids": 0, "labels": IGNORED}
    for name in examples[0]:
        column = [torch.as_tensor(example[name]) for example in examples]
        if column[0].ndim:
            batch[name] = pad_sequence(column, batch_first=True, padding_value=fills[name]).long()
        else:
            batch[name] = torch.stack(column)
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
