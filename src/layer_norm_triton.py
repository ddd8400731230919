"""LayerNorm(residual + dropout(x)) in one pass over memory, forward and backward, in Triton.

LayerNorm: Ba et al., 2016, arXiv 1607.06450. Sum and statistics are in fp32, whatever the dtypes of the inputs.

Letters: T rows, D hidden size, P programs of the backward.

Saved for the backward: x and the residual, both (T, D), which the products before save too; mean and 1/std, (T,) fp32
each; the parameters; dropout's key, 8 bytes. The backward recomputes dropout's mask and the normalised x.

dweight and dbias are sums over rows. Each of P programs adds up its own rows in registers, in a fixed order, and torch
adds up the P partial sums. There are no atomics: the same input gives the same bits.

Launch: tiles of ROWS x BLOCK_D, D padded to a power of two and masked; one-dimensional grid; see ``tile``.
"""

# pyright: reportOptionalMemberAccess=false, reportArgumentType=false

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

    # Not specialised: what changes with the batch, which would compile the kernel again for 1 and for multiples of 16,
    # and the address of the key, one of many in a row.
    @triton.jit(do_not_specialize=["key_ptr", "T"])
    def layer_norm_forward(
        x_ptr,  # (T, D)
        residual_ptr,  # (T, D)
        weight_ptr,  # (D,)
        bias_ptr,  # (D,)
        key_ptr,  # (1,) int64
        y_ptr,  # (T, D), contiguous
        mean_ptr,  # (T,) fp32
        rstd_ptr,  # (T,) fp32
        x_stride,
        residual_stride,
        T,
        D,
        eps,
        threshold,
        scale,
        RESIDUAL: tl.constexpr,
        DROPOUT: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        """y, mean and 1/std of one tile of rows."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
        row64 = row.to(tl.int64)[:, None]  # T * D may exceed 2^31
        column = tl.arange(0, BLOCK_D)[None, :]
        real = (row[:, None] < T) & (column < D)  # (ROWS, BLOCK_D)
        z = tl.load(x_ptr + row64 * x_stride + column, mask=real, other=0.0).to(tl.float32)
        if DROPOUT:
            keep = keep_mask(tl.load(key_ptr), row, tl.arange(0, BLOCK_D // 8), threshold, BLOCK_D)
            z = tl.where(keep, z * scale, 0.0)
        if RESIDUAL:
            z += tl.load(residual_ptr + row64 * residual_stride + column, mask=real, other=0.0).to(tl.float32)
        mean = tl.sum(z, axis=1) / D
        centred = tl.where(real, z - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / D + eps)
        weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + column, mask=column < D, other=0.0).to(tl.float32)
        tl.store(mean_ptr + row, mean, mask=row < T)  # stored before y: after it, one build spills
        tl.store(rstd_ptr + row, rstd, mask=row < T)
        y = centred * rstd[:, None] * weight + bias
        tl.store(y_ptr + row64 * D + column, y, mask=real)

    @triton.jit(do_not_specialize=["key_ptr", "T", "tiles"])
    def layer_norm_backward(
        dy_ptr,  # (T, D), contiguous
        x_ptr,  # (T, D)
        residual_ptr,  # (T, D)
        weight_ptr,  # (D,)
        key_ptr,  # (1,) int64
        mean_ptr,  # (T,) fp32
        rstd_ptr,  # (T,) fp32
        dx_ptr,  # (T, D), contiguous
        dresidual_ptr,  # (T, D), contiguous
        partial_ptr,  # (2, P, D) fp32: this program's part of dweight and of dbias
        x_stride,
        residual_stride,
        T,
        D,
        tiles,
        threshold,
        scale,
        RESIDUAL: tl.constexpr,
        WRITE_DRESIDUAL: tl.constexpr,
        DROPOUT: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        """dx, dresidual and the partial sums, of every P-th tile of rows, at most ``tiles`` of them.

        With n = (z - mean) * rstd and g = dy * weight: dz = rstd * (g - mean(g) - n * mean(g * n)).
        """
        program, programs = tl.program_id(0), tl.num_programs(0)
        column = tl.arange(0, BLOCK_D)[None, :]
        weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
        dweight = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
        dbias = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
        for i in range(tiles):
            row = (i * programs + program) * ROWS + tl.arange(0, ROWS)
            row64 = row.to(tl.int64)[:, None]
            real = (row[:, None] < T) & (column < D)
            # Statistics first, sums last: in another order some builds spill a register or two.
            mean = tl.load(mean_ptr + row, mask=row < T, other=0.0)[:, None]
            rstd = tl.load(rstd_ptr + row, mask=row < T, other=0.0)[:, None]
            z = tl.load(x_ptr + row64 * x_stride + column, mask=real, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + row64 * D + column, mask=real, other=0.0).to(tl.float32)
            if DROPOUT:
                keep = keep_mask(tl.load(key_ptr), row, tl.arange(0, BLOCK_D // 8), threshold, BLOCK_D)
                z = tl.where(keep, z * scale, 0.0)
            if RESIDUAL:
                z += tl.load(residual_ptr + row64 * residual_stride + column, mask=real, other=0.0).to(tl.float32)
            n = (z - mean) * rstd  # not 0 beyond D, but dy is
            g = dy * weight
            dz = rstd * (g - tl.sum(g, axis=1)[:, None] / D - n * (tl.sum(g * n, axis=1)[:, None] / D))
            if WRITE_DRESIDUAL:
                tl.store(dresidual_ptr + row64 * D + column, dz, mask=real)
            if DROPOUT:
                dz = tl.where(keep, dz * scale, 0.0)
            tl.store(dx_ptr + row64 * D + column, dz, mask=real)
            dweight += dy * n
            dbias += dy
        offset = program.to(tl.int64) * D + tl.arange(0, BLOCK_D)
        mask = tl.arange(0, BLOCK_D) < D
        tl.store(partial_ptr + offset, tl.sum(dweight, axis=0), mask=mask)
        tl.store(partial_ptr + programs.to(tl.int64) * D + offset, tl.sum(dbias, axis=0), mask=mask)


MAX_D = 4096
"""A program holds a row in registers; from 8,192 on the backward spills."""
PROGRAMS = 512
"""Maximal P: four per multiprocessor of the largest cards. The same number on each card, for the same bits of dweight
and dbias."""
TILES = {
    "forward": {"elements": 1024, "per_warp": 1024, "max_warps": 4},
    "backward": {"elements": 1024, "per_warp": 256, "max_warps": 16},
}
"""``elements`` of a tile for small D, and ``per_warp``. Forward: up to D = 1,024 one warp computes a row, 32 elements
per thread; its sums need no barrier. Backward: 8 elements per thread: each takes 10 registers with the sums over rows,
and with 16, D = 768 spills on sm_90. Chosen by compiling for sm_80 and sm_90; other sizes are not timed."""


@cache
def tile(D: int, kind: str) -> dict[str, int]:
    """Tile and number of warps for ``kind`` forward or backward.

    Raises:
        ValueError: D is more than MAX_D.
    """
    if D > MAX_D:
        raise ValueError(f"LayerNorm kernel: expected hidden size of at most {MAX_D}, got {D}; set kernels to torch")
    block, choice = max(16, triton.next_power_of_2(D)), TILES[kind]
    rows = max(1, choice["elements"] // block)
    warps = min(choice["max_warps"], max(1, rows * block // choice["per_warp"]))
    return {"ROWS": rows, "BLOCK_D": block, "num_warps": warps}


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    key: Tensor | None,
    eps: float,
    dropout_p: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, D), mean (T,), 1/std (T,)."""
    T, D = x.shape
    y = torch.empty(T, D, dtype=out_dtype, device=x.device)
    mean, rstd = (torch.empty(T, dtype=torch.float32, device=x.device) for _ in range(2))
    options, threshold = tile(D, "forward"), dropout_threshold(dropout_p)
    # Absent tensors are not read; x stands in for them.
    pointers = (x, x if residual is None else residual, weight, bias, x if key is None else key, y, mean, rstd)
    sizes = (x.stride(0), 0 if residual is None else residual.stride(0), T, D, eps, threshold, dropout_scale(threshold))
    flags = {"RESIDUAL": residual is not None, "DROPOUT": threshold > 0}
    launch(layer_norm_forward, -(-T // options["ROWS"]), *pointers, *sizes, **flags, **options)
    return y, mean, rstd


def _new_dresidual(x: Tensor, residual: Tensor | None, threshold: int) -> Tensor:
    """Memory for dresidual (T, D); (0,) if there is no residual, or if dx equals dresidual."""
    if residual is None or (not threshold and residual.dtype == x.dtype):
        return x.new_empty(0)
    return torch.empty(residual.shape, dtype=residual.dtype, device=x.device)


def _backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    key: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (T, D), dresidual (T, D) or (0,) as ``_new_dresidual`` says, dweight and dbias as one (2, D) fp32."""
    T, D = x.shape
    dy = dy.contiguous()  # may be an expanded scalar
    options, threshold = tile(D, "backward"), dropout_threshold(dropout_p)
    dx = torch.empty(T, D, dtype=x.dtype, device=x.device)
    dresidual = _new_dresidual(x, residual, threshold)
    tiles = -(-T // options["ROWS"])
    programs = min(PROGRAMS, tiles)
    partial = torch.empty(2, programs, D, dtype=torch.float32, device=x.device)
    given = (dy, x, x if residual is None else residual, weight, x if key is None else key, mean, rstd)
    sizes = (x.stride(0), 0 if residual is None else residual.stride(0), T, D, -(-tiles // max(programs, 1)))
    flags = {"RESIDUAL": residual is not None, "WRITE_DRESIDUAL": dresidual.ndim == 2, "DROPOUT": threshold > 0}
    args = (*given, dx, dresidual, partial, *sizes, threshold, dropout_scale(threshold))
    launch(layer_norm_backward, programs, *args, **flags, **options)
    return dx, dresidual, partial.sum(1)


def _save(ctx: Any, inputs: tuple[Any, ...], mean: Tensor, rstd: Tensor) -> None:
    x, residual, weight, _, key, _, dropout_p, _ = inputs
    ctx.save_for_backward(x, residual, weight, mean, rstd, key)
    ctx.dropout_p = dropout_p


def _gradients(ctx: Any, backward: Callable[..., tuple[Tensor, ...]], dy: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the arguments of ``_forward``."""
    saved = ctx.saved_tensors  # read once: with checkpointing, reading recomputes the layer
    residual = saved[1]
    dx, dresidual, dparameters = backward(dy, *saved, ctx.dropout_p)
    if residual is None:
        dresidual = None
    elif dresidual.ndim == 1:
        dresidual = dx
    return dx, dresidual, *dparameters.unbind(), None, None, None, None  # autograd casts to the parameters' dtype


class _LayerNorm(torch.autograd.Function):
    """For eager mode, in which a custom op is slower."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, mean, rstd = _forward(*inputs)
        _save(ctx, inputs, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _gradients(ctx, _backward, dy)


# torch.compile cannot trace a launch, so it gets the same two functions as custom ops.
_forward_op = torch.library.custom_op(
    f"{ops_of(__name__)}::forward", _forward, mutates_args=(), device_types=("cpu", "cuda")
)
_backward_op = torch.library.custom_op(
    f"{ops_of(__name__)}::backward", _backward, mutates_args=(), device_types=("cpu", "cuda")
)


@_forward_op.register_fake
def _(x, residual, weight, bias, key, eps, dropout_p, out_dtype):
    statistics = x.new_empty(x.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=out_dtype), statistics, torch.empty_like(statistics)


@_backward_op.register_fake
def _(dy, x, residual, weight, mean, rstd, key, dropout_p):
    dresidual = _new_dresidual(x, residual, dropout_threshold(dropout_p))
    return x.new_empty(x.shape), dresidual, mean.new_empty(2, x.shape[1])


_forward_op.register_autograd(
    lambda ctx, dy, *_: _gradients(ctx, _backward_op, dy),
    setup_context=lambda ctx, inputs, output: _save(ctx, inputs, *output[1:]),
)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    key: Tensor | None = None,
) -> Tensor:
    """LayerNorm(residual + dropout(x)) over the last dimension.

    Args:
        x: (..., D) in fp16, bf16 or fp32; rows may be strided.
        weight, bias: (D,).
        eps: added to the variance.
        residual: of the shape of ``x``, any of the three dtypes.
        dropout_p: probability of dropping an element of ``x``, rounded down to a multiple of 2^-16; kept elements are
            divided by the share that is kept.
        key: (1,) int64 on the device of ``x``; determines dropout's mask. Required if ``dropout_p`` is not 0.

    Returns:
        The shape of ``x``, contiguous, in the autocast dtype, or without autocast in the dtype of ``x``.

    Raises:
        TypeError: unsupported dtype.
        ValueError: no key, D above MAX_D, a probability outside [0, 1), or a device without kernels.
    """
    if dropout_p and key is None:
        raise ValueError("LayerNorm kernel: dropout needs a key; make one by triton_common.draw_key(x)")
    device = x.device.type
    out_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    inputs = (rows_of(x), None if residual is None else rows_of(residual), weight, bias, key, eps, dropout_p, out_dtype)
    y: Any = _forward_op(*inputs)[0] if torch.compiler.is_compiling() else _LayerNorm.apply(*inputs)
    return y if x.dim() == 2 else y.view(x.shape)
