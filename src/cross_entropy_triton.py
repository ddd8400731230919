"""Cross entropy of logits with labels in one read of memory, its gradient in one read and one write, in Triton.

The forward reads a row once: maximum and sum of exp together (Milakov and Gimelshein, 2018, arXiv 1805.02867, algorithm
3), and where the maximum is. The backward overwrites the logits by their gradient.

Letters: M rows, V vocabulary.

Saved for the backward: the logits (M, V); each row's maximum and sum of exp(logit - maximum), (M,) fp32 each; labels.
Maximum and sum are separate because logit - maximum is exact; for large logits, logit - log-sum-exp is not.

Launch: forward, a program per row; backward, tiles of BLOCK logits, numbered row by row; one-dimensional grids; see
``tile``. No argument depends on M, so no batch compiles a kernel again. No atomics: the same input gives the same bits.
"""

# pyright: reportOptionalMemberAccess=false

import torch
from torch import Tensor

from .triton_common import launch

try:
    import triton
    import triton.language as tl
except ImportError:  # see triton_common.py
    triton = None

if triton is not None:

    @triton.jit
    def cross_entropy_forward(
        logits_ptr,  # (M, V)
        labels_ptr,  # (M,) int64
        loss_ptr,  # (M,) fp32
        counts_ptr,  # (M, 2) int32: whether the label has the highest logit, whether there is a label
        top_ptr,  # (M,) fp32
        total_ptr,  # (M,) fp32
        stride,
        V,
        BLOCK: tl.constexpr,
    ):
        """Loss, counts, maximum and sum of exp of one row. Each lane has its own; they meet after the last block."""
        row = tl.program_id(0).to(tl.int64)  # M * V may exceed 2^31
        logits_ptr += row * stride
        label = tl.load(labels_ptr + row)
        # A label of V or more gives NaN, and reads nothing.
        picked = tl.load(logits_ptr + tl.maximum(label, 0), mask=label < V, other=float("nan")).to(tl.float32)
        top = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)  # fp32's lowest: -inf would give inf - inf
        total = tl.zeros((BLOCK,), tl.float32)
        best = tl.arange(0, BLOCK)  # column of the maximum
        for first in range(0, V, BLOCK):
            column = first + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + column, mask=column < V, other=float("-inf")).to(tl.float32)
            higher = x > top
            ratio = tl.exp(-tl.abs(x - top))  # of the new term to the sum, or of the old sum to the new term
            total = tl.where(higher, total * ratio + 1.0, total + ratio)
            best = tl.where(higher, column, best)
            top = tl.where(higher, x, top)
        row_top = tl.max(top, axis=0)
        row_total = tl.sum(total * tl.exp(top - row_top), axis=0)
        row_best = tl.min(tl.where(top == row_top, best, V), axis=0)  # the first of equal ones
        labelled = label >= 0
        tl.store(loss_ptr + row, tl.where(labelled, tl.log(row_total) - (picked - row_top), 0.0))
        tl.store(counts_ptr + 2 * row, (row_best == label).to(tl.int32))
        tl.store(counts_ptr + 2 * row + 1, labelled.to(tl.int32))
        tl.store(top_ptr + row, row_top)
        tl.store(total_ptr + row, row_total)

    @triton.jit
    def cross_entropy_backward(
        logits_ptr,  # (M, V), overwritten
        labels_ptr,  # (M,) int64
        top_ptr,  # (M,) fp32
        total_ptr,  # (M,) fp32
        dloss_ptr,  # () fp32
        stride,
        V,
        columns,  # tiles across a row
        BLOCK: tl.constexpr,
    ):
        """One tile: dlogit = dloss * (exp(logit - maximum) / sum - [column is the label]); 0 without a label."""
        row = (tl.program_id(0) // columns).to(tl.int64)
        column = tl.program_id(0) % columns * BLOCK + tl.arange(0, BLOCK)
        logits_ptr += row * stride + column
        x = tl.load(logits_ptr, mask=column < V, other=float("-inf")).to(tl.float32)
        label = tl.load(labels_ptr + row)
        p = tl.exp(x - tl.load(top_ptr + row)) / tl.load(total_ptr + row)
        dloss = tl.where(label < V, tl.load(dloss_ptr), float("nan"))
        dlogit = tl.where(column == label, p - 1.0, p) * dloss
        tl.store(logits_ptr, tl.where(label < 0, 0.0, dlogit), mask=column < V)


BLOCK = 2048
"""Maximal number of logits that a program loads at a time, 16 per thread. Chosen by compiling for sm_90 in bf16: the
forward's 72 registers leave room for 7 programs, with 28 KB of loads in flight; 20 KB with 1,024. Nothing is timed."""


def tile(V: int) -> dict[str, int]:
    """Block and number of warps."""
    return {"BLOCK": min(BLOCK, max(16, triton.next_power_of_2(V))), "num_warps": 4}


def fused_forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``masked_lm_loss._forward`` returns, for logits of ``rows_of`` and contiguous int64 labels."""
    M, V = logits.shape
    loss, top, total = (torch.empty(M, dtype=torch.float32, device=logits.device) for _ in range(3))
    counts = torch.empty(M, 2, dtype=torch.int32, device=logits.device)
    launch(cross_entropy_forward, M, logits, labels, loss, counts, top, total, logits.stride(0), V, **tile(V))
    return loss, counts, top, total


def fused_backward(dloss: Tensor, logits: Tensor, labels: Tensor, top: Tensor, total: Tensor) -> None:
    """Overwrites the logits by their gradient, as ``masked_lm_loss._backward``."""
    (M, V), options = logits.shape, tile(logits.shape[1])
    columns = triton.cdiv(V, options["BLOCK"])
    sizes = (logits.stride(0), V, columns)
    launch(cross_entropy_backward, M * columns, logits, labels, top, total, dloss, *sizes, **options)
    torch.autograd.graph.increment_version(logits)  # torch does not see what a kernel writes
