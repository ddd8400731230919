"""MosaicBERT as a ComposerModel: fed unpadded microbatches, measured on the masked tokens."""

from typing import Any

import torch
from composer.models import ComposerModel
from torch import Tensor
from torchmetrics import Metric
from transformers import PreTrainedModel

from src.bert_layers import BertForMaskedLM, BertLayer, Layout, UnpaddedMaskedLMOutput
from src.configuration_bert import MosaicBertConfig
from src.data.microbatches import Batch


class LanguageCrossEntropy(Metric):
    """Mean cross entropy of all masked tokens, in nats. Named and logged as Composer's, which takes (B, S, V) logits.

    Sums are added up, in fp64, so that the value does not depend on batches, ranks or their order.
    """

    full_state_update = False
    sum_loss: Tensor
    total_items: Tensor

    def __init__(self, dist_sync_on_step: bool = False):
        super().__init__(dist_sync_on_step=dist_sync_on_step)
        self.add_state("sum_loss", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total_items", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, loss_sum: Tensor, correct: Tensor, count: Tensor) -> None:
        """Add a batch: cross entropy summed over ``count`` masked tokens, all ()."""
        self.sum_loss += loss_sum.detach()
        self.total_items += count

    def compute(self) -> Tensor:
        """() fp64; NaN if nothing was masked."""
        return self.sum_loss / self.total_items


class LanguagePerplexity(LanguageCrossEntropy):
    """exp of the mean cross entropy of all masked tokens."""

    def compute(self) -> Tensor:
        """() fp64; NaN if nothing was masked."""
        return super().compute().exp()


class MaskedTokens(Metric):
    """Masked tokens that the other metrics are over."""

    full_state_update = False
    total: Tensor

    def __init__(self, dist_sync_on_step: bool = False):
        super().__init__(dist_sync_on_step=dist_sync_on_step)
        self.add_state("total", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, loss_sum: Tensor, correct: Tensor, count: Tensor) -> None:
        """Add a batch of ``count`` () masked tokens."""
        self.total += count

    def compute(self) -> Tensor:
        """() int64."""
        return self.total


class MaskedAccuracy(Metric):
    """Share of masked tokens that are predicted right. Named and logged as Composer's, which takes (B, S, V) logits."""

    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self, dist_sync_on_step: bool = False):
        super().__init__(dist_sync_on_step=dist_sync_on_step)
        self.add_state("correct", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, loss_sum: Tensor, correct: Tensor, count: Tensor) -> None:
        """Add a batch: ``correct`` of ``count`` masked tokens, both ()."""
        self.correct += correct
        self.total += count

    def compute(self) -> Tensor:
        """() in [0, 1]; NaN if nothing was masked."""
        return self.correct.double() / self.total


class MaskedLMModel(ComposerModel):
    """What both models share: the loss is their output's, the metrics are over the masked tokens."""

    model: PreTrainedModel

    def __init__(self):
        super().__init__()
        self.train_metrics = _by_name(LanguageCrossEntropy(), MaskedAccuracy())
        self.val_metrics = _by_name(LanguageCrossEntropy(), LanguagePerplexity(), MaskedAccuracy(), MaskedTokens())

    def loss(self, outputs: UnpaddedMaskedLMOutput, batch: Batch, *args: Any, **kwargs: Any) -> Tensor:
        """() mean cross entropy of the microbatch's masked tokens; Composer weights it by their number."""
        assert outputs.loss is not None
        return outputs.loss

    def eval_forward(self, batch: Batch, outputs: UnpaddedMaskedLMOutput | None = None) -> UnpaddedMaskedLMOutput:
        """The forward pass; for metrics of training, what it gave already."""
        return self(batch) if outputs is None else outputs

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        """Metrics by name."""
        return self.train_metrics if is_train else self.val_metrics

    def update_metric(self, batch: Batch, outputs: UnpaddedMaskedLMOutput, metric: Metric) -> None:
        """Add a microbatch to a metric."""
        metric.update(outputs.loss_sum, outputs.correct, outputs.count)


def _by_name(*metrics: Metric) -> dict[str, Metric]:
    return {type(metric).__name__: metric for metric in metrics}


class MosaicBert(MaskedLMModel):
    """MosaicBERT for pretraining.

    Args:
        config: its shape.
        gradient_checkpointing: keep only each layer's input and compute the layer again in the backward pass: less
            memory, about a third more time.
    """

    def __init__(self, config: MosaicBertConfig, gradient_checkpointing: bool = False):
        super().__init__()
        self.model: BertForMaskedLM = BertForMaskedLM(config)
        self.config = config
        self.model.fsdp_wrap_fn = lambda module: isinstance(module, BertLayer)  # pyright: ignore
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, batch: Batch) -> UnpaddedMaskedLMOutput:
        """A microbatch of ``builders.split_batch``."""
        layout = Layout(batch["cu_seqlens"], batch["max_seqlen"], batch.get("tables"))
        return self.model(batch["input_ids"], labels=batch["labels"], layout=layout, masked_index=batch["masked_index"])

    def flops_per_batch(self, batch: Batch) -> int:
        """Floating-point operations of a training step (forward and backward) on a batch, padding not counted.

        Matrix products only, 2 per multiply-add, backward twice the forward; attention by the sum of squared lengths;
        the projections of the last layer and the head that run on the M masked tokens are counted for those. What
        gradient checkpointing and attention's backward compute again is not counted.
        """
        if "cu_seqlens" in batch:
            lengths, M = batch["cu_seqlens"].diff(), len(batch["labels"])
        else:
            lengths, M = batch["attention_mask"].sum(dim=1), int((batch["labels"] >= 0).sum())
        T, pairs = int(lengths.sum()), int(lengths.long().square().sum())
        c = self.config
        D, L = c.hidden_size, c.num_hidden_layers
        kv, rest = 2 * D * D, 2 * D * D + 3 * D * c.intermediate_size  # rest: queries, attention's output, GLU
        layers = L * kv * T + rest * ((L - 1) * T + M)
        attention = L * 2 * D * pairs
        head = M * (D * D + D * c.vocab_size)
        return 6 * (layers + attention + head)
