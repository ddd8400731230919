"""Plain torch counterparts of layer_norm_triton.py and geglu_triton.py, for CPUs and as their reference; and dropout.

Letters: T rows, D hidden size, I width of the gated linear unit.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .graphs import in_graph
from .triton_common import MASK_BITS, dropout_scale, dropout_threshold


def dropout(x: Tensor, dropout_p: float, training: bool = True) -> Tensor:
    """``F.dropout``, 4 times as fast on a CPU: an element uses 16 of the 64 random bits that one draw gives.

    On a CPU the probability is rounded down to a multiple of 2^-16. Kept elements are divided by the share of elements
    kept, so the expectation is exact. On a GPU, and under torch.compile, it is ``F.dropout`` itself.

    Raises:
        ValueError: ``dropout_p`` is not in [0, 1).
    """
    threshold = dropout_threshold(dropout_p)
    if not training or not threshold:
        return x
    if x.device.type != "cpu" or in_graph():
        return F.dropout(x, dropout_p)
    return _Dropout.apply(x, keep_mask(x, threshold), dropout_scale(threshold))  # pyright: ignore[reportReturnType]


def keep_mask(x: Tensor, threshold: int) -> Tensor:
    """A random bool mask of the shape of ``x``, true where dropout keeps: where 16 bits are at least ``threshold``."""
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)  # all 64 bits
    bits = words.view(torch.int16)[: x.numel()]  # signed, so the threshold is shifted
    return (bits >= threshold - 2 ** (MASK_BITS - 1)).view(x.shape)


class _Dropout(torch.autograd.Function):
    """x * keep * scale; saves the mask, one byte per element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return (x * keep).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (keep,) = ctx.saved_tensors
        return (dout * keep).mul_(ctx.scale), None, None


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    """LayerNorm(residual + dropout(x)), (..., D), with sum and statistics at least in fp32.

    The result has the autocast dtype, or without autocast the dtype of ``x``.
    """
    device = x.device.type
    out_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    x = dropout(x, dropout_p)
    with torch.autocast(device, enabled=False):
        dtype = torch.promote_types(weight.dtype, torch.promote_types(x.dtype, torch.float32))
        x = x.to(dtype)
        if residual is not None:
            x = x + residual
        return F.layer_norm(x, weight.shape, weight.to(dtype), bias.to(dtype), eps).to(out_dtype)


def geglu(gate_and_up: Tensor, dropout_p: float = 0.0) -> Tensor:
    """dropout(gelu(gate) * up), (..., I), from the packed (..., 2I) whose first half is the gate; exact GELU."""
    if in_graph():
        gate, up = gate_and_up.chunk(2, dim=-1)
        return dropout(F.gelu(gate) * up, dropout_p)
    return _Geglu.apply(gate_and_up, dropout_threshold(dropout_p))  # pyright: ignore[reportReturnType]


class _Geglu(torch.autograd.Function):
    """Saves only the packed product and dropout's mask, one byte per element; writes both halves of its gradient.

    Autograd would also save gelu(gate), and concatenate the halves.
    """

    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor, threshold: int) -> Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        out = F.gelu(gate).mul_(up)
        keep, ctx.scale = keep_mask(out, threshold) if threshold else None, dropout_scale(threshold)
        ctx.save_for_backward(gate_and_up, keep)
        return out if keep is None else out.mul_(keep).mul_(ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate_and_up, keep = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        grad = torch.empty_like(gate_and_up, memory_format=torch.contiguous_format)
        dgate, dup = grad.chunk(2, dim=-1)
        if keep is not None:
            dout = (dout * keep).mul_(ctx.scale)
        torch.mul(F.gelu(gate), dout, out=dup)
        torch.ops.aten.gelu_backward.grad_input(dout * up, gate, grad_input=dgate)  # pyright: ignore
        return grad, None
