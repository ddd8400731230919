"""Unpadding: padded tensors (B, S, ...) to the non-padding tokens (T, ...), and back.

Described by Zeng et al., 2022 (Boosting Distributed Training Performance of the Unpadded BERT Model, arXiv 2208.08124);
first used by NVIDIA's MLPerf 1.1 BERT.

Letters: B sequences, S padded length, T tokens of the batch, padding not counted. Sequence b is rows
``cu_seqlens[b]:cu_seqlens[b + 1]`` of an unpadded tensor.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .graphs import in_graph


class _IndexFirstAxis(torch.autograd.Function):
    """x[index] for unique indices: the backward copies rows, where that of ``index_select`` adds them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return scatter_first_axis(grads[0], index, ctx.rows), None


def index_first_axis(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (M,) int64 of ``x`` (T, ...), as (M, ...). Indices must be unique."""
    return _IndexFirstAxis.apply(x, index)  # pyright: ignore[reportReturnType]


def scatter_first_axis(x: Tensor, index: Tensor, rows: int) -> Tensor:
    """The inverse of ``index_first_axis``: (rows, ...) with ``x`` (M, ...) at rows ``index`` (M,), zero elsewhere."""
    return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, index, x)


class _UnpackHeads(torch.autograd.Function):
    """``unbind(1)``; the backward skips the copy if the gradients already share one packed buffer."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor) -> tuple[Tensor, ...]:
        return packed.unbind(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        parts, first = len(grads), grads[0]
        T, N, H = first.shape
        strides = (parts * N * H, H, 1)
        packed = all(
            grad.stride() == strides
            and grad.dtype == first.dtype
            and grad.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and grad.storage_offset() == first.storage_offset() + i * N * H
            for i, grad in enumerate(grads)
        )
        if packed:
            return first.as_strided((T, parts, N, H), (parts * N * H, N * H, H, 1))
        return torch.stack(grads, dim=1)


def unpack_heads(packed: Tensor) -> tuple[Tensor, ...]:
    """Views q, k, v (T, N, H) of a packed product (T, 3, N, H); in a graph, also of (B, S, 3, N, H).

    ``unbind(-3)``; the backward skips the copy if attention wrote its gradients into one packed buffer.
    """
    if in_graph():  # the compiler removes such copies itself, and cannot compare addresses
        return packed.unbind(-3)
    return _UnpackHeads.apply(packed)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class PaddedLayout:
    """A batch that keeps its padding: in an exported graph, (B, S, ...) tensors take the place of (T, ...) ones.

    They are not flattened to B * S rows: torch.export would then refuse B * S = B, which is length 1.
    """

    mask: Tensor
    """(B, S) bool, false at padding."""


@dataclass(frozen=True)
class Layout:
    """Where each token of an unpadded batch comes from, and where each sequence starts."""

    cu_seqlens: Tensor
    """(B + 1,) int32, cumulative lengths; the first is 0, the last T."""
    max_seqlen: int
    """The longest length."""
    tables: dict[int, Tensor] = field(default_factory=dict)
    """Tile tables of the attention kernels, by rows of a tile; if empty, each layer computes its own."""
    indices: Tensor | None = None
    """(T,) int64, position of each token in the flattened (B * S) padded batch; None if it is never padded again."""

    @classmethod
    def from_batch(cls, batch: Any) -> "Layout":
        """From a ``Microbatch``, which has the fields under their names; without ``indices``."""
        return cls(batch["cu_seqlens"], batch["max_seqlen"], batch["tables"])

    def to(self, device: torch.device | str) -> "Layout":
        """The same, on ``device``."""
        indices = None if self.indices is None else self.indices.to(device)
        tables = {rows: table.to(device) for rows, table in self.tables.items()}
        return replace(self, indices=indices, cu_seqlens=self.cu_seqlens.to(device), tables=tables)


def unpad_layout(mask_or_lengths: Tensor, longest_first: bool = False) -> Layout:
    """The layout of a padded batch, without tile tables.

    Args:
        mask_or_lengths: attention mask (B, S), nonzero at tokens, padding anywhere; or lengths (B,) of a batch that is
            padded on the right to the longest.
        longest_first: sort sequences by length, stably, instead of keeping their order.

    Synchronizes a GPU. Training makes its layouts on the CPU (src/data/microbatches.py).
    """
    mask = mask_or_lengths
    if mask.dim() == 1:
        mask = torch.arange(int(mask.max()), device=mask.device) < mask[:, None]
    mask = mask.bool()  # (B, S)
    positions = torch.arange(mask.numel(), device=mask.device).view_as(mask)
    lengths = mask.sum(dim=1, dtype=torch.int32)  # (B,)
    if longest_first:
        lengths, order = lengths.sort(descending=True, stable=True)
        mask, positions = mask[order], positions[order]
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return Layout(cu_seqlens, int(lengths.max()) if len(lengths) else 0, indices=positions[mask])


def unpad_input(x: Tensor, indices: Tensor | None) -> Tensor:
    """The tokens (T, ...) of a padded tensor (B, S, ...); ``indices`` as in ``Layout``, not None."""
    assert indices is not None, "this layout is of microbatches, which have no padded form"
    return index_first_axis(x.flatten(0, 1), indices)


def pad_input(x: Tensor, indices: Tensor | None, batch_size: int, seqlen: int) -> Tensor:
    """The inverse of ``unpad_input``: (B, S, ...) from (T, ...), zero at padding."""
    assert indices is not None, "this layout is of microbatches, which have no padded form"
    return scatter_first_axis(x, indices, batch_size * seqlen).unflatten(0, (batch_size, seqlen))


def to_rows(x: Tensor | None, layout: Layout | PaddedLayout) -> Tensor | None:
    """What the encoder computes of a padded tensor (B, S, ...): its tokens (T, ...), in an exported graph all of it."""
    return x if x is None or isinstance(layout, PaddedLayout) else unpad_input(x, layout.indices)


def from_rows(x: Tensor, layout: Layout | PaddedLayout, B: int, S: int) -> Tensor:
    """The inverse for states: (B, S, D) from (T, D), zero at padding."""
    if isinstance(layout, PaddedLayout):
        return x * layout.mask[:, :, None]
    return pad_input(x, layout.indices, B, S)
