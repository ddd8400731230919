"""MosaicBERT as a ComposerModel: takes unpadded microbatches, measures masked tokens."""

from typing import Any

import torch
from composer.models import ComposerModel
from torch import Tensor
from torchmetrics import Metric
from transformers import PreTrainedModel

from src.bert_encoder import BertLayer
from src.bert_layers import BertForMaskedLM, UnpaddedMaskedLMOutput
from src.bert_padding import Layout
from src.configuration_bert import MosaicBertConfig
from src.data.microbatches import Batch, counts_of
from src.data.packing import Microbatch, SplitBatch


class MaskedTokenMetric(Metric):
    """Sums over masked tokens in fp64 and int64: values depend on neither batches nor ranks.

    Values are () fp64, except the int64 of MaskedTokens. Means are NaN if nothing was masked.
    torchmetrics' MeanMetric rounds (it multiplies a mean by its weight), its SumMetric counts in floats, and both make
    a GPU wait, because they look for NaN in each value.
    """

    full_state_update = False
    loss_sum: Tensor
    correct: Tensor
    count: Tensor

    def __init__(self, **options: Any):
        super().__init__(**options)
        for name, dtype in (("loss_sum", torch.float64), ("correct", torch.int64), ("count", torch.int64)):
            self.add_state(name, default=torch.zeros((), dtype=dtype), dist_reduce_fx="sum")

    def update(self, loss_sum: Tensor, correct: Tensor, count: Tensor) -> None:
        """Add a microbatch: the fields of ``UnpaddedMaskedLMOutput``, all ()."""
        self.loss_sum += loss_sum.detach()
        self.correct += correct
        self.count += count


class LanguageCrossEntropy(MaskedTokenMetric):
    """Mean cross entropy in nats per masked token. Named and logged as Composer's, which takes (B, S, V) logits."""

    def compute(self) -> Tensor:
        return self.loss_sum / self.count


class LanguagePerplexity(LanguageCrossEntropy):
    """exp of the mean cross entropy per masked token."""

    def compute(self) -> Tensor:
        return super().compute().exp()


class MaskedAccuracy(MaskedTokenMetric):
    """Share of masked tokens predicted correctly. Named and logged as Composer's, which takes (B, S, V) logits."""

    def compute(self) -> Tensor:
        return self.correct.double() / self.count


class MaskedTokens(MaskedTokenMetric):
    """Number of masked tokens that the other metrics are computed from."""

    def compute(self) -> Tensor:
        return self.count


class MaskedLMModel(ComposerModel):
    """What both models share: the loss, and the metrics over masked tokens.

    Args:
        model: with a head for masked tokens.
        layer: class of its layers, the units of FSDP.
        gradient_checkpointing: save only each layer's input, and recompute the layer in the backward pass: less memory,
            about a third more time.
    """

    def __init__(self, model: PreTrainedModel, layer: type, gradient_checkpointing: bool):
        super().__init__()
        self.model = model
        self.config: Any = model.config
        train: list[type[Metric]] = [LanguageCrossEntropy, MaskedAccuracy]
        evaluation = [LanguageCrossEntropy, LanguagePerplexity, MaskedAccuracy, MaskedTokens]
        # Not summed over processes here: train/callbacks.py (TrainMetrics) does that, for all of them at once.
        self.train_metrics = {kind.__name__: kind(sync_on_compute=False) for kind in train}
        self.val_metrics: dict[str, Metric] = {kind.__name__: kind() for kind in evaluation}
        model.fsdp_wrap_fn = lambda module: isinstance(module, layer)  # pyright: ignore
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})

    def loss(self, outputs: UnpaddedMaskedLMOutput, batch: Microbatch, *args: Any, **kwargs: Any) -> Tensor:
        """() mean cross entropy of the microbatch's masked tokens; Composer weights it by their number."""
        assert outputs.loss is not None
        return outputs.loss

    def eval_forward(self, batch: Microbatch, outputs: UnpaddedMaskedLMOutput | None = None) -> UnpaddedMaskedLMOutput:
        """The forward pass, or ``outputs`` if training has run it already."""
        return self(batch) if outputs is None else outputs

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        """Metrics by name."""
        return self.train_metrics if is_train else self.val_metrics

    def update_metric(self, batch: Microbatch, outputs: UnpaddedMaskedLMOutput, metric: Metric) -> None:
        """Add a microbatch to a metric."""
        metric.update(outputs.loss_sum, outputs.correct, outputs.count)


class MosaicBert(MaskedLMModel):
    """MosaicBERT for pretraining."""

    def __init__(self, config: MosaicBertConfig, gradient_checkpointing: bool = False):
        super().__init__(BertForMaskedLM(config), BertLayer, gradient_checkpointing)

    def forward(self, batch: Microbatch) -> UnpaddedMaskedLMOutput:
        """A microbatch of ``split_unpadded``."""
        ids, labels, masked_index = batch["input_ids"], batch["labels"], batch["masked_index"]
        return self.model(ids, labels=labels, layout=Layout.from_batch(batch), masked_index=masked_index)

    def flops_per_batch(self, batch: Batch | SplitBatch | Microbatch) -> int:
        """Floating-point operations of a training step (forward and backward) on a batch, without padding.

        Counts matrix products, 2 per multiply-add, the backward as twice the forward. Attention counts the sum of
        squared lengths; the last layer after attention, and the head, count the M masked tokens. Does not count
        recomputation by gradient checkpointing or in attention's backward.
        """
        counts = counts_of(batch)
        T, M, pairs = counts.num_tokens, counts.num_masked, counts.squares
        c = self.config
        D, L = c.hidden_size, c.num_hidden_layers
        qkv, rest = 3 * D * D, D * D + 3 * D * c.intermediate_size  # rest: attention's output, GLU
        layers = L * qkv * T + rest * ((L - 1) * T + M)
        attention = L * 2 * D * pairs
        head = M * (D * D + D * c.vocab_size)
        return 6 * (layers + attention + head)
