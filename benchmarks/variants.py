"""What the benchmarks compare: MosaicBERT and what a user would train instead, each with its way through a batch.

    mosaic_bert              ours; unpadded, head and last layer on masked tokens; attention of choice
    mosaic_bert_compiled     ours through torch.compile, as ``compile_config: {}`` has it
    mosaic_bert_padded       the same model on padded tensors, ALiBi and padding as one (B, N, S, S) bias in memory for
                             torch's SDPA, which is MosaicBERT without unpadding; head and last layer as ours
    hf_bert                  transformers' BertForMaskedLM with SDPA, padded, logits of every position
    hf_strong                the same model as a careful user would run it: the batch sorted by length and cut into
                             GROUPS groups of equally many sequences, each padded to its own longest and
                             back-propagated before the next; head on the masked tokens only
    modernbert               transformers' ModernBertForMaskedLM, SDPA, sparse_prediction, in ModernBERT-base's
                             proportions (22 layers for BERT's 12) and with the parameters of ours
    modernbert_same_shape    the same with our number of layers, heads and widths

Each arm takes the same padded batch from the CPU; what it does to it (unpadding, sorting, moving to the device) is part
of its step. ``check`` compares an arm's loss and gradients with those of the same weights run plainly.

Letters: B sequences, S padded length, T real tokens, M masked tokens, D hidden size, N heads.
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

from src.attention import MISSING, resolve
from src.bert_layers import BertForMaskedLM, BertSelfAttention
from src.bert_padding import index_first_axis, unpad_input, unpad_layout
from src.configuration_bert import MosaicBertConfig
from src.flash_attn_triton import tile_tables

Batch = dict[str, Tensor]
"""``input_ids``, ``attention_mask``, ``labels``, (B, S) each, on the CPU."""
Part = dict[str, Any]
"""What one forward pass takes, on the device."""

GROUPS = 4
"""Groups of hf_strong."""


@dataclass(frozen=True)
class Shape:
    """A model's size. Defaults: base."""

    layers: int = 12
    hidden: int = 768
    heads: int = 12
    width: int = 3072
    """Of the feed-forward layer; of ours, the gated unit's."""
    vocabulary: int = 30528
    dropout: float = 0.1
    """Of hidden states; attention weights are never dropped, where all arms are fastest. ModernBERT has none."""
    length: int = 512
    """Longest sequence, for arms that learn positions."""


# ----------------------------------------------------------------------------------------------------------------------
# Batches
# ----------------------------------------------------------------------------------------------------------------------


def c4_like_lengths(B: int, S: int) -> Tensor:
    """(B,) lengths at even quantiles of a lognormal of median 250 and mean 430, cut at S, in random order."""
    sigma = math.sqrt(2 * math.log(430 / 250))
    quantiles = (torch.arange(B, dtype=torch.float64) + 0.5) / B
    lengths = (math.log(250) + sigma * torch.special.ndtri(quantiles)).exp().round().clamp(3, S).long()
    return lengths[torch.randperm(B, generator=torch.Generator().manual_seed(0))]


def make_batch(lengths: Tensor, vocabulary: int, masked: float) -> Batch:
    """Random ids in sequences of ``lengths`` (B,), padded to the longest; a share of them carries a label."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(lengths), int(lengths.max()))
    real = torch.arange(shape[1]) < lengths[:, None]
    ids = torch.randint(5, vocabulary, shape, generator=generator)
    labels = torch.where((torch.rand(shape, generator=generator) < masked) & real, ids, -100)
    return {"input_ids": ids * real, "attention_mask": real.long(), "labels": labels}


def longest_first(batch: Batch) -> Batch:
    """The same sequences, sorted by length."""
    order = batch["attention_mask"].sum(dim=1).argsort(descending=True, stable=True)
    return {name: x[order] for name, x in batch.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Arms
# ----------------------------------------------------------------------------------------------------------------------


class Arm:
    """A model in training mode, and its way from a padded batch to the sum of its masked tokens' losses."""

    model: Any

    def __init__(self, shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32, plain: bool = False):
        self.shape, self.device, self.dtype = shape, device, dtype
        self.model = self.build(plain).to(device).train()

    def build(self, plain: bool) -> nn.Module:
        """The model with fresh weights; ``plain``: with an attention written out, the arm's meaning."""
        raise AssertionError("each arm has its own")

    def parts(self, batch: Batch) -> list[Part]:
        """The batch as what one forward pass after another takes."""
        return [self.padded(batch)]

    def loss_sum(self, part: Part) -> Tensor:
        """() cross entropy summed over the masked tokens."""
        raise AssertionError("each arm has its own")

    def segments(self, batch: Batch) -> Tensor | None:
        """Token type ids (B, S), where an arm uses them."""
        return None

    def padded(self, batch: Batch) -> Part:
        """A padded batch on the device, and where its M masked tokens are, known without asking the device."""
        masked_index = (batch["labels"].flatten() >= 0).nonzero().squeeze(1)
        part = {**batch, "masked_index": masked_index, "masked_labels": batch["labels"].flatten()[masked_index]}
        return {name: x.to(self.device) for name, x in part.items()}

    def run(self, part: Part) -> Tensor:
        """``loss_sum``, in the arm's precision."""
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            return self.loss_sum(part)

    def backward(self, batch: Batch) -> Tensor:
        """Add the gradient of the batch's mean loss to the parameters'; the loss, ()."""
        M = max(1, int((batch["labels"] >= 0).sum()))
        losses = []
        for part in self.parts(batch):
            loss = self.run(part) / M
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def share(self, other: "Arm") -> None:
        """Take the very parameters of an arm of the same model, so that many arms fit into memory."""
        self.model.load_state_dict(other.model.state_dict(keep_vars=True), assign=True)

    def counted(self) -> "Arm":
        """The arm whose products are counted as this one's."""
        return self


class MosaicBert(Arm):
    """Ours."""

    def __init__(self, *args: Any, attention: str = "auto", kernels: str = "auto", **options: Any):
        self.attention, self.kernels = attention, kernels
        super().__init__(*args, **options)

    def build(self, plain: bool) -> BertForMaskedLM:
        return BertForMaskedLM(self.config(plain))

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
        layout = unpad_layout(batch["attention_mask"], longest_first=True)
        if resolve(self.attention, device_type=self.device) == "triton":
            layout = replace(layout, tables=tile_tables(layout))
        labels = unpad_input(batch["labels"], layout.indices)
        masked_index = (labels >= 0).nonzero().squeeze(1)
        tensors = {
            "input_ids": unpad_input(batch["input_ids"], layout.indices),
            "masked_index": masked_index,
            "masked_labels": labels[masked_index],
            "labels": labels,
        }
        segments = self.segments(batch)
        if segments is not None:
            tensors["segments"] = unpad_input(segments, layout.indices)
        return [{name: x.to(self.device) for name, x in tensors.items()} | {"layout": layout.to(self.device)}]

    def loss_sum(self, part: Part) -> Tensor:
        return self.model.forward_unpadded(
            part["input_ids"], part["layout"], part["masked_index"], part["masked_labels"], part.get("segments")
        ).loss_sum

    def counted(self) -> Arm:
        if resolve(self.attention, device_type=self.device) not in ("triton", "flash_attn"):
            return self
        twin = type(self)(self.shape, self.device, self.dtype, attention="torch", kernels=self.kernels)
        twin.share(self)
        return twin


class MosaicBertCompiled(MosaicBert):
    """Ours through torch.compile."""

    def build(self, plain: bool) -> BertForMaskedLM:
        model = super().build(plain)
        if not plain:
            model.forward_unpadded = torch.compile(model.forward_unpadded)  # pyright: ignore[reportAttributeAccessIssue]
        return model


@dataclass(frozen=True)
class PaddedLayout:
    """In the place of ``Layout``, for a batch that keeps its padding."""

    bias: Tensor
    """(B, N, S, S): ALiBi, and the lowest number at padded keys."""


class PaddedSelfAttention(nn.Module):
    """In the place of ``BertSelfAttention``: torch's SDPA over (B, N, S, H), with a bias that lies in memory."""

    def __init__(self, attention: BertSelfAttention):
        super().__init__()
        self.Wqkv, self.num_heads = attention.Wqkv, attention.num_heads

    def forward(self, x: Tensor, layout: PaddedLayout, slopes: Tensor, rows: Tensor | None) -> Tensor:
        """(B * S, D) -> the same, or (M, D) at ``rows``."""
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
        return [{**part, "input_ids": part["input_ids"].flatten(), "layout": PaddedLayout(bias)}]

    def counted(self) -> Arm:
        return self


class HFBert(Arm):
    """Hugging Face's BERT as it comes."""

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
        return self.mean_loss(part) * len(part["masked_labels"])

    def mean_loss(self, part: Part) -> Tensor:
        """() as the model gives it."""
        return self.model(part["input_ids"], part["attention_mask"], labels=part["labels"]).loss


class HFStrong(HFBert):
    """Hugging Face's BERT with padding and logits left out where a few lines can."""

    def parts(self, batch: Batch) -> list[Part]:
        batch = longest_first(batch)
        parts = []
        for rows in torch.arange(len(batch["input_ids"])).tensor_split(GROUPS):
            if len(rows):
                longest = int(batch["attention_mask"][rows[0]].sum())
                parts.append(self.padded({name: x[rows, :longest] for name, x in batch.items()}))
        return parts

    def loss_sum(self, part: Part) -> Tensor:
        states = self.model.bert(part["input_ids"], part["attention_mask"]).last_hidden_state  # (B, S, D)
        logits = self.model.cls(states.flatten(0, 1).index_select(0, part["masked_index"]))  # (M, V)
        return F.cross_entropy(logits.float(), part["masked_labels"], reduction="sum")


class ModernBertSameShape(HFBert):
    """transformers' ModernBERT with the layers, heads and widths of ours."""

    def build(self, plain: bool) -> nn.Module:
        s = self.proportions()
        config = transformers.ModernBertConfig(
            vocab_size=s.vocabulary,
            hidden_size=s.hidden,
            intermediate_size=s.width,
            num_hidden_layers=s.layers,
            num_attention_heads=s.heads,
            max_position_embeddings=s.length,
            sparse_prediction=not plain,
            # None: it compiles parts of itself on a GPU
            reference_compile=False if plain else None,  # pyright: ignore
            attn_implementation="eager" if plain else "sdpa",  # pyright: ignore
            **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
        )
        return transformers.ModernBertForMaskedLM(config)

    def proportions(self) -> Shape:
        """Of the ModernBERT that is built."""
        return self.shape


class ModernBert(ModernBertSameShape):
    """transformers' ModernBERT, deep and narrow as its authors have it, with the parameters of ours."""

    def proportions(self) -> Shape:
        s = self.shape
        layers = round(s.layers * 22 / 12)
        attention, ours = 4 * s.hidden**2, 4 * s.hidden**2 + 3 * s.hidden * s.width
        width = (s.layers * ours / layers - attention) / (3 * s.hidden)
        return replace(s, layers=layers, width=max(32, 32 * round(width / 32)))


ARMS: dict[str, Callable[..., Arm]] = {
    "mosaic_bert": MosaicBert,
    **{f"mosaic_bert_{name}": partial(MosaicBert, attention=name) for name in ("reference", "torch", "triton")},
    "mosaic_bert_flash_attn": partial(MosaicBert, attention="flash_attn"),
    "mosaic_bert_compiled": MosaicBertCompiled,
    "mosaic_bert_padded": MosaicBertPadded,
    "hf_bert": HFBert,
    "hf_strong": HFStrong,
    "modernbert": ModernBert,
    "modernbert_same_shape": ModernBertSameShape,
}
"""Arms by name; ``mosaic_bert`` has the attention that the device takes by itself."""

FAMILIES = ("mosaic_bert", "hf", "modernbert_same_shape", "modernbert")
"""Arms whose names begin alike are of one model, and share its parameters."""


def runnable(device: str) -> list[str]:
    """The arms that can run on a device; what ``mosaic_bert`` is anyway comes once."""
    attention = {name: name.removeprefix("mosaic_bert_") for name in ARMS}
    auto = resolve("auto", device_type=device)
    return [name for name, a in attention.items() if a != auto and not (a in MISSING and MISSING[a](device))]


def family(name: str) -> str:
    """Of an arm, one of FAMILIES."""
    return next(prefix for prefix in FAMILIES if name.startswith(prefix))


# ----------------------------------------------------------------------------------------------------------------------
# Correctness and work
# ----------------------------------------------------------------------------------------------------------------------

TOLERANCE = {torch.float32: (2e-6, 5e-5), torch.bfloat16: (1e-3, 4e-2)}
"""Relative error of the loss, and of all gradients together, that rounding may cause. Measured on a CPU, over all arms
and widths of 48 and 256: 2e-7 and 3e-6 in fp32, 2e-4 and 2e-2 in bf16."""


def plain_loss(arm: Arm, model: Any, batch: Batch) -> Tensor:
    """() mean loss of a batch, padded, from the logits of every position."""
    segments = arm.segments(batch)
    extra = {} if segments is None else {"token_type_ids": segments.to(arm.device)}
    ids, mask, labels = (batch[name].to(arm.device) for name in ("input_ids", "attention_mask", "labels"))
    with torch.autocast(arm.device, arm.dtype, enabled=arm.dtype != torch.float32):
        logits = model(ids, mask, **extra).logits  # (B, S, V)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def errors(arm: Arm, batch: Batch) -> tuple[float, float]:
    """Relative errors of an arm's loss and gradients, without dropout, to those of the same weights run plainly."""
    plain = arm.build(plain=True).to(arm.device).eval()
    plain.load_state_dict(arm.model.state_dict())
    want = plain_loss(arm, plain, batch)
    want.backward()
    arm.model.eval()
    got = arm.backward(batch)
    arm.model.train()
    difference = size = 0.0
    for p, q in zip(arm.model.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None, "a parameter has no gradient"
        difference += (p.grad.double() - q.grad.double()).square().sum().item()
        size += q.grad.double().square().sum().item()
    arm.model.zero_grad()
    return ((got - want).abs() / want.abs()).item(), math.sqrt(difference / size)


def check(make: Callable[..., Arm], shape: Shape, device: str, dtype: torch.dtype, batch: Batch) -> tuple[float, float]:
    """``errors`` of an arm with two layers, and weights so large that attention is far from even.

    At fresh weights a wrong mask would hardly be seen: every token attends to all others alike.

    Raises:
        ValueError: they are more than rounding.
    """
    torch.manual_seed(0)
    arm = make(replace(shape, layers=min(2, shape.layers)), device, dtype)
    with torch.no_grad():
        for p in arm.model.parameters():
            if p.dim() == 2:
                p.mul_(1.5 / (0.02 * shape.hidden**0.5))  # a product with unit inputs has a deviation of 1.5
    found = errors(arm, batch)
    if not all(error <= limit for error, limit in zip(found, TOLERANCE[dtype], strict=True)):
        raise ValueError(f"loss and gradients are off by {found[0]:.1e} and {found[1]:.1e}")
    return found


def step_flops(arm: Arm, batch: Batch) -> int:
    """Floating-point operations of a step: the matrix products of the forward pass, and twice these for the backward.

    What is computed again in a backward pass is not counted; of our kernels, what the ragged products have.
    """
    arm = arm.counted()
    with FlopCounterMode(display=False, custom_mapping=SDPA_ON_CPU) as counter, torch.no_grad():
        for part in arm.parts(batch):
            arm.run(part)
    return 3 * counter.get_total_flops()


def _sdpa_flops(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **options: Any) -> int:
    return sdpa_flop_count(q, k, v)


SDPA_ON_CPU: dict[Any, Any] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops}
"""What torch's counter does not know."""
