"""Fine-tuned models as ComposerModels: a pretrained encoder, a head for a task, and its metrics."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from composer.models import ComposerModel
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from src.bert_layers import BertForSequenceClassification, BertForTokenClassification
from src.common.errors import CheckpointError, ConfigError
from src.data.microbatches import Batch
from src.data.tokenizer import load_tokenizer
from src.masked_lm_loss import IGNORED
from src.train import models, weights
from src.train.schema import Component

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "labels")


# ----------------------------------------------------------------------------------------------------------------------
# Metrics
# ----------------------------------------------------------------------------------------------------------------------


class EntityF1(Metric):
    """F1 of whole entities, micro-averaged, as conlleval counts them (Tjong Kim Sang and De Meulder, 2003).

    An entity is a run of tags B-X I-X ...; an I-X that follows something else begins one too. It is right if its type,
    its first and its last word are.
    """

    full_state_update = False
    right: Tensor
    predicted: Tensor
    real: Tensor

    def __init__(self, classes: list[str]):
        super().__init__()
        self.classes = classes
        for name in ("right", "predicted", "real"):
            self.add_state(name, default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add a batch: numbers of tags (B, S), of which those count whose label is not IGNORED."""
        for predicted, label in zip(predictions, labels, strict=True):
            counts = label != IGNORED
            ours, theirs = self._entities(predicted[counts]), self._entities(label[counts])
            self.right += len(ours & theirs)
            self.predicted += len(ours)
            self.real += len(theirs)

    def compute(self) -> Tensor:
        """() fp32; 0 where there is no entity at all."""
        return 2 * self.right / (self.predicted + self.real).clamp(min=1)

    def _entities(self, numbers: Tensor) -> set[tuple[str, int, int]]:
        """(type, first word, word after the last)."""
        found, kind, first = set(), None, 0
        for i, tag in enumerate([*(self.classes[n] for n in numbers.tolist()), "O"]):
            goes_on = tag == f"I-{kind}"
            if kind is not None and not goes_on:
                found.add((kind, first, i))
                kind = None
            if tag != "O" and not goes_on:
                kind, first = tag[2:], i
        return found


METRICS: dict[str, Callable[[list[str]], Metric]] = {
    "accuracy": lambda classes: MulticlassAccuracy(len(classes), average="micro", ignore_index=IGNORED),
    "entity_f1": EntityF1,
    "f1": lambda classes: BinaryF1Score(),
    "macro_f1": lambda classes: MulticlassF1Score(len(classes), average="macro", ignore_index=IGNORED),
    "matthews": lambda classes: MulticlassMatthewsCorrCoef(len(classes)),
    "pearson": lambda classes: PearsonCorrCoef().set_dtype(torch.float64),
    "spearman": lambda classes: SpearmanCorrCoef(),
}
"""torchmetrics' by our names; each is given the classes."""


class Classifier(ComposerModel):
    """A model with a head, trained by its own loss.

    Args:
        model: takes ``INPUTS`` by name, and gives ``loss`` and ``logits``.
        kind: of the task.
        metrics: for evaluation, by name; over all rows, whatever the batches.
    """

    def __init__(self, model: PreTrainedModel, kind: str, metrics: Mapping[str, Metric]):
        super().__init__()
        self.model = model
        self.kind = kind
        self.val_metrics = dict(metrics)

    def forward(self, batch: Batch) -> Any:
        """A padded batch of ``labelled.Collator``."""
        return self.model(**{name: batch[name] for name in INPUTS if name in batch})

    def loss(self, outputs: Any, batch: Batch, *args: Any, **kwargs: Any) -> Tensor:
        """() mean over the rows, or over the labelled words."""
        return outputs.loss

    def eval_forward(self, batch: Batch, outputs: Any | None = None) -> Any:
        """The forward pass."""
        return self(batch) if outputs is None else outputs

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        """Metrics by name; none in training."""
        return {} if is_train else self.val_metrics

    def predictions(self, logits: Tensor) -> Tensor:
        """Numbers of classes, (B,) or (B, S) int64; or the numbers of a regression, (B,) fp64."""
        return logits.squeeze(-1).double() if self.kind == "regression" else logits.argmax(dim=-1)

    def update_metric(self, batch: Batch, outputs: Any, metric: Metric) -> None:
        """Add a batch to a metric."""
        labels = batch["labels"].double() if self.kind == "regression" else batch["labels"]
        metric.update(self.predictions(outputs.logits), labels)


# ----------------------------------------------------------------------------------------------------------------------
# Models
# ----------------------------------------------------------------------------------------------------------------------

SEQUENCES = {
    "mosaic_bert": BertForSequenceClassification,
    "hf_bert": transformers.BertForSequenceClassification,
}
TOKENS = {"mosaic_bert": BertForTokenClassification, "hf_bert": transformers.BertForTokenClassification}
HEADS = {"classification": SEQUENCES, "regression": SEQUENCES, "tokens": TOKENS}
"""Model classes, by kind of task and kind of model."""


def build_model(
    component: Component,
    tokenizer: PreTrainedTokenizerFast,
    source: weights.Pretrained | None,
    kind: str,
    classes: list[str],
    max_seq_len: int,
) -> PreTrainedModel:
    """The model with a new head, on the CPU.

    Args:
        component: ``model`` of the YAML.
        source: weights of the encoder; None for fresh ones.
        kind, classes: of the task; ``classes`` as they are called in the saved model, none for regression.

    Raises:
        ConfigError: the weights do not fit, an option is unknown, or the model has too few positions.
    """
    if kind == "regression":
        head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    else:
        names = dict(enumerate(classes))
        head = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
        head["problem_type"] = "single_label_classification" if kind == "classification" else None
    options = models.read_options(component)
    model_class: type[PreTrainedModel] = HEADS[kind][component.name]
    try:
        if source is None:
            config = models.build_config(models.KINDS[component.name], options, tokenizer)
            for name, value in head.items():
                setattr(config, name, value)
            model = model_class(config)
        else:
            model = weights.load_pretrained(source, model_class, new_classifier=True, **options.for_config(), **head)
    except (ConfigError, CheckpointError):
        raise
    except ValueError as error:  # for example attention dropout, where no kernel has it
        raise ConfigError(f"model.{component.name}: {error}") from None
    models.check_positions(model.config, max_seq_len)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def read_tokenizer(source: weights.Pretrained | None, name: str | None) -> PreTrainedTokenizerFast:
    """The tokenizer that the weights were trained with; for fresh weights that of the name."""
    if source is not None:
        return weights.load_tokenizer(source, name)
    if name is None:
        raise ConfigError("tokenizer_name: missing; a model with fresh weights has no tokenizer of its own")
    return load_tokenizer(name)
