"""A kind of task: record -> row -> example -> batch -> outputs -> metrics and lines of predictions.

transformers' collators return the same batches as ``Kind.collate``, but take 20 times as long, and pad on the
tokenizer's side.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Encoding
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchmetrics import Metric
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from src.common.errors import DataError
from src.data.microbatches import Batch
from src.finetune.cells import read_list
from src.finetune.config import LabelledData
from src.finetune.progress import counted
from src.masked_lm_loss import IGNORED

Example = dict[str, Any]
"""``input_ids`` (L,) int32; ``token_type_ids`` (L,) int8 for pairs; ``labels``: int, float, or (L,) int64 for words."""

TEXT = "a text (empty_texts: true accepts an empty one)"
ROWS_AT_ONCE = 1000
"""Rows in one call of the tokenizer, whose output takes much memory."""


class Row(NamedTuple):
    """A labelled text, or pair of texts."""

    text: Any
    """A text, or for ``tokens`` a list of words."""
    pair: Any
    """The second text of a pair; None for single texts; for ``multiple_choice`` the list of choices."""
    label: Any
    """A class as text, a list of them, a number, or what the kind says."""


@dataclass
class Encoded:
    """A set as token ids."""

    examples: list[Example]
    cut: int = 0
    """Rows longer than ``max_seq_len``, which lost their end."""
    unread: int = 0
    """Labelled words that the model does not see: cut off, or without a word piece. No metric counts them."""


def check(fits: bool, place: str, record: dict[str, Any], column: str, expected: str) -> None:
    """Raise DataError that names the place and the column of a value that does not fit."""
    if not fits:
        raise DataError(f"{place}: column {column!r}: expected {expected}, got {record[column]!r:.60}")


def is_class(value: Any) -> bool:
    """Whether a value is the name or the number of a class."""
    return isinstance(value, (str, int)) and str(value).strip() != ""


def is_text(value: Any, data: LabelledData) -> bool:
    """Whether a value is a text that is not blank, or may be."""
    return isinstance(value, str) and (data.empty_texts or value.strip() != "")


def list_of(place: str, record: dict[str, Any], column: str, separator: str | None = None) -> Any:
    """A column's value; of a text the list that it holds (``read_list``)."""
    value = record[column]
    try:
        return read_list(value, separator) if isinstance(value, str) else value
    except ValueError as error:
        raise DataError(f"{place}: column {column!r}: expected a list, got {value!r:.60}: {error}") from None


def tokenized(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast, max_seq_len: int, **options: Any
) -> Iterator[tuple[Row, Encoding]]:
    """Each row with its tokens. A pair that is too long loses the end of its longer text first."""
    is_pair = rows[0].pair is not None
    for start in counted(range(0, len(rows), ROWS_AT_ONCE), "encoding, thousands of rows"):
        part = rows[start : start + ROWS_AT_ONCE]
        tokens = tokenizer(
            [row.text for row in part],
            [row.pair for row in part] if is_pair else None,  # pyright: ignore[reportArgumentType]
            truncation=True,
            max_length=max_seq_len,
            return_token_type_ids=is_pair,
            return_attention_mask=False,
            **options,
        )
        yield from zip(part, tokens.encodings or [], strict=True)


def ids_of(row: Row, encoding: Encoding) -> Example:
    """Token ids of a row, and of a pair also its segments."""
    example: Example = {"input_ids": np.array(encoding.ids, dtype=np.int32)}
    if row.pair is not None:
        example["token_type_ids"] = np.array(encoding.type_ids, dtype=np.int8)
    return example


class Kind:
    """A task of one kind. The methods here are those of a class for each text."""

    heads: Mapping[str, type[PreTrainedModel]]
    """Model classes, by kind of model."""
    metrics: Mapping[str, Callable[[list[str]], Metric]]
    """Functions of the classes, by the name in the YAML."""
    has_classes = True
    has_scores = True
    """Whether a prediction has a probability for each class, or choice."""
    of_tokens = ("input_ids", "attention_mask", "token_type_ids")
    """What in a batch has a value per token, in its last dimension."""
    suffix = ".txt"
    """Of the files of predictions."""

    def __init__(self, data: LabelledData):
        self.data = data

    def columns(self, labelled: bool = True) -> list[str]:
        """Columns that each record has, with or without those of the label; the first one has the text."""
        data = self.data
        labels = data.label_columns or [data.label]
        return [data.text, *([data.text_pair] if data.text_pair else []), *(labels if labelled else [])]

    def row(self, place: str, record: dict[str, Any]) -> Row:
        """A record of a file as a row; raises DataError, which begins with ``place``, if a value does not fit."""
        text, pair = self.texts(place, record)
        return Row(text, pair, self.label_of(place, record, text))

    def unlabelled(self, place: str, record: dict[str, Any]) -> Row:
        """As ``row``, of a record without a label; the row's is None, or what the kind needs (``blank_label``)."""
        return Row(*self.texts(place, record), None)

    def texts(self, place: str, record: dict[str, Any]) -> tuple[Any, Any]:
        """The text of a record and its second text, if the task is on pairs."""
        text, pair = self.data.text, self.data.text_pair
        for column in filter(None, (text, pair)):
            check(is_text(record[column], self.data), place, record, column, TEXT)
        return record[text], None if pair is None else record[pair]

    def label_of(self, place: str, record: dict[str, Any], text: Any) -> Any:
        """The label of a record, as in ``Row``."""
        check(is_class(record[self.data.label]), place, record, self.data.label, "a class")
        return str(record[self.data.label])

    def classes(self, row: Row) -> Sequence[str]:
        """The classes that a row has; none if the kind has no classes."""
        return [row.label] if self.has_classes else []

    def check_classes(self, classes: Sequence[str]) -> None:
        """Raise DataError if a metric does not fit the classes."""

    def head(self, classes: Sequence[str]) -> dict[str, Any]:
        """Settings of the model's config for these classes, by their names in the saved model."""
        return {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}

    def encode(
        self, rows: Sequence[Row], classes: Sequence[str], tokenizer: PreTrainedTokenizerFast, max_seq_len: int
    ) -> Encoded:
        """Token ids with special tokens, and labels as numbers, one example per row; may raise DataError."""
        number = {name: i for i, name in enumerate(classes)}
        encoded = Encoded([])
        for row, encoding in tokenized(rows, tokenizer, max_seq_len):
            encoded.examples.append({**ids_of(row, encoding), "labels": self.label(row, number)})
            encoded.cut += bool(encoding.overflowing)
        return encoded

    def label(self, row: Row, number: Mapping[str, int]) -> Any:
        """The label of a row's example, from the classes' numbers."""
        return number[row.label]

    def blank_label(self, row: Row, classes: Sequence[str]) -> Any:
        """A label for a row that has none, so that it can be encoded; predictions do not depend on it."""
        return classes[0]

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> Batch:
        """Examples -> a batch, padded on the right to its longest example.

        ``input_ids``, ``attention_mask`` and, for pairs, ``token_type_ids`` (B, S) int64; ``labels`` (B,) int64, (B,)
        fp32 for regression, (B, S) int64 for words. MosaicBERT removes the padding again.
        """
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        batch: Batch = {"attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long()}
        fills = {"input_ids": pad_token_id, "labels": IGNORED}
        for name in examples[0]:
            column = [torch.as_tensor(example[name]) for example in examples]
            if name in self.of_tokens:
                batch[name] = pad_sequence(column, batch_first=True, padding_value=fills.get(name, 0)).long()
            else:
                batch[name] = torch.stack(column)
        return batch

    def split_batch(self, batch: Batch, microbatch_size: int) -> list[Batch]:
        """Cut a batch into microbatches, each as long as its longest sequence."""
        parts = []
        for start in range(0, len(batch["input_ids"]), microbatch_size):
            part = {name: x[start : start + microbatch_size] for name, x in batch.items()}
            longest = int(part["attention_mask"].sum(dim=-1).max())
            cut = {name: part[name][..., :longest].contiguous() for name in self.of_tokens if name in part}
            parts.append({**part, **cut})
        return parts

    def size(self, example: Example) -> int:
        """Tokens of an example."""
        return len(example["input_ids"])

    def count_tokens(self, batch: Batch) -> dict[str, int]:
        """Non-padding tokens of a batch, and what its loss is the mean over."""
        return {"total": int(batch["attention_mask"].sum()), "loss_generating": self.count(batch)}

    def count(self, batch: Batch) -> int:
        """What the loss of a batch is the mean over: its rows."""
        return len(batch["input_ids"])

    def inputs(self, batch: Batch) -> Batch:
        """What of a batch the model takes."""
        return batch

    def loss(self, outputs: Any, batch: Batch, class_weights: Tensor | None = None) -> Tensor:
        """() fp32, mean over ``count``.

        With ``class_weights``, (classes,) fp32, the loss of each label is multiplied by the weight of its class. torch
        divides by the sum of the weights instead, so that they would have no effect in a batch of one row, or class.
        """
        if class_weights is None:
            return outputs["loss"]
        logits, labels = outputs["logits"].float().flatten(0, -2), batch["labels"].flatten()
        loss_sum = F.cross_entropy(logits, labels, class_weights, ignore_index=IGNORED, reduction="sum")
        return loss_sum / max(self.count(batch), 1)

    def predictions(self, outputs: Any) -> Tensor:
        """Class numbers, (B,) int64."""
        return outputs["logits"].argmax(dim=-1)

    def update_metric(self, metric: Metric, batch: Batch, outputs: Any) -> None:
        """Add a batch to a metric."""
        metric.update(self.predictions(outputs), batch["labels"])

    def lines(self, outputs: Sequence[Any], batches: Iterable[Batch], names: Sequence[str]) -> list[str]:
        """What is written for a set's predictions, a line per row in the file's order.

        Args:
            outputs: the model's, for each of ``batches``.
            names: the classes, in the order of their numbers.
        """
        shown = self._shown(outputs, batches, names)
        return [f"{one if isinstance(one, str) else json.dumps(one, ensure_ascii=False)}\n" for one in shown]

    def _shown(self, outputs: Sequence[Any], batches: Iterable[Batch], names: Sequence[str]) -> Iterator[Any]:
        for output, batch in zip(outputs, batches, strict=True):
            for predicted, label in zip(self.predictions(output), batch["labels"], strict=True):
                yield self.shown(predicted, label, names)

    def shown(self, predicted: Tensor, label: Tensor, names: Sequence[str]) -> Any:
        """A row's prediction: a text, or a value that is written as JSON."""
        return names[int(predicted)]

    def scored_lines(self, outputs: Sequence[Any], batches: Iterable[Batch], names: Sequence[str]) -> list[str]:
        """As ``lines``, each a JSON object with the prediction and the probability of each class."""
        lines = zip(self._shown(outputs, batches, names), self._scores(outputs, batches, names), strict=True)
        return [f"{json.dumps({'prediction': a, 'scores': b}, ensure_ascii=False)}\n" for a, b in lines]

    def _scores(self, outputs: Sequence[Any], batches: Iterable[Batch], names: Sequence[str]) -> Iterator[Any]:
        for output, batch in zip(outputs, batches, strict=True):
            for row, label in zip(self.probabilities(output).float(), batch["labels"], strict=True):
                yield self.scores(row, label, names)

    def probabilities(self, outputs: Any) -> Tensor:
        """Of each class, as ``logits``."""
        return outputs["logits"].float().softmax(dim=-1)

    def scores(self, probabilities: Tensor, label: Tensor, names: Sequence[str]) -> Any:
        """A row's probability of each class, (classes,), by its name."""
        return {name: round(p, 6) for name, p in zip(names, probabilities.tolist(), strict=True)}
