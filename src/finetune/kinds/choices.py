"""The right one of several choices (Devlin et al., 2019, section 4.4)."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torchmetrics import MeanMetric, Metric
from transformers import PreTrainedTokenizerFast

from src.bert_layers import BertForMultipleChoice
from src.data.microbatches import Batch
from src.finetune.kinds.base import Encoded, Example, Kind, Row, check, ids_of, list_of, tokenized


class MultipleChoice(Kind):
    """The right one of several choices: a text with each of them is a pair; ``text_pair`` is put before each choice."""

    heads = {"mosaic_bert": BertForMultipleChoice, "hf_bert": transformers.BertForMultipleChoice}
    metrics = {"accuracy": lambda classes: MeanMetric()}
    has_classes = False
    number: int | None = None
    """Of choices in each row of a file."""

    def columns(self, labelled: bool = True) -> list[str]:
        choices = self.data.choices
        return [*super().columns(labelled), *([choices] if isinstance(choices, str) else choices or [])]

    def texts(self, place: str, record: dict[str, Any]) -> tuple[str, list[str]]:
        """The text, and the choices, each after ``text_pair``."""
        text, question = super().texts(place, record)
        choices = self._choices(place, record)
        return text, [choice if question is None else f"{question} {choice}" for choice in choices]

    def label_of(self, place: str, record: dict[str, Any], text: str) -> int:
        """The number of the right choice."""
        label = record[self.data.label]
        choices = self._choices(place, record)
        names = [(i, str(i), chr(ord("A") + i), choice) for i, choice in enumerate(choices)]
        means = [i for i, name in enumerate(names) if label in name]
        check(
            len(means) == 1, place, record, self.data.label, "the number from 0, the letter or the text of one choice"
        )
        return means[0]

    def _choices(self, place: str, record: dict[str, Any]) -> list[str]:
        named = self.data.choices
        if isinstance(named, str):
            choices, column = list_of(place, record, named, "\n"), named
        else:
            choices, column = [record[name] for name in named or []], (named or [""])[0]
        fits = isinstance(choices, list) and len(choices) > 1 and all(isinstance(choice, str) for choice in choices)
        check(fits, place, record, column, "two or more choices")
        self.number = self.number or len(choices)
        check(len(choices) == self.number, place, record, column, f"{self.number} choices, as in the rows before")
        return choices

    def blank_label(self, row: Row, classes: Sequence[str]) -> int:
        return 0

    def head(self, classes: Sequence[str]) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": None}

    def encode(
        self, rows: Sequence[Row], classes: Sequence[str], tokenizer: PreTrainedTokenizerFast, max_seq_len: int
    ) -> Encoded:
        """As in ``Kind``; an example has its ``choices``, each with the token ids and segments of a pair."""
        encoded, pairs = Encoded([]), [Row(row.text, choice, None) for row in rows for choice in row.pair]
        each = tokenized(pairs, tokenizer, max_seq_len)
        for row in rows:
            parts = [next(each) for _ in row.pair]
            choices = [ids_of(pair, encoding) for pair, encoding in parts]
            encoded.examples.append({"choices": choices, "labels": row.label})
            encoded.cut += any(encoding.overflowing for _, encoding in parts)
        return encoded

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> Batch:
        """As in ``Kind``, with inputs (B, C, S); ``labels`` (B,) int64, the number of the right choice."""
        flat = super().collate([choice for example in examples for choice in example["choices"]], pad_token_id)
        batch = {name: x.unflatten(0, (len(examples), -1)) for name, x in flat.items()}
        return {**batch, "labels": torch.tensor([example["labels"] for example in examples])}

    def size(self, example: Example) -> int:
        return sum(map(super().size, example["choices"]))

    def update_metric(self, metric: Metric, batch: Batch, outputs: Any) -> None:
        metric.update((self.predictions(outputs) == batch["labels"]).float())

    def shown(self, predicted: Any, label: Any, names: Sequence[str]) -> str:
        """The number of the choice, from 0."""
        return str(int(predicted))

    def scores(self, probabilities: Any, label: Any, names: Sequence[str]) -> dict[str, float]:
        """Of each choice, by its number."""
        return super().scores(probabilities, label, [str(i) for i in range(len(probabilities))])
