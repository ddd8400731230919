"""Between padded (B, S, ...) tensors and the T real tokens of a batch, one after another (T, ...).

"Unpadding" computes on real tokens only. Zeng et al., 2022 (Boosting Distributed Training Performance of the Unpadded
BERT Model, arXiv 2208.08124) describe it; NVIDIA's MLPerf 1.1 BERT used it first.

Letters: B sequences, S padded length, T real tokens. ``cu_seqlens`` (B + 1,) int32 are the cumulated lengths: sequence
b is rows ``cu_seqlens[b]:cu_seqlens[b + 1]`` of the unpadded tensor.
"""

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


def unpad_input(x: Tensor, indices: Tensor) -> Tensor:
    """The real tokens (T, ...) of a padded (B, S, ...) tensor."""
    return index_first_axis(x.flatten(0, 1), indices)


def pad_input(x: Tensor, indices: Tensor, batch_size: int, seqlen: int) -> Tensor:
    """The inverse of ``unpad_input``: (B, S, ...) from (T, ...), zero at padding."""
    return scatter_first_axis(x, indices, batch_size * seqlen).unflatten(0, (batch_size, seqlen))
