"""Changes of MosaicBERT and of its optimizer, for time_to_loss.py. Parts taken away, by replacement modules:

no_alibi          learned positions, as BERT's, added to the word embeddings
no_glu            a plain feed-forward layer, dense - GELU - dense, whose width gives the same FLOPs
no_unpadding      padded tensors (``variants.MosaicBertPadded``)
no_masked_rows    the last layer computes all T tokens; the head only the masked ones
no_masked_head    the head computes logits of all T tokens, and so does the last layer

Parts added:

scaled_init       the matrices that write to the residual stream begin smaller, by 1 / sqrt(2 layers) (GPT-2; Radford et
                  al., 2019, section 2.3)
z_loss            1e-4 log(Z)^2 is added to each masked token's loss, Z the softmax's sum (PaLM; Chowdhery et al., 2022,
                  arXiv 2204.02311, section 5)

Optimizers that the product does not have:

soap              Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al., 2024, arXiv 2409.11321), of
                  pytorch-optimizer; a new basis every 10 steps; not of the vocabulary's side
adamw_embeddings  AdamW with a learning rate three times as high for the embeddings, which are also the decoder
muon_half         Muon with half its learning rate for what AdamW updates: embeddings, biases, norms, head
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.variants import VARIANTS as MODELS
from benchmarks.variants import Batch, MosaicBert, MosaicBertPadded, Part
from src.attention import AlibiSlopes
from src.bert_encoder import LayerNorm
from src.bert_layers import BertForMaskedLM
from src.bert_padding import index_first_axis
from src.configuration_bert import MosaicBertConfig
from src.masked_lm_loss import IGNORED, masked_lm_loss_in_place
from src.torch_ops import dropout
from src.train.optim import OPTIMIZERS as PRODUCT
from src.train.optim import adamw, muon


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


class ScaledInit(MosaicBert):
    """Smaller initial weights where a layer writes to the residual stream."""

    def build(self, plain: bool) -> BertForMaskedLM:
        model = super().build(plain)
        with torch.no_grad():
            for layer in model.bert.encoder.layer:
                for dense in (layer.attention.output.dense, layer.mlp.wo):  # pyright: ignore
                    dense.weight.mul_((2 * self.shape.layers) ** -0.5)  # pyright: ignore
        return model


class ZLoss(MosaicBert):
    """The loss keeps log(Z) near 0 in training; an evaluation has the plain loss."""

    def loss_sum(self, part: Part) -> Tensor:
        if not self.model.training:
            return super().loss_sum(part)
        states = self.model.bert.encode(part["input_ids"], part["layout"], rows=part["masked_index"])[-1]
        logits = self.model.cls(states)  # (M, V)
        z = logits.logsumexp(dim=-1)  # (M,)
        own = logits.gather(1, part["labels"].long()[:, None]).squeeze(1)
        return (z - own + 1e-4 * z.square()).sum()


def soap(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """SOAP with the paper's settings and the recipe's decay."""
    from pytorch_optimizer import SOAP

    return SOAP(
        model.parameters(),
        lr,
        betas=(0.95, 0.95),
        weight_decay=0.02,
        precondition_frequency=10,
        max_precondition_dim=2048,
    )


def adamw_embeddings(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """``adamw`` with a higher learning rate of the embeddings."""
    optimizer = adamw(model, lr)
    (group,) = optimizer.param_groups
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    known = {id(weight) for weight in tables}
    group["params"] = [p for p in group["params"] if id(p) not in known]
    optimizer.add_param_group({**group, "params": tables, "lr": 3 * lr})
    return optimizer


def muon_half(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """``muon`` with a lower learning rate of AdamW."""
    return muon(model, lr, adamw_lr=lr / 2)


ABLATIONS = {
    "no_alibi": LearnedPositions,
    "no_glu": WithPlainMLP,
    "no_unpadding": MosaicBertPadded,
    "no_masked_rows": AllRows,
    "no_masked_head": FullHead,
}
VARIANTS = MODELS | ABLATIONS | {"scaled_init": ScaledInit, "z_loss": ZLoss}
OPTIMIZERS: dict[str, Any] = {**PRODUCT, "soap": soap, "adamw_embeddings": adamw_embeddings, "muon_half": muon_half}
