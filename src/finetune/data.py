"""Labelled files: rows -> texts and labels, checked -> token ids -> batches.

    read_rows      a file's rows: .csv, .tsv, .json, .jsonl, .parquet
    read_set       the texts and labels of a set, each of the right kind, or the file and row that is not
    encode         their token ids and the numbers of their labels
    Collator       examples -> a padded batch

Nothing is cached: tokenizing takes less time than checking a cache would be worth (docs/finetune.md has the figures).
"""

import csv
import glob
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from src.common.errors import ConfigError
from src.data.microbatches import Batch
from src.finetune.config import LabelledData
from src.masked_lm_loss import IGNORED
from src.train.schema import nearest

Row = dict[str, Any]
Example = dict[str, Any]
"""``input_ids`` (L,) int32; ``token_type_ids`` (L,) int8 for pairs; ``labels``: int, float, or (L,) int64 for words."""

PIECE = 1000
"""Rows tokenized at once: the tokenizer's own objects take much memory."""


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


def files_of(pattern: str) -> list[str]:
    """The file, or the files of a pattern, by name.

    Raises:
        ConfigError: there is none.
    """
    found = [pattern] if Path(pattern).is_file() else sorted(filter(os.path.isfile, glob.glob(pattern)))
    if not found:
        raise ConfigError(f"{pattern}: there is no such file")
    return found


def file_hash(pattern: str) -> list[str]:
    """SHA-256 of each of the files, in hex."""
    hashes = []
    for path in files_of(pattern):
        with open(path, "rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashes


def read_rows(pattern: str, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """Each row as (``file:number``, values of ``columns``). Numbers are lines of the file, or rows where it has none.

    Raises:
        ConfigError: a file cannot be read as what its name says, or lacks a column; with the file and row.
    """
    for path in files_of(pattern):
        suffix = Path(path).suffix.lower()
        if suffix not in READERS:
            raise ConfigError(f"{path}: {', '.join(READERS)} are read, by the end of the name")
        try:
            for number, row in READERS[suffix](path, columns):
                lacking = [name for name in columns if name not in row]
                if lacking:
                    raise ConfigError(f"{path}:{number}: no column {lacking[0]!r}; {nearest(lacking[0], list(row))}")
                yield f"{path}:{number}", row
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: no UTF-8 ({error.reason} at byte {error.start})") from None


def _separated(path: str, columns: Sequence[str], **dialect: Any) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(2**31 - 1)  # the default, 128 kB, is less than a long document
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True, **dialect)
        try:
            header = next(reader, [])
            for values in reader:
                if values and len(values) != len(header):
                    found = f"{len(values)} values for the {len(header)} columns of the first line"
                    raise ConfigError(f"{path}:{reader.line_num}: {found}")
                if values:
                    yield reader.line_num, dict(zip(header, values, strict=True))
        except csv.Error as error:
            raise ConfigError(f"{path}:{reader.line_num}: {error}") from None


def _csv(path: str, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
    return _separated(path, columns)


def _tsv(path: str, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
    """Without quotes, as GLUE's own .tsv: a value holds neither tab nor line break, and " is a character."""
    return _separated(path, columns, delimiter="\t", quoting=csv.QUOTE_NONE)


def _json(path: str, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
    """A list of objects, or an object a line."""
    with open(path, encoding="utf-8-sig") as file:
        while (first := file.read(1)).isspace():
            pass
        file.seek(0)
        if first != "[":
            yield from _json_lines(path, columns)
            return
        try:
            rows = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: no JSON ({error})") from None
    for number, row in enumerate(rows, start=1):
        yield number, _object(path, number, row)


def _json_lines(path: str, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
    with open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ConfigError(f"{path}:{number}: no JSON ({error})") from None
                yield number, _object(path, number, row)


def _object(path: str, number: int, row: Any) -> Row:
    if not isinstance(row, dict):
        raise ConfigError(f"{path}:{number}: an object with columns is wanted here, not {str(row)[:40]!r}")
    return row


def _parquet(path: str, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        reader = pyarrow.parquet.ParquetFile(path)
        known = reader.schema_arrow.names
        lacking = [name for name in columns if name not in known]
        if lacking:
            raise ConfigError(f"{path}: no column {lacking[0]!r}; {nearest(lacking[0], known)}")
        number = 0
        for batch in reader.iter_batches(columns=list(columns)):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as parquet ({error})") from None


READERS: dict[str, Callable[[str, Sequence[str]], Iterator[tuple[int, Row]]]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".json": _json,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}


# ----------------------------------------------------------------------------------------------------------------------
# Sets
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """Texts and labels of a set, as they stand in its files."""

    texts: list[Any] = field(default_factory=list)
    """Texts, or lists of words."""
    pairs: list[str] = field(default_factory=list)
    """Second texts; empty without."""
    labels: list[Any] = field(default_factory=list)
    """Classes as texts, numbers, or lists of tags as texts."""

    def take(self, keep: Sequence[bool]) -> "Rows":
        """Those rows that ``keep`` names."""

        def some(values: list[Any]) -> list[Any]:
            return [value for value, kept in zip(values, keep, strict=True) if kept]

        return Rows(some(self.texts), some(self.pairs) if self.pairs else [], some(self.labels))


def read_set(pattern: str, data: LabelledData) -> Rows:
    """The rows of a set's files, each of them.

    Raises:
        ConfigError: there is no row, or a text or label is missing or of the wrong kind; with the file and row.
    """
    columns = [name for name in (data.text, data.text_pair, data.label) if name is not None]
    rows = Rows()
    for place, row in read_rows(pattern, columns):
        try:
            text = _words(row[data.text], data.text) if data.kind == "tokens" else _text(row[data.text], data.text)
            rows.texts.append(text)
            if data.text_pair is not None:
                rows.pairs.append(_text(row[data.text_pair], data.text_pair))
            rows.labels.append(_label(row[data.label], text, data))
        except ValueError as error:
            raise ConfigError(f"{place}: {error}") from None
    if not rows.texts:
        raise ConfigError(f"{pattern}: holds no row")
    return rows


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} holds no text but {value!r}")
    return value


def _words(value: Any, column: str) -> list[str]:
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise ValueError(f"column {column!r} holds no words but {str(value)[:40]!r}")
    return words


def _label(value: Any, text: Any, data: LabelledData) -> Any:
    if data.kind == "regression":
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"column {data.label!r} holds no number but {value!r}")
        return number
    if data.kind == "tokens":
        tags = value.split() if isinstance(value, str) else value
        if not isinstance(tags, list) or len(tags) != len(text):
            given = len(tags) if isinstance(tags, list) else repr(value)
            raise ValueError(f"column {data.label!r} holds not a tag for each of {len(text)} words but {given}")
        return [_class(tag, data.label) for tag in tags]
    return _class(value, data.label)


def _class(value: Any, column: str) -> str:
    if not isinstance(value, (str, int)) or value == "":
        raise ValueError(f"column {column!r} holds no class but {value!r}")
    return str(value)


def hold_out(rows: Rows, share: float) -> tuple[Rows, Rows]:
    """Rows to train on and held-out ones, by a hash of the text.

    Raises:
        ConfigError: one of them is empty.
    """
    held_out = []
    for i, text in enumerate(rows.texts):
        whole = json.dumps([text, *rows.pairs[i : i + 1]]).encode()
        held_out.append(int.from_bytes(hashlib.sha256(whole).digest()[:8], "big") < share * 2**64)
    if len(set(held_out)) < 2:
        raise ConfigError(f"validation: holding out {share} of {len(held_out)} rows leaves nothing on one side")
    return rows.take([not held for held in held_out]), rows.take(held_out)


def read_sets(data: LabelledData) -> dict[str, Rows]:
    """All sets of a task by name: ``train``, ``validation`` or those that have names of their own, ``test``."""
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


def classes_of(data: LabelledData, sets: dict[str, Rows]) -> list[str]:
    """The classes in the order of their numbers; none for regression.

    Raises:
        ConfigError: a set has a class that ``labels``, or without them the training rows, lack; or the metrics do not
            fit the classes.
    """
    if data.kind == "regression":
        return []

    def found(rows: Rows) -> set[str]:
        return {tag for tags in rows.labels for tag in tags} if data.kind == "tokens" else set(rows.labels)

    classes = data.labels
    if classes is None:
        trained = found(sets["train"])
        numbers = all(name.lstrip("-").isdecimal() for name in trained)
        classes = sorted(trained, key=int) if numbers else sorted(trained)
    for name, rows in sets.items():
        unknown = sorted(found(rows) - set(classes))
        if unknown:
            of = "labels" if data.labels else "the training rows"
            raise ConfigError(
                f"{name}: the class {unknown[0]!r} is none of {of} ({', '.join(classes[:20])}). A test split whose "
                "labels are hidden, as GLUE's are, cannot be evaluated"
            )
    if len(classes) < 2:
        raise ConfigError(f"{data.train}: all rows have the class {classes[0]!r}; there is nothing to learn")
    metrics = data.metrics or []
    if "f1" in metrics and len(classes) != 2:
        raise ConfigError(f"metrics: f1 is of two classes, and here are {len(classes)}; macro_f1 is the mean over them")
    odd = [name for name in classes if name != "O" and not name.startswith(("B-", "I-"))]
    if "entity_f1" in metrics and odd:
        raise ConfigError(f"metrics: entity_f1 reads tags B-…, I-… and O, and {odd[0]!r} is none; accuracy reads any")
    return classes


# ----------------------------------------------------------------------------------------------------------------------
# Token ids
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Encoded:
    """A set as token ids."""

    examples: list[Example]
    cut: int
    """Rows that are longer than ``max_seq_len`` and lost their end."""
    unread: int
    """Labelled words that the model does not see, because they were cut off or have no piece; no metric counts them."""


def encode(
    rows: Rows, classes: Sequence[str], kind: str, tokenizer: PreTrainedTokenizerFast, max_seq_len: int
) -> Encoded:
    """Token ids, special tokens included, and labels as numbers, row for row.

    A word's number stands at its first piece, IGNORED at the others. Of a pair that is too long, the longer text loses
    its end first.

    Raises:
        ConfigError: none of a row's words has a piece.
    """
    number = {name: i for i, name in enumerate(classes)}
    examples: list[Example] = []
    cut = unread = 0
    for start in range(0, len(rows.texts), PIECE):
        part = slice(start, start + PIECE)
        encoded = tokenizer(
            rows.texts[part],
            rows.pairs[part] or None,
            truncation=True,
            max_length=max_seq_len,
            is_split_into_words=kind == "tokens",
            return_token_type_ids=bool(rows.pairs),
            return_attention_mask=False,
        )
        for i, encoding in enumerate(encoded.encodings or []):
            example: Example = {"input_ids": np.array(encoding.ids, dtype=np.int32)}
            if rows.pairs:
                example["token_type_ids"] = np.array(encoding.type_ids, dtype=np.int8)
            label = rows.labels[start + i]
            if kind == "tokens":
                example["labels"], seen = _first_pieces(encoding.word_ids, [number[tag] for tag in label])
                if not seen:
                    words = " ".join(rows.texts[start + i])
                    raise ConfigError(
                        f"row {start + i + 1}: the tokenizer makes no piece of any of its words: {words!r}"
                    )
                unread += len(label) - seen
            else:
                example["labels"] = label if kind == "regression" else number[label]
            cut += bool(encoding.overflowing)
            examples.append(example)
    return Encoded(examples, cut, unread)


def _first_pieces(word_ids: Sequence[int | None], numbers: Sequence[int]) -> tuple[NDArray[np.int64], int]:
    """Labels (L,) of the pieces, and how many words have one."""
    labels, before, seen = np.full(len(word_ids), IGNORED, dtype=np.int64), None, 0
    for i, word in enumerate(word_ids):
        if word is not None and word != before:
            labels[i] = numbers[word]
            seen += 1
        before = word
    return labels, seen


class Collator:
    """Examples -> a padded batch of torch tensors, S the longest of them.

    ``input_ids``, ``attention_mask`` and, for pairs, ``token_type_ids`` (B, S) int64; ``labels`` (B,) int64, (B,) fp32
    for regression, (B, S) int64 for words. MosaicBERT takes the padding away again by itself.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[Example]) -> Batch:
        lengths = [len(example["input_ids"]) for example in examples]

        def pad(name: str, fill: int) -> torch.Tensor:
            padded = np.full((len(examples), max(lengths)), fill, dtype=np.int64)
            for row, example in zip(padded, examples, strict=True):
                row[: len(example[name])] = example[name]
            return torch.from_numpy(padded)

        batch: Batch = {"input_ids": pad("input_ids", self.pad_token_id)}
        batch["attention_mask"] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        if "token_type_ids" in examples[0]:
            batch["token_type_ids"] = pad("token_type_ids", 0)
        if isinstance(examples[0]["labels"], np.ndarray):
            batch["labels"] = pad("labels", IGNORED)
        else:
            batch["labels"] = torch.tensor([example["labels"] for example in examples])
        return batch


def split_batch(batch: Batch, microbatch_size: int) -> list[Batch]:
    """Cut a batch into microbatches, each no longer than its longest sequence."""
    parts = []
    for start in range(0, len(batch["labels"]), microbatch_size):
        part = {name: x[start : start + microbatch_size] for name, x in batch.items()}
        longest = int(part["attention_mask"].sum(dim=1).max())
        parts.append({name: x[:, :longest] if x.ndim == 2 else x for name, x in part.items()})
    return parts


def counts(batch: Batch) -> dict[str, int]:
    """Real tokens of a batch, and what its loss is the mean over: rows, or labelled words."""
    labels = batch["labels"]
    loss_generating = int((labels != IGNORED).sum()) if labels.ndim == 2 else len(labels)
    return {"total": int(batch["attention_mask"].sum()), "loss_generating": loss_generating}
