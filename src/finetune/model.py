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
from src.common.errors import CheckpointError, ConfigError, first_line
from src.data.microbatches import Batch
from src.data.tokenizer import load_tokenizer
from src.finetune.config import FinetuneConfig
from src.masked_lm_loss import IGNORED
from src.train import models, weights
from src.train.schema import Component


class EntityF1(Metric):
    """Micro-averaged F1 of whole entities, as conlleval counts them (Tjong Kim Sang and De Meulder, 2003).

    An entity is a sequence of tags B-X I-X ...; an I-X after another tag also begins one. It is correct if its type,
    first word and last word are. torchmetrics has none.
    """

    full_state_update = False
    counts: Tensor
    """(3,) int64: correct, predicted and actual entities."""

    def __init__(self, classes: list[str]):
        super().__init__()
        self.classes = classes
        self.add_state("counts", default=torch.zeros(3, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add a batch of tag numbers, (B, S) each; positions with the label IGNORED do not count."""
        for predicted, label in zip(predictions, labels, strict=True):
            counted = label != IGNORED
            ours, theirs = self.entities(predicted[counted]), self.entities(label[counted])
            self.counts += self.counts.new_tensor([len(ours & theirs), len(ours), len(theirs)])

    def compute(self) -> Tensor:
        """() fp32; 0 if there is no entity."""
        return 2 * self.counts[0] / self.counts[1:].sum().clamp(min=1)

    def entities(self, numbers: Tensor) -> set[tuple[str, int, int]]:
        """(type, first word, word after the last) of each entity in the tags (words,)."""
        found, kind, first = set(), None, 0
        for i, tag in enumerate([*(self.classes[n] for n in numbers.tolist()), "O"]):
            continues = tag == f"I-{kind}"
            if kind is not None and not continues:
                found.add((kind, first, i))
                kind = None
            if tag != "O" and not continues:
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
"""Functions of the classes, by the name in the YAML."""


class Classifier(ComposerModel):
    """A Hugging Face model with a head for one kind of task; ``metrics``, by name, are for evaluation."""

    def __init__(self, model: PreTrainedModel, kind: str, metrics: Mapping[str, Metric]):
        super().__init__()
        self.model, self.kind, self.val_metrics = model, kind, dict(metrics)

    def forward(self, batch: Batch) -> Any:
        """Loss and logits of a padded batch (``data.collate``)."""
        return self.model(**batch)

    def loss(self, outputs: Any, batch: Batch, *args: Any, **kwargs: Any) -> Tensor:
        """() fp32, mean over the rows, or over the labelled words."""
        return outputs.loss

    def eval_forward(self, batch: Batch, outputs: Any | None = None) -> Any:
        return self(batch) if outputs is None else outputs

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        return {} if is_train else self.val_metrics

    def predictions(self, logits: Tensor) -> Tensor:
        """Class numbers, (B,) or (B, S) int64; for regression the predicted numbers, (B,) fp64."""
        return logits.squeeze(-1).double() if self.kind == "regression" else logits.argmax(dim=-1)

    def update_metric(self, batch: Batch, outputs: Any, metric: Metric) -> None:
        labels = batch["labels"].double() if self.kind == "regression" else batch["labels"]
        metric.update(self.predictions(outputs.logits), labels)


TEXTS = {"mosaic_bert": BertForSequenceClassification, "hf_bert": transformers.BertForSequenceClassification}
TOKENS = {"mosaic_bert": BertForTokenClassification, "hf_bert": transformers.BertForTokenClassification}
HEADS = {"classification": TEXTS, "regression": TEXTS, "tokens": TOKENS}
"""Model classes, by kind of task and kind of model."""


def build_model(
    component: Component,
    tokenizer: PreTrainedTokenizerFast,
    source: weights.Pretrained | None,
    kind: str,
    classes: list[str],
    max_seq_len: int,
) -> PreTrainedModel:
    """The model with a newly initialised head for a ``kind`` of task, on the CPU.

    Args:
        component: ``model`` of the YAML.
        source: weights of the encoder; None for random ones.
        classes: their names in the saved model, in the order of their numbers; empty for regression.

    Raises:
        ValueError: the weights do not fit, an option is unknown, or the model has too few positions.
    """
    if kind == "regression":
        head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    else:
        head = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
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
            given = {**(options.model_config or {}), **head}
            model = weights.load_pretrained(source, model_class, new_classifier=True, **given)
    except (ConfigError, CheckpointError):
        raise
    except (ValueError, RuntimeError) as error:  # attention dropout, where no kernel has it; weights beyond the memory
        raise ConfigError(f"model.{component.name}: {first_line(error)}") from None
    models.check_positions(model.config, max_seq_len)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def read_pretrained(config: FinetuneConfig) -> tuple[weights.Pretrained | None, PreTrainedTokenizerFast]:
    """The weights to start from, None for random ones, and the tokenizer that they were trained with."""
    if config.pretrained is not None:
        source = weights.read(config.pretrained)
        return source, weights.load_tokenizer(source, config.tokenizer_name)
    if config.tokenizer_name is None:
        raise ConfigError("tokenizer_name: missing; it is required with pretrained: null")
    return None, load_tokenizer(config.tokenizer_name)
