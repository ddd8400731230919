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
from src.finetune.kinds.base import Kind, Row, check, is_class, list_of
from src.masked_lm_loss import IGNORED


def accuracy(classes: list[str]) -> Metric:
    """Share of the labels that are predicted."""
    return MulticlassAccuracy(len(classes), average="micro", ignore_index=IGNORED)


def macro_f1(classes: list[str]) -> Metric:
    """Mean over the classes of their F1."""
    return MulticlassF1Score(len(classes), average="macro", ignore_index=IGNORED)


class Classification(Kind):
    """A class for each text."""

    heads = {"mosaic_bert": BertForSequenceClassification, "hf_bert": transformers.BertForSequenceClassification}
    metrics = {
        "accuracy": accuracy,
        "f1": lambda classes: BinaryF1Score(),
        "macro_f1": macro_f1,
        "matthews": lambda classes: MulticlassMatthewsCorrCoef(len(classes)),
    }

    def check_classes(self, classes: Sequence[str]) -> None:
        if "f1" in (self.data.metrics or []) and len(classes) != 2:
            raise DataError(f"metrics: f1 needs 2 classes, got {len(classes)}; macro_f1 takes any number")

    def head(self, classes: Sequence[str]) -> dict[str, Any]:
        return {**super().head(classes), "problem_type": "single_label_classification"}


BINARY = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}
"""What a column of ``label_columns`` may have; pandas makes numbers with a point of a column with gaps."""


class MultiLabel(Kind):
    """Any number of classes for each text: those with a probability above 0.5."""

    heads = Classification.heads
    metrics = {
        "micro_f1": lambda classes: MultilabelF1Score(len(classes), average="micro"),
        "macro_f1": lambda classes: MultilabelF1Score(len(classes), average="macro"),
        "subset_accuracy": lambda classes: MultilabelExactMatch(len(classes)),
    }

    def label_of(self, place: str, record: dict[str, Any], text: str) -> list[str]:
        columns = self.data.label_columns
        if columns is not None:
            for column in columns:
                check(str(record[column]).lower() in BINARY, place, record, column, "0 or 1")
            return [column for column in columns if BINARY[str(record[column]).lower()]]
        label = list_of(place, record, self.data.label, ",")
        fits = isinstance(label, list) and all(map(is_class, label))
        check(fits, place, record, self.data.label, "a list of classes")
        return list(dict.fromkeys(map(str, label)))

    def classes(self, row: Row) -> Sequence[str]:
        return row.label

    def head(self, classes: Sequence[str]) -> dict[str, Any]:
        return {**super().head(classes), "problem_type": "multi_label_classification"}

    def label(self, row: Row, number: Mapping[str, int]) -> Tensor:
        """(classes,) fp32, 1 for those that the row has."""
        label = torch.zeros(len(number))
        label[[number[name] for name in row.label]] = 1
        return label

    def blank_label(self, row: Row, classes: Sequence[str]) -> list[str]:
        return []

    def probabilities(self, outputs: Any) -> Tensor:
        return outputs["logits"].float().sigmoid()

    def predictions(self, outputs: Any) -> Tensor:
        """(B, classes) int64, 1 for predicted ones."""
        return (outputs["logits"] > 0).long()

    def update_metric(self, metric: Metric, batch: Batch, outputs: Any) -> None:
        metric.update(self.predictions(outputs), batch["labels"].long())

    def shown(self, predicted: Tensor, label: Tensor, names: Sequence[str]) -> list[str]:
        """The classes as a list, which is written as JSON: a name may have a comma."""
        return [names[int(number)] for number in predicted.nonzero()]


class Regression(Kind):
    """A number for each text."""

    heads = Classification.heads
    metrics = {
        "pearson": lambda classes: PearsonCorrCoef().set_dtype(torch.float64),
        "spearman": lambda classes: SpearmanCorrCoef(),
    }
    has_classes = has_scores = False

    def label_of(self, place: str, record: dict[str, Any], text: str) -> float:
        try:
            number = float(record[self.data.label])
        except (TypeError, ValueError):
            number = math.nan
        check(math.isfinite(number), place, record, self.data.label, "a number")
        return number

    def head(self, classes: Sequence[str]) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def blank_label(self, row: Row, classes: Sequence[str]) -> float:
        return 0.0

    def label(self, row: Row, number: Mapping[str, int]) -> float:
        return row.label

    def predictions(self, outputs: Any) -> Tensor:
        """The predicted numbers, (B,) fp64."""
        return outputs["logits"].squeeze(-1).double()

    def update_metric(self, metric: Metric, batch: Batch, outputs: Any) -> None:
        metric.update(self.predictions(outputs), batch["labels"].double())

    def shown(self, predicted: Tensor, label: Tensor, names: Sequence[str]) -> str:
        return f"{float(predicted):.6g}"
