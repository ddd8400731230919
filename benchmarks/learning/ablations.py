"""MosaicBERT without one of its parts, for time_to_loss.py, by replacement modules.

no_alibi          learned positions, as BERT's, added to the word embeddings
no_glu            a plain feed-forward layer, dense - GELU - dense, whose width gives the same FLOPs
no_unpadding      padded tensors (``variants.MosaicBertPadded``)
no_masked_rows    the last layer computes all T tokens; the head only the masked ones
no_masked_head    the head computes logits of all T tokens, and so does the last layer
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.variants import Batch, MosaicBert, MosaicBertPadded, Part
from src.attention import AlibiSlopes
from src.bert_encoder import LayerNorm
from src.bert_layers import BertForMaskedLM
from src.bert_padding import index_first_axis
from src.configuration_bert import MosaicBertConfig
from src.masked_lm_loss import IGNORED, masked_lm_loss_in_place
from src.torch_ops import dropout


class NoSlopes(AlibiSlopes):
    """A slope of 0 for each head, so attention sees no distances."""

    def fill(self, device: torch.device) -> None:  # called by .to()
        self.slopes = torch.zeros(len(self.slopes), device=device)

    def forward(self, device: torch.device) -> Tensor:
        return self.slopes


class LearnedPositions(MosaicBert):
    """Positions use the table of segment embeddings, which is otherwise constant."""

    def config(self, plain: bool) -> MosaicBertConfig:
        config = super().config(plain)
        config.type_vocab_size = self.shape.length
        return config

    def build(self, plain: bool) -> BertForMaskedLM:
        model = super().build(plain)
        model.bert.encoder.alibi = NoSlopes(self.shape.heads)
        return model

    def segments(self, batch: Batch) -> Tensor:
        return torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])


class PlainMLP(nn.Module):
    """Replaces ``BertGatedLinearUnitMLP``: two matrices of 1.5 times the width, not three."""

    def __init__(self, config: MosaicBertConfig):
        super().__init__()
        width = 3 * config.intermediate_size // 2
        self.wi = nn.Linear(config.hidden_size, width)
        self.wo = nn.Linear(width, config.hidden_size)
        self.layernorm = LayerNorm(config)
        self.dropout_p = config.hidden_dropout_prob

    def forward(self, x: Tensor, key: Tensor | None = None) -> Tensor:
        """(T, D) -> (T, D). ``key`` is for the kernel of the gated unit, and not used."""
        hidden = dropout(F.gelu(self.wi(x)), self.dropout_p, self.training)
        return self.layernorm(self.wo(hidden), residual=x)


class WithPlainMLP(MosaicBert):
    """No gated linear unit."""

    def build(self, plain: bool) -> BertForMaskedLM:
        model = super().build(plain)
        for layer in model.bert.encoder.layer:
            layer.mlp = PlainMLP(model.config).apply(model._init_weights)  # pyright: ignore
        return model


class AllRows(MosaicBert):
    """The last layer computes all tokens."""

    def loss_sum(self, part: Part) -> Tensor:
        states = self.model.bert.encode(part["input_ids"], part["layout"])[-1]  # (T, D)
        x, labels = self.rows(states, part)
        return masked_lm_loss_in_place(self.model.cls(x), labels)["loss_sum"]

    def rows(self, states: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        """The rows that the head computes, and their labels."""
        return index_first_axis(states, part["masked_index"]), part["labels"]


class FullHead(AllRows):
    """The head computes logits of all tokens."""

    def rows(self, states: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        labels = part["labels"].new_full(part["input_ids"].shape, IGNORED)
        labels[part["masked_index"]] = part["labels"]
        return states, labels


ABLATIONS = {
    "no_alibi": LearnedPositions,
    "no_glu": WithPlainMLP,
    "no_unpadding": MosaicBertPadded,
    "no_masked_rows": AllRows,
    "no_masked_head": FullHead,
}
