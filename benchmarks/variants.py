"""The models that the benchmarks compare: MosaicBERT, and baselines that a user would train instead.

    mosaic_bert              ours: unpadded; last layer and head on masked tokens only
    mosaic_bert_compiled     ours through torch.compile, as with ``compile_config: {}``
    mosaic_bert_padded       ours without unpadding: SDPA with ALiBi and padding as a (B, N, S, S) bias in memory
    hf_bert                  transformers' BertForMaskedLM with SDPA: padded, logits of every position
    hf_strong                the same model, run carefully: the batch is sorted by length and cut into GROUPS groups of
                             sequences, each padded to its own longest and back-propagated before the next; head on
                             masked tokens only
    modernbert               transformers' ModernBertForMaskedLM with SDPA and sparse_prediction, in ModernBERT-base's
                             proportions (22 layers where BERT has 12), with as many parameters as ours
    modernbert_same_shape    the same with the layers, heads and widths of ours

Each takes the same padded batch on the CPU; unpadding, sorting and copying to the device are part of its step.
``check`` compares its loss and gradients with those of the same weights in a plain implementation.

Letters: B sequences, S padded length, T non-padding tokens ("tokens" below), M masked tokens, D hidden size, N heads.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from src.attention import resolve
from src.attention_tiles import tile_tables
from src.bert_encoder import BertSelfAttention
from src.bert_layers import BertForMaskedLM
from src.bert_padding import Layout, index_first_axis, unpad_layout
from src.configuration_bert import MosaicBertConfig
from src.data.microbatches import split_unpadded
from src.data.packing import Microbatch

Batch = dict[str, Tensor]
"""``input_ids``, ``attention_mask`` and ``labels``, each (B, S), on the CPU."""
Part = dict[str, Any]
"""The inputs of one forward pass, on the device."""

GROUPS = 4
"""Groups of hf_strong."""


@dataclass(frozen=True)
class Shape:
    """A model's size. Defaults: base."""

    layers: int = 12
    hidden: int = 768
    heads: int = 12
    width: int = 3072
    """Of the feed-forward layer; in MosaicBERT, of the gated linear unit."""
    vocabulary: int = 30528
    dropout: float = 0.1
    """Of hidden states; attention weights are never dropped, where all variants are fastest. ModernBERT has none."""
    length: int = 512
    """Longest sequence, for variants with learned positions."""


def c4_like_lengths(B: int, S: int) -> Tensor:
    """(B,) lengths like C4's: even quantiles of a lognormal, median 250 and mean 430, cut at S, in random order."""
    sigma = math.sqrt(2 * math.log(430 / 250))
    quantiles = (torch.arange(B, dtype=torch.float64) + 0.5) / B
    lengths = (math.log(250) + sigma * torch.special.ndtri(quantiles)).exp().round().clamp(3, S).long()
    return lengths[torch.randperm(B, generator=torch.Generator().manual_seed(0))]


def make_batch(lengths: Tensor, vocabulary: int, masked: float) -> Batch:
    """Random ids in sequences of ``lengths`` (B,), padded to the longest; the share ``masked`` has labels."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(lengths), int(lengths.max()))
    real = torch.arange(shape[1]) < lengths[:, None]
    ids = torch.randint(5, vocabulary, shape, generator=generator)
    labels = torch.where((torch.rand(shape, generator=generator) < masked) & real, ids, -100)
    return {"input_ids": ids * real, "attention_mask": real.long(), "labels": labels}


def to_device(part: Microbatch, device: str, pinned: bool = False) -> Microbatch:
    """A microbatch on the device, copied without waiting, as Composer does it; optionally from pinned memory."""
    return (Microbatch(part.packed.pin_memory(), part.plan) if pinned else part).to(device)


class Variant:
    """A model in training mode, and its way from a padded batch to the summed loss of its masked tokens."""

    model: Any

    def __init__(self, shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32):
        self.shape, self.device, self.dtype = shape, device, dtype
        self.model = self.build(plain=False).to(device).train()

    def build(self, plain: bool) -> nn.Module:
        """The model with fresh weights; ``plain``: in an implementation that is simple to read."""
        raise NotImplementedError

    def parts(self, batch: Batch) -> list[Part]:
        """The batch as inputs of one forward pass after another."""
        return [self.padded(batch)]

    def loss_sum(self, part: Part) -> Tensor:
        """() cross entropy, summed over masked tokens."""
        raise NotImplementedError

    def segments(self, batch: Batch) -> Tensor | None:
        """Token type ids (B, S), if the variant uses them."""
        return None

    def padded(self, batch: Batch) -> Part:
        """A padded batch on the device, with the flat positions of its M masked tokens, computed on the CPU."""
        masked_index = (batch["labels"].flatten() >= 0).nonzero().squeeze(1)
        part = {**batch, "masked_index": masked_index, "masked_labels": batch["labels"].flatten()[masked_index]}
        return {name: x.to(self.device) for name, x in part.items()}

    def run(self, part: Part) -> Tensor:
        """``loss_sum`` in the variant's precision."""
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            return self.loss_sum(part)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> float:
        """The loss summed over all of the batch's masked tokens."""
        return sum(self.run(part).item() for part in self.parts(batch))

    def backward(self, batch: Batch) -> Tensor:
        """Add the gradient of the mean loss over all of the batch's masked tokens; returns that loss, ()."""
        M = max(1, int((batch["labels"] >= 0).sum()))
        losses = []
        for part in self.parts(batch):
            loss = self.run(part) / M
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def share(self, other: "Variant") -> None:
        """Use the same parameter tensors as a variant of the same model, to save memory."""
        self.model.load_state_dict(other.model.state_dict(keep_vars=True), assign=True)

    def counted(self) -> "Variant":
        """The variant whose FLOPs are counted for this one."""
        return self


class MosaicBert(Variant):
    """Ours; ``compiled``: through torch.compile."""

    def __init__(self, *args: Any, attention: str = "auto", kernels: str = "auto", compiled: bool = False):
        self.attention, self.kernels, self.compiled = attention, kernels, compiled
        super().__init__(*args)

    def build(self, plain: bool) -> BertForMaskedLM:
        model = BertForMaskedLM(self.config(plain))
        if self.compiled and not plain:
            model.forward_unpadded = torch.compile(model.forward_unpadded)  # pyright: ignore[reportAttributeAccessIssue]
        return model

    def config(self, plain: bool) -> MosaicBertConfig:
        s = self.shape
        return MosaicBertConfig(
            vocab_size=s.vocabulary,
            hidden_size=s.hidden,
            num_hidden_layers=s.layers,
            num_attention_heads=s.heads,
            intermediate_size=s.width,
            hidden_dropout_prob=s.dropout,
            attention="reference" if plain else self.attention,
            kernels="torch" if plain else self.kernels,
        )

    def parts(self, batch: Batch) -> list[Part]:
        triton = resolve(self.attention, device_type=self.device) == "triton"
        (part,) = split_unpadded(batch, len(batch["input_ids"]), tile_tables if triton else None)
        part, segments = to_device(part, self.device), self.segments(batch)
        inputs = {**part.values, "layout": Layout.from_batch(part)}
        if segments is not None:
            indices = unpad_layout(batch["attention_mask"], longest_first=True).indices
            inputs["segments"] = segments.flatten()[indices].to(self.device)
        return [inputs]

    def loss_sum(self, part: Part) -> Tensor:
        return self.model.forward_unpadded(
            part["input_ids"], part["layout"], part["masked_index"], part["labels"], part.get("segments")
        ).loss_sum

    def counted(self) -> "Variant":
        if resolve(self.attention, device_type=self.device) in ("reference", "torch"):
            return self
        twin = type(self)(self.shape, self.device, self.dtype, attention="torch", kernels=self.kernels)
        twin.share(self)
        return twin


@dataclass(frozen=True)
class BiasedLayout:
    """Replaces ``Layout`` for a batch that keeps its padding."""

    bias: Tensor
    """(B, N, S, S): ALiBi, and the lowest finite number at padded keys."""


class PaddedSelfAttention(nn.Module):
    """Replaces ``BertSelfAttention``: torch's SDPA over (B, N, S, H) with a bias in memory."""

    def __init__(self, attention: BertSelfAttention):
        super().__init__()
        self.Wqkv, self.num_heads = attention.Wqkv, attention.num_heads

    def forward(self, x: Tensor, layout: BiasedLayout, slopes: Tensor, rows: Tensor | None) -> Tensor:
        """(B * S, D) -> (B * S, D), or (M, D) at ``rows``."""
        B, _, S, _ = layout.bias.shape
        q, k, v = self.Wqkv(x).view(B, S, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=layout.bias).transpose(1, 2).reshape(B * S, -1)
        return out if rows is None else index_first_axis(out, rows)


class MosaicBertPadded(MosaicBert):
    """Ours without unpadding: all B * S positions are computed."""

    def build(self, plain: bool) -> BertForMaskedLM:
        model = super().build(plain)
        if not plain:
            for layer in model.bert.encoder.layer:
                layer.attention.self = PaddedSelfAttention(layer.attention.self)  # pyright: ignore
        return model

    def parts(self, batch: Batch) -> list[Part]:
        part = self.padded(batch)
        S = batch["input_ids"].shape[1]
        position = torch.arange(S, device=self.device)
        slopes = self.model.bert.encoder.alibi.slopes
        alibi = -slopes[:, None, None] * (position[:, None] - position).abs()  # (N, S, S)
        lowest = torch.finfo(self.dtype).min
        bias = alibi.masked_fill(part["attention_mask"][:, None, None] == 0, lowest).to(self.dtype)
        labels = part["masked_labels"]
        return [{**part, "input_ids": part["input_ids"].flatten(), "labels": labels, "layout": BiasedLayout(bias)}]


class HFBert(Variant):
    """Hugging Face's BERT, unchanged."""

    def build(self, plain: bool) -> nn.Module:
        s = self.shape
        config = transformers.BertConfig(
            vocab_size=s.vocabulary,
            hidden_size=s.hidden,
            num_hidden_layers=s.layers,
            num_attention_heads=s.heads,
            intermediate_size=s.width,
            hidden_dropout_prob=s.dropout,
            attention_probs_dropout_prob=0.0,
            max_position_embeddings=s.length,
            attn_implementation="eager" if plain else "sdpa",  # pyright: ignore
        )
        return transformers.BertForMaskedLM(config)

    def loss_sum(self, part: Part) -> Tensor:
        mean = self.model(part["input_ids"], part["attention_mask"], labels=part["labels"]).loss
        return mean * len(part["masked_labels"])


class HFStrong(HFBert):
    """Hugging Face's BERT with less padding and fewer logits, as a few lines of user code can have it."""

    def parts(self, batch: Batch) -> list[Part]:
        order = batch["attention_mask"].sum(dim=1).argsort(descending=True, stable=True)
        batch = {name: x[order] for name, x in batch.items()}
        parts = []
        for rows in torch.arange(len(order)).tensor_split(GROUPS):
            if len(rows):
                longest = int(batch["attention_mask"][rows[0]].sum())
                parts.append(self.padded({name: x[rows, :longest] for name, x in batch.items()}))
        return parts

    def loss_sum(self, part: Part) -> Tensor:
        states = self.model.bert(part["input_ids"], part["attention_mask"]).last_hidden_state  # (B, S, D)
        logits = self.model.cls(states.flatten(0, 1).index_select(0, part["masked_index"]))  # (M, V)
        return F.cross_entropy(logits.float(), part["masked_labels"], reduction="sum")


class ModernBert(HFBert):
    """transformers' ModernBERT.

    Args:
        same_shape: the layers, heads and widths of ours, not its authors' proportions with as many parameters as ours.
    """

    def __init__(self, *args: Any, same_shape: bool = False):
        self.same_shape = same_shape
        super().__init__(*args)

    def build(self, plain: bool) -> nn.Module:
        s = self.shape
        layers, width = s.layers, s.width
        if not self.same_shape:
            layers = round(s.layers * 22 / 12)
            attention, ours = 4 * s.hidden**2, 4 * s.hidden**2 + 3 * s.hidden * s.width
            width = max(32, 32 * round((s.layers * ours / layers - attention) / (3 * s.hidden) / 32))
        config = transformers.ModernBertConfig(
            vocab_size=s.vocabulary,
            hidden_size=s.hidden,
            intermediate_size=width,
            num_hidden_layers=layers,
            num_attention_heads=s.heads,
            max_position_embeddings=s.length,
            sparse_prediction=not plain,
            # None: it compiles parts of itself on a GPU.
            reference_compile=False if plain else None,  # pyright: ignore
            attn_implementation="eager" if plain else "sdpa",  # pyright: ignore
            **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
        )
        return transformers.ModernBertForMaskedLM(config)


VARIANTS: dict[str, Callable[..., Variant]] = {
    "mosaic_bert": MosaicBert,
    "mosaic_bert_compiled": partial(MosaicBert, compiled=True),
    "mosaic_bert_padded": MosaicBertPadded,
    "hf_bert": HFBert,
    "hf_strong": HFStrong,
    "modernbert": ModernBert,
    "modernbert_same_shape": partial(ModernBert, same_shape=True),
}

FAMILIES = ("mosaic_bert", "hf", "modernbert_same_shape", "modernbert")
"""Variants whose names begin alike are the same model, and share its parameters."""

TOLERANCE = {torch.float32: (2e-6, 5e-5), torch.bfloat16: (1e-3, 4e-2)}
"""Highest relative error, by rounding alone, of the loss and of all gradients together. Measured on a CPU over all
variants and widths of 48 and 256: 2e-7 and 3e-6 in fp32, 2e-4 and 2e-2 in bf16."""


def plain_loss(variant: Variant, model: Any, batch: Batch) -> Tensor:
    """() mean loss of a padded batch, from the logits of every position."""
    segments = variant.segments(batch)
    extra = {} if segments is None else {"token_type_ids": segments.to(variant.device)}
    ids, mask, labels = (batch[name].to(variant.device) for name in ("input_ids", "attention_mask", "labels"))
    with torch.autocast(variant.device, variant.dtype, enabled=variant.dtype != torch.float32):
        logits = model(ids, mask, **extra).logits  # (B, S, V)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def check(
    make: Callable[..., Variant], shape: Shape, device: str, dtype: torch.dtype, batch: Batch
) -> tuple[float, float]:
    """Relative errors of loss and gradients, without dropout, against the same weights in a plain implementation.

    Of a variant with two layers and large weights: with fresh weights attention is nearly uniform, and a wrong mask
    would hardly show.

    Raises:
        ValueError: the errors are above TOLERANCE.
    """
    torch.manual_seed(0)
    variant = make(replace(shape, layers=min(2, shape.layers)), device, dtype)
    with torch.no_grad():
        for p in variant.model.parameters():
            if p.dim() == 2:
                p.mul_(1.5 / (0.02 * shape.hidden**0.5))  # a product with unit inputs has a deviation of 1.5
    plain = variant.build(plain=True).to(device).eval()
    plain.load_state_dict(variant.model.state_dict())
    want = plain_loss(variant, plain, batch)
    want.backward()
    variant.model.eval()
    got = variant.backward(batch)
    difference = size = 0.0
    for p, q in zip(variant.model.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None, "a parameter has no gradient"
        difference += (p.grad.double() - q.grad.double()).square().sum().item()
        size += q.grad.double().square().sum().item()
    found = ((got - want).abs() / want.abs()).item(), math.sqrt(difference / size)
    if not all(error <= limit for error, limit in zip(found, TOLERANCE[dtype], strict=True)):
        raise ValueError(f"loss and gradients are off by {found[0]:.1e} and {found[1]:.1e}")
    return found


def step_flops(variant: Variant, batch: Batch) -> int:
    """FLOPs of a step: the matrix products of the forward pass, and twice as many for the backward.

    Recomputation in the backward is not counted; attention kernels count as products of each sequence's true length.
    """
    variant = variant.counted()
    with FlopCounterMode(display=False, custom_mapping=SDPA_ON_CPU) as counter, torch.no_grad():
        for part in variant.parts(batch):
            variant.run(part)
    return 3 * counter.get_total_flops()


SDPA_ON_CPU: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}
"""FLOP formulas that torch's counter lacks."""
