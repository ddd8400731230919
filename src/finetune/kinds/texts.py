"""A class, several classes, or a number, for each text or pair of texts (Devlin et al., 2019, section 4.1)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
    MultilabelExactMatch,
    MultilabelF1Score,
)
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef

from src.bert_layers import BertForSequenceClassification
from src.common.errors import DataError
from src.data.microbatches import Batch
from src.finetune.config import LabelledData
from src.finetune.kinds.base import Kind, Row, check, is_class
from src.masked_lm_loss import IGNORED


def accuracy(classes: list[str]) -> Metric:
    """Share of the labels that are predicted."""
    return MulticlassAccuracy(len(classes), average="micro", ignore_index=IGNORED)


def macro_f1(classes: list[str]) -> Metric:
    """Mean over the classes of their F1."""
    return MulticlassF1Score(len(classes), average="macro", ignore_index=IGNORED)


def texts_of(place: str, record: dict[str, Any], data: LabelledData) -> tuple[str, str | None]:
    """The text of a record and its second text, if the task is on pairs."""
    for column in filter(None, (data.text, data.text_pair)):
        check(isinstance(record[column], str), place, record, column, "a text")
    return record[data.text], None if data.text_pair is None else record[data.text_pair]


class Classification(Kind):
    """A class for each text."""

    heads = {"mosaic_bert": BertForSequenceClassification, "hf_bert": transformers.BertForSequenceClassification}
    metrics = {
        "accuracy": accuracy,
        "f1": lambda classes: BinaryF1Score(),
        "macro_f1": macro_f1,
        "matthews": lambda classes: MulticlassMatthewsCorrCoef(len(classes)),
    }

    def row(self, place: str, record: dict[str, Any]) -> Row:
        texts = texts_of(place, record, self.data)
        check(is_class(record[self.data.label]), place, record, self.data.label, "a class")
        return Row(*texts, str(record[self.data.label]))

    def check_classes(self, classes: Sequence[str]) -> None:
        if "f1" in (self.data.metrics or []) and len(classes) != 2:
            raise DataError(f"metrics: f1 needs 2 classes, got {len(classes)}; macro_f1 takes any number")

    def head(self, classes: Sequence[str]) -> dict[str, Any]:
        return {**super().head(classes), "problem_type": "single_label_classification"}


class MultiLabel(Kind):
    """Any number of classes for each text: those with a probability above 0.5."""

    heads = Classification.heads
    metrics = {
        "micro_f1": lambda classes: MultilabelF1Score(len(classes), average="micro"),
        "macro_f1": lambda classes: MultilabelF1Score(len(classes), average="macro"),
        "subset_accuracy": lambda classes: MultilabelExactMatch(len(classes)),
    }

    def row(self, place: str, record: dict[str, Any]) -> Row:
        texts, label = texts_of(place, record, self.data), record[self.data.label]
        if isinstance(label, str):
            label = [part.strip() for part in label.split(",") if part.strip()]
        fits = isinstance(label, list) and all(map(is_class, label))
        check(fits, place, record, self.data.label, "a list of classes")
        return Row(*texts, [str(name) for name in label])

    def classes(self, row: Row) -> Sequence[str]:
        return row.label

    def head(self, classes: Sequence[str]) -> dict[str, Any]:
        return {**super().head(classes), "problem_type": "multi_label_classification"}

    def label(self, row: Row, number: Mapping[str, int]) -> Tensor:
        """(classes,) fp32, 1 for those that the row has."""
        label = torch.zeros(len(number))
        label[[number[name] for name in row.label]] = 1
        return label

    def predictions(self, outputs: Any) -> Tensor:
        """(B, classes) int64, 1 for predicted ones."""
        return (outputs["logits"] > 0).long()

    def update_metric(self, metric: Metric, batch: Batch, outputs: Any) -> None:
        metric.update(self.predictions(outputs), batch["labels"].long())

    def shown(self, predicted: Tensor, label: Tensor, names: Sequence[str]) -> str:
        return ",".join(names[int(number)] for number in predicted.nonzero())


class Regression(Kind):
    """A number for each text."""

    heads = Classification.heads
    metrics = {
        "pearson": lambda classes: PearsonCorrCoef().set_dtype(torch.float64),
        "spearman": lambda classes: SpearmanCorrCoef(),
    }
    has_classes = False

    def row(self, place: str, record: dict[str, Any]) -> Row:
        texts = texts_of(place, record, self.data)
        try:
            number = float(record[self.data.label])
        except (TypeError, ValueError):
            number = math.nan
        check(math.isfinite(number), place, record, self.data.label, "a number")
        return Row(*texts, number)

    def head(self, classes: Sequence[str]) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def label(self, row: Row, number: Mapping[str, int]) -> float:
        return row.label

    def predictions(self, outputs: Any) -> Tensor:
        """The predicted numbers, (B,) fp64."""
        return outputs["logits"].squeeze(-1).double()

    def update_metric(self, metric: Metric, batch: Batch, outputs: Any) -> None:
        metric.update(self.predictions(outputs), batch["labels"].double())

    def shown(self, predicted: Tensor, label: Tensor, names: Sequence[str]) -> str:
        return f"{float(predicted):.6g}"
