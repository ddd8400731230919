"""dropout(gelu(gate) * up) from the packed product of a gated linear unit, forward and backward, in Triton.

GEGLU: Shazeer, 2020, arXiv 2002.05202; the GELU is exact: gelu(x) = x * Phi(x), Phi the normal distribution function.
Letters: T rows, I width.

Saved for the backward: the packed (T, 2I) and dropout's key, 8 bytes. The backward recomputes gelu and the mask, and
writes both halves of the packed gradient (T, 2I) itself, without a concatenation.

Launch: tiles of ROWS x BLOCK of the output, numbered row by row; one-dimensional grid; see ``tile``.
"""

# pyright: reportOptionalMemberAccess=false

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .triton_common import dropout_scale, dropout_threshold, launch, ops_of, rows_of

try:
    import triton
    import triton.language as tl
except ImportError:  # see triton_common.py
    triton = None

if triton is not None:
    from .triton_common import keep_mask

    # As in layer_norm_triton.py, what changes with the batch is not specialised.
    @triton.jit(do_not_specialize=["key_ptr", "T"])
    def geglu_forward(
        gate_and_up_ptr,  # (T, 2I)
        key_ptr,  # (1,) int64
        out_ptr,  # (T, I), contiguous
        stride,
        T,
        I,  # noqa: E741
        columns,  # tiles across a row
        threshold,
        scale,
        DROPOUT: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One tile of the output."""
        across = tl.program_id(0) % columns
        row = tl.program_id(0) // columns * ROWS + tl.arange(0, ROWS)
        row64 = row.to(tl.int64)[:, None]  # T * 2I may exceed 2^31
        column = across * BLOCK + tl.arange(0, BLOCK)[None, :]
        real = (row[:, None] < T) & (column < I)  # (ROWS, BLOCK)
        gate_ptr = gate_and_up_ptr + row64 * stride + column
        gate = tl.load(gate_ptr, mask=real, other=0.0).to(tl.float32)
        up = tl.load(gate_ptr + I, mask=real, other=0.0).to(tl.float32)
        out = gate * (0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)) * up
        if DROPOUT:
            group = across * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
            keep = keep_mask(tl.load(key_ptr), row, group, threshold, BLOCK)
            out = tl.where(keep, out * scale, 0.0)
        tl.store(out_ptr + row64 * I + column, out, mask=real)

    @triton.jit(do_not_specialize=["key_ptr", "T"])
    def geglu_backward(
        dout_ptr,  # (T, I), contiguous
        gate_and_up_ptr,  # (T, 2I)
        key_ptr,  # (1,) int64
        dgate_and_up_ptr,  # (T, 2I), contiguous
        stride,
        T,
        I,  # noqa: E741
        columns,
        threshold,
        scale,
        DROPOUT: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One tile: dup = dout * gelu(gate), dgate = dout * up * (Phi(gate) + gate * phi(gate))."""
        across = tl.program_id(0) % columns
        row = tl.program_id(0) // columns * ROWS + tl.arange(0, ROWS)
        row64 = row.to(tl.int64)[:, None]
        column = across * BLOCK + tl.arange(0, BLOCK)[None, :]
        real = (row[:, None] < T) & (column < I)  # (ROWS, BLOCK)
        gate_ptr = gate_and_up_ptr + row64 * stride + column
        gate = tl.load(gate_ptr, mask=real, other=0.0).to(tl.float32)
        up = tl.load(gate_ptr + I, mask=real, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + row64 * I + column, mask=real, other=0.0).to(tl.float32)
        if DROPOUT:
            group = across * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
            keep = keep_mask(tl.load(key_ptr), row, group, threshold, BLOCK)
            dout = tl.where(keep, dout * scale, 0.0)
        distribution = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
        density = tl.exp(-0.5 * gate * gate) * 0.3989422804014327
        dgate_ptr = dgate_and_up_ptr + row64 * (2 * I) + column
        tl.store(dgate_ptr, dout * up * (distribution + gate * density), mask=real)
        tl.store(dgate_ptr + I, dout * gate * distribution, mask=real)


TILE = 2048
"""Elements of a tile: 16 registers per thread for each value. Other sizes are not timed."""
BLOCK = 1024
"""Maximal number of columns of a tile: 3,072, the base model's width, is three of them, without masked lanes."""


@cache
def tile(I: int) -> dict[str, int]:  # noqa: E741
    """Tile and number of warps."""
    block = min(BLOCK, max(16, triton.next_power_of_2(I)))
    return {"ROWS": max(1, TILE // block), "BLOCK": block, "num_warps": 4}


def _launch(kernel: Any, gate_and_up: Tensor, dropout_p: float, *tensors: Tensor) -> None:
    (T, width), options, threshold = gate_and_up.shape, tile(gate_and_up.shape[1] // 2), dropout_threshold(dropout_p)
    columns = -(-width // (2 * options["BLOCK"]))
    programs = -(-T // options["ROWS"]) * columns
    sizes = (gate_and_up.stride(0), T, width // 2, columns, threshold, dropout_scale(threshold))
    launch(kernel, programs, *tensors, *sizes, DROPOUT=threshold > 0, **options)


def _forward(gate_and_up: Tensor, key: Tensor | None, dropout_p: float) -> Tensor:
    """(T, I)."""
    T, width = gate_and_up.shape
    out = torch.empty(T, width // 2, dtype=gate_and_up.dtype, device=gate_and_up.device)
    # Without dropout the key is not read.
    _launch(geglu_forward, gate_and_up, dropout_p, gate_and_up, gate_and_up if key is None else key, out)
    return out


def _backward(dout: Tensor, gate_and_up: Tensor, key: Tensor | None, dropout_p: float) -> Tensor:
    """(T, 2I)."""
    grad = torch.empty(gate_and_up.shape, dtype=gate_and_up.dtype, device=gate_and_up.device)
    tensors = (gate_and_up, gate_and_up if key is None else key, grad)
    _launch(geglu_backward, gate_and_up, dropout_p, dout.contiguous(), *tensors)
    return grad


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate_and_up, key, ctx.dropout_p = inputs
    ctx.save_for_backward(gate_and_up, key)


def _gradients(ctx: Any, backward: Callable[..., Tensor], dout: Tensor) -> tuple[Tensor, None, None]:
    return backward(dout, *ctx.saved_tensors, ctx.dropout_p), None, None


class _Geglu(torch.autograd.Function):
    """For eager mode, in which a custom op is slower."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        out = _forward(*inputs)
        _save(ctx, inputs, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _gradients(ctx, _backward, dout)


# For torch.compile, as in layer_norm_triton.py.
_forward_op = torch.library.custom_op(
    f"{ops_of(__name__)}::forward", _forward, mutates_args=(), device_types=("cpu", "cuda")
)
_backward_op = torch.library.custom_op(
    f"{ops_of(__name__)}::backward", _backward, mutates_args=(), device_types=("cpu", "cuda")
)


@_forward_op.register_fake
def _(gate_and_up, key, dropout_p):
    return gate_and_up.new_empty(gate_and_up.shape[0], gate_and_up.shape[1] // 2)


@_backward_op.register_fake
def _(dout, gate_and_up, key, dropout_p):
    return gate_and_up.new_empty(gate_and_up.shape)


_forward_op.register_autograd(lambda ctx, dout: _gradients(ctx, _backward_op, dout), setup_context=_save)


def geglu(gate_and_up: Tensor, dropout_p: float = 0.0, key: Tensor | None = None) -> Tensor:
    """dropout(gelu(gate) * up).

    Args:
        gate_and_up: (..., 2I) in fp16, bf16 or fp32, the gate first; rows may be strided.
        dropout_p: probability of dropping an element, rounded down to a multiple of 2^-16; kept elements are divided
            by the share that is kept.
        key: (1,) int64 on the same device; determines dropout's mask. Required if ``dropout_p`` is not 0.

    Returns:
        (..., I), contiguous, in the same dtype; computed in fp32.

    Raises:
        TypeError: unsupported dtype.
        ValueError: no key, an odd width, a probability outside [0, 1), or a device without kernels.
    """
    if dropout_p and key is None:
        raise ValueError("GEGLU kernel: dropout needs a key; make one by triton_common.draw_key(x)")
    if gate_and_up.shape[-1] % 2:
        raise ValueError(f"GEGLU kernel: expected an even number of columns, got {gate_and_up.shape[-1]}")
    run: Any = _forward_op if torch.compiler.is_compiling() else _Geglu.apply
    out = run(rows_of(gate_and_up), key, dropout_p)
    return out if gate_and_up.dim() == 2 else out.unflatten(0, gate_and_up.shape[:-1])
