"""MosaicBERT with one of its parts taken away, for time_to_loss.py: replacement modules, no switches in src.

no_alibi          positions are learned, as BERT's, and added to the word embeddings
no_glu            a plain feed-forward layer, dense - GELU - dense, as wide as costs the same FLOPs
no_unpadding      padded tensors (``arms.MosaicBertPadded``)
no_masked_rows    the last layer computes all T tokens; the head still the masked ones
no_masked_head    the head computes logits of all T tokens, and so does the last layer, whose rows it needs
no_kernels        plain torch in the place of our Triton kernels; only on a GPU
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.variants import Batch, MosaicBert, MosaicBertPadded, Part
from src.bert_layers import BertForMaskedLM, LayerNorm
from src.bert_padding import index_first_axis
from src.configuration_bert import MosaicBertConfig
from src.masked_lm_loss import masked_lm_head_loss
from src.torch_ops import dropout


class NoSlopes(nn.Module):
    """In the place of ``AlibiSlopes``: a slope of 0 for each head, so that attention sees no distances."""

    slopes: Tensor

    def __init__(self, num_heads: int):
        super().__init__()
        self.register_buffer("slopes", torch.zeros(num_heads), persistent=False)

    def forward(self, device: torch.device) -> Tensor:
        return self.slopes


class LearnedPositions(MosaicBert):
    """A position's embedding takes the place of its segment's, a table that is there and otherwise says nothing."""

    def config(self, plain: bool) -> MosaicBertConfig:
        config = super().config(plain)
        config.type_vocab_size = self.shape.length
        return config

    def build(self, plain: bool) -> BertForMaskedLM:
        model = super().build(plain)
        model.bert.encoder.alibi = NoSlopes(self.shape.heads)  # pyright: ignore[reportAttributeAccessIssue]
        return model

    def segments(self, batch: Batch) -> Tensor:
        return torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])


class PlainMLP(nn.Module):
    """In the place of ``BertGatedLinearUnitMLP``: two matrices of 1.5 times the width for its three."""

    def __init__(self, config: MosaicBertConfig):
        super().__init__()
        width = 3 * config.intermediate_size // 2
        self.wi = nn.Linear(config.hidden_size, width)
        self.wo = nn.Linear(width, config.hidden_size)
        self.layernorm = LayerNorm(config)
        self.dropout_p = config.hidden_dropout_prob

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        hidden = dropout(F.gelu(self.wi(x)), self.dropout_p, self.training)
        return self.layernorm(self.wo(hidden), residual=x)


class WithPlainMLP(MosaicBert):
    """Without the gated linear unit."""

    def build(self, plain: bool) -> BertForMaskedLM:
        model = super().build(plain)
        for layer in model.bert.encoder.layer:
            layer.mlp = PlainMLP(model.config).apply(model._init_weights)  # pyright: ignore
        return model


class AllRows(MosaicBert):
    """The last layer like the others."""

    def loss_sum(self, part: Part) -> Tensor:
        states = self.model.bert.encode(part["input_ids"], part["layout"])[-1]  # (T, D)
        return self.head_loss(index_first_axis(states, part["masked_index"]), part["masked_labels"])

    def head_loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """() summed over the rows of ``x`` that have a label."""
        head = self.model.cls.predictions
        return masked_lm_head_loss(head.transform(x), head.decoder.weight, head.decoder.bias, labels)["loss_sum"]


class FullHead(AllRows):
    """Logits of every token."""

    def loss_sum(self, part: Part) -> Tensor:
        states = self.model.bert.encode(part["input_ids"], part["layout"])[-1]  # (T, D)
        return self.head_loss(states, part["labels"])


ABLATIONS = {
    "no_alibi": LearnedPositions,
    "no_glu": WithPlainMLP,
    "no_unpadding": MosaicBertPadded,
    "no_masked_rows": AllRows,
    "no_masked_head": FullHead,
    "no_kernels": partial(MosaicBert, attention="torch", kernels="torch"),
}
