"""Fine-tuned models as ComposerModels: a pretrained encoder, a head for a task, and its metrics."""

from collections.abc import Mapping
from typing import Any

from composer.models import ComposerModel
from torch import Tensor
from torchmetrics import Metric
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from src.common.errors import CheckpointError, ConfigError, first_line
from src.data.microbatches import Batch
from src.data.tokenizer import load_tokenizer
from src.finetune.config import FinetuneConfig
from src.finetune.kinds import Kind
from src.train import models, weights
from src.train.schema import Component


class Classifier(ComposerModel):
    """A Hugging Face model with a head for one kind of task.

    Args:
        metrics: for evaluation, by name.
        class_weights: (classes,) fp32, factors of the loss of each class in training. None: all are 1.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        model: PreTrainedModel,
        kind: Kind,
        metrics: Mapping[str, Metric],
        class_weights: Tensor | None = None,
    ):
        super().__init__()
        self.model, self.kind, self.val_metrics = model, kind, dict(metrics)
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, batch: Batch) -> Any:
        """Loss and logits of a padded batch (``Kind.collate``)."""
        return self.model(**self.kind.inputs(batch))

    def loss(self, outputs: Any, batch: Batch, *args: Any, **kwargs: Any) -> Tensor:
        """() fp32, mean over the rows, or over the labelled words (``Kind.count``)."""
        return self.kind.loss(outputs, batch, self.class_weights)

    def eval_forward(self, batch: Batch, outputs: Any | None = None) -> Any:
        return self(batch) if outputs is None else outputs

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        return {} if is_train else self.val_metrics

    def update_metric(self, batch: Batch, outputs: Any, metric: Metric) -> None:
        self.kind.update_metric(metric, batch, outputs)


def build_model(
    component: Component,
    tokenizer: PreTrainedTokenizerFast,
    source: weights.Pretrained | None,
    kind: Kind,
    classes: list[str],
    max_seq_len: int,
) -> PreTrainedModel:
    """The model with a newly initialised head for a kind of task, on the CPU.

    Args:
        component: ``model`` of the YAML.
        source: weights of the encoder; None for random ones.
        classes: their names in the saved model, in the order of their numbers; empty for regression.

    Raises:
        ValueError: the weights do not fit, an option is unknown, or the model has too few positions.
    """
    head = kind.head(classes)
    options = models.read_options(component)
    model_class: type[PreTrainedModel] = kind.heads[component.name]
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
