"""Between padded (B, S, ...) tensors and the T real tokens of a batch, one after another (T, ...).

"Unpadding" computes on real tokens only. Zeng et al., 2022 (Boosting Distributed Training Performance of the Unpadded
BERT Model, arXiv 2208.08124) describe it; NVIDIA's MLPerf 1.1 BERT used it first.

Letters: B sequences, S padded length, T real tokens. ``cu_seqlens`` (B + 1,) int32 are the cumulated lengths: sequence
b is rows ``cu_seqlens[b]:cu_seqlens[b + 1]`` of the unpadded tensor.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _IndexFirstAxis(torch.autograd.Function):
    """x[index] for an index without repeats: the gradient is then a copy, not the addition of ``index_select``."""

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
    """Rows ``index`` (M,) int64 of ``x`` (T, ...), as (M, ...). No index may come twice."""
    return _IndexFirstAxis.apply(x, index)  # pyright: ignore[reportReturnType]


def scatter_first_axis(x: Tensor, index: Tensor, rows: int) -> Tensor:
    """The inverse of ``index_first_axis``: (rows, ...) with ``x`` (M, ...) at rows ``index`` (M,), zero elsewhere."""
    return x.new_zeros(rows, *x.shape[1:]).index_copy(0, index, x)


class _UnpackHeads(torch.autograd.Function):
    """unbind, whose backward takes gradients that already lie beside each other as they are."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor) -> tuple[Tensor, ...]:
        return packed.unbind(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        parts, first = len(grads), grads[0]
        T, N, H = first.shape
        strides = (parts * N * H, H, 1)
        beside = all(
            grad.stride() == strides
            and grad.dtype == first.dtype
            and grad.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and grad.storage_offset() == first.storage_offset() + i * N * H
            for i, grad in enumerate(grads)
        )
        if beside:
            return first.as_strided((T, parts, N, H), (parts * N * H, N * H, H, 1))
        return torch.stack(grads, dim=1)


def unpack_heads(packed: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys, values (T, N, H) of a packed product (T, 3, N, H), as views; or keys and values of (T, 2, N, H).

    ``unbind(1)``, but for the backward, which copies nothing where an attention wrote its gradients side by side.
    """
    if torch.compiler.is_compiling():  # which finds such copies itself, and cannot follow a test of addresses
        return packed.unbind(1)
    return _UnpackHeads.apply(packed)  # pyright: ignore[reportReturnType]


def unpad_layout(attention_mask: Tensor) -> tuple[Tensor, Tensor, int]:
    """Where the real tokens of a padded batch are.

    Args:
        attention_mask: (B, S), nonzero at real tokens.

    Returns:
        ``indices`` (T,) int64 into the flattened (B * S) batch, ``cu_seqlens`` (B + 1,) int32, and the longest length.
        On a GPU this waits for the device; the training loop calls it on the CPU, in ``split_batch``.
    """
    mask = attention_mask.bool()
    lengths = mask.sum(dim=1, dtype=torch.int32)
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    max_seqlen = int(lengths.max()) if lengths.numel() else 0
    return mask.flatten().nonzero().squeeze(1), cu_seqlens, max_seqlen


def tile_table(cu_seqlens: Tensor, rows: int) -> Tensor:
    """Cut each sequence into tiles of ``rows`` tokens, for a kernel that takes one a program.

    Returns:
        (n, 3) int32: the first token of the tile's sequence, the sequence's length, the tile's first row in it. Long
        sequences come first, so that the programs that take longest do not start last. On a GPU this waits for the
        device; the training loop calls it on the CPU, in ``split_batch``.
    """
    lengths = cu_seqlens.diff()
    tiles = (lengths + rows - 1) // rows
    order = lengths.argsort(descending=True, stable=True)
    sequence = order.repeat_interleave(tiles[order])
    before = (tiles[order].cumsum(0) - tiles[order]).repeat_interleave(tiles[order])
    first_row = (torch.arange(len(sequence), device=cu_seqlens.device) - before) * rows
    return torch.stack([cu_seqlens[sequence], lengths[sequence], first_row], dim=1).to(torch.int32)


def tile_tables(cu_seqlens: Tensor, sizes: Iterable[int]) -> dict[int, Tensor]:
    """``tile_table`` for tiles of each size, by size."""
    return {rows: tile_table(cu_seqlens, rows) for rows in sizes}


def unpad_input(x: Tensor, indices: Tensor) -> Tensor:
    """The real tokens (T, ...) of a padded (B, S, ...) tensor."""
    return index_first_axis(x.flatten(0, 1), indices)


def pad_input(x: Tensor, indices: Tensor, batch_size: int, seqlen: int) -> Tensor:
    """The inverse of ``unpad_input``: (B, S, ...) from (T, ...), zero at padding."""
    return scatter_first_axis(x, indices, batch_size * seqlen).unflatten(0, (batch_size, seqlen))
