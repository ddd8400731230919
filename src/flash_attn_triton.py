"""FlashAttention over unpadded sequences, with ALiBi computed inside the tile: forward and backward, in Triton.

Source: online softmax and recomputation from Dao et al., 2022 (FlashAttention, arXiv 2205.14135); one kernel per
gradient and parallelism over rows from Dao, 2023 (FlashAttention-2, arXiv 2307.08691); ALiBi from Press et al., 2021
(arXiv 2108.12409). docs/kernels.md derives the gradients. attention.py's ``reference`` is the same in plain PyTorch.

Letters: B sequences, T tokens, N heads, H head size. In kernels: ROWS and COLS of a tile, BLOCK_H = H padded to a power
of two. As a suffix they give a tensor's shape: q_TNH is (T, N, H).

    forward   a program takes ROWS queries of one sequence and head, loops over the keys         -> out, lse
    delta     sum over H of do * out, per token and head                                         -> delta
    dkdv      a program takes ROWS keys, loops over the queries                                  -> dk, dv
    dq        a program takes ROWS queries, loops over the keys                                  -> dq
    whole     instead of the last three, if all sequences have at most ROWS tokens: a program takes a whole sequence,
              loops over its queries                                                             -> dq, dk, dv

A program finds its rows in a table (attention_tiles.py), so there is no padding, no idle program and no limit on
length. Nothing has size (S, S). There are no atomics: the same input gives the same bits.

Scores are in base 2: s = (q.k * H^-0.5 - slope * |i - j|) * log2(e). Then the softmax is exp2(s - lse) with
lse = log2(sum(exp2(s))). fp16 and bf16 accumulate in fp32; fp32 is computed in fp32 ("ieee"), not in TF32.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .attention_tiles import Tile, architecture, padded_head_size, tile_tables, tiles_for
from .bert_padding import Layout
from .triton_common import DTYPES, interpreted, launch, ops_of

try:
    import triton
    import triton.language as tl
except ImportError:  # see triton_common.py
    triton = None

LOG2E = math.log2(math.e)


# ----------------------------------------------------------------------------------------------------------------------
# Kernels
# ----------------------------------------------------------------------------------------------------------------------

if triton is not None:

    @triton.jit
    def _dot(a, b, UPCAST: tl.constexpr):
        """a @ b in fp32. UPCAST: in the interpreter, whose product of bf16 is wrong."""
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, input_precision="ieee")

    @triton.jit
    def _tile_of(tiles_ptr, num_heads, ROWS: tl.constexpr) -> Any:
        """Of this program: first token and length of the sequence, the tile's rows in it (ROWS,), and the head."""
        head = tl.program_id(0) % num_heads
        entry_ptr = tiles_ptr + 3 * (tl.program_id(0) // num_heads)
        rows = tl.load(entry_ptr + 2) + tl.arange(0, ROWS)
        return tl.load(entry_ptr), tl.load(entry_ptr + 1), rows, head.to(tl.int64)

    @triton.jit
    def _load(x_ptr, stride_t, start, rows, length, dims, H: tl.constexpr, MASKED=True):
        """Rows of one head of a (T, N, H) tensor: (ROWS, BLOCK_H), zero beyond H and, if MASKED, beyond the end."""
        tokens = (start + rows).to(tl.int64)
        mask = (rows < length)[:, None] & (dims < H)[None, :] if MASKED else (dims < H)[None, :]
        return tl.load(x_ptr + tokens[:, None] * stride_t + dims[None, :], mask=mask, other=0.0)

    @triton.jit
    def _store(x_ptr, stride_t, start, rows, length, dims, x, H: tl.constexpr):
        """The inverse of _load."""
        tokens = (start + rows).to(tl.int64)
        mask = (rows < length)[:, None] & (dims < H)[None, :]
        tl.store(x_ptr + tokens[:, None] * stride_t + dims[None, :], x.to(x_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _distance(rows, cols):
        """|i - j|, (ROWS, COLS) fp32. The absolute value of a float is part of the next product."""
        return tl.abs((rows[:, None] - cols[None, :]).to(tl.float32))

    @triton.jit
    def _forward_step(
        state,  # highest score (ROWS,), sums of exp2(score - highest) without (ROWS,) and with the values
        first,  # of the COLS keys of this step
        q,  # (ROWS, BLOCK_H)
        k_ptr,  # of this head
        v_ptr,
        stride_kt,
        stride_vt,
        start,
        length,
        rows,
        dims,
        scale_log2,
        slope_log2,
        H: tl.constexpr,
        COLS: tl.constexpr,
        UPCAST: tl.constexpr,
        MASKED,  # keys may be beyond the end
    ):
        """The state with COLS more keys (online softmax)."""
        highest, total, acc = state
        cols = first + tl.arange(0, COLS)
        k = _load(k_ptr, stride_kt, start, cols, length, dims, H, MASKED)  # (COLS, BLOCK_H)
        v = _load(v_ptr, stride_vt, start, cols, length, dims, H, MASKED)
        scores = _dot(q, tl.trans(k), UPCAST) * scale_log2 - slope_log2 * _distance(rows, cols)  # (ROWS, COLS)
        if MASKED:
            scores = tl.where((cols < length)[None, :], scores, float("-inf"))
        # A step's first key exists, so ``highest`` is finite after it, in rows beyond the end too.
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        correction = tl.exp2(highest - new_highest)
        probs = tl.exp2(scores - new_highest[:, None])
        total = total * correction + tl.sum(probs, 1)
        acc = acc * correction[:, None] + _dot(probs.to(v.dtype), v, UPCAST)
        return new_highest, total, acc

    @triton.jit(do_not_specialize=["stride_lse"])
    def flash_attn_forward(
        q_ptr,  # (T, N, H)
        k_ptr,  # (T, N, H)
        v_ptr,  # (T, N, H)
        out_ptr,  # (T, N, H)
        lse_ptr,  # (N, T) fp32, log2 of the softmax's denominator
        slopes_ptr,  # (N,) fp32
        tiles_ptr,  # (n, 3) int32, see tile_table
        stride_qt,  # from token to token; q[t, n] itself is contiguous
        stride_qn,  # from head to head
        stride_kt,
        stride_kn,
        stride_vt,
        stride_vn,
        stride_ot,
        stride_on,
        stride_lse,  # T
        num_heads,
        scale_log2,  # H^-0.5 * log2(e)
        H: tl.constexpr,
        BLOCK_H: tl.constexpr,
        ROWS: tl.constexpr,
        COLS: tl.constexpr,
        UPCAST: tl.constexpr,
    ):
        """out and lse of ROWS queries: one pass over the sequence's keys, with the online softmax."""
        start, length, rows, head = _tile_of(tiles_ptr, num_heads, ROWS)  # pyright: ignore
        dims = tl.arange(0, BLOCK_H)
        slope_log2 = tl.load(slopes_ptr + head) * 1.4426950408889634
        q = _load(q_ptr + head * stride_qn, stride_qt, start, rows, length, dims, H)  # (ROWS, BLOCK_H)

        k_ptr, v_ptr = k_ptr + head * stride_kn, v_ptr + head * stride_vn
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        state = highest, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, BLOCK_H], tl.float32)
        args = q, k_ptr, v_ptr, stride_kt, stride_vt, start, length, rows, dims, scale_log2, slope_log2
        # Only the last step can have keys beyond the end. It comes first: in the keys' order, more tiles spill. In fp32
        # two copies of the step spill, so one loop masks each step.
        full = 0 if q.dtype == tl.float32 else length // COLS * COLS
        for first in range(full, length, COLS):
            state = _forward_step(state, first, *args, H, COLS, UPCAST, True)
        for first in range(0, full, COLS):
            state = _forward_step(state, first, *args, H, COLS, UPCAST, False)
        highest, total, acc = state
        _store(out_ptr + head * stride_on, stride_ot, start, rows, length, dims, acc / total[:, None], H)
        tl.store(lse_ptr + head * stride_lse + start + rows, highest + tl.log2(total), mask=rows < length)

    @triton.jit(do_not_specialize=["stride_delta", "num_tokens"])
    def flash_attn_delta(
        out_ptr,  # (T, N, H)
        do_ptr,  # (T, N, H)
        delta_ptr,  # (N, T) fp32
        stride_ot,
        stride_on,
        stride_dot,
        stride_don,
        stride_delta,  # T
        num_heads,
        num_tokens,
        H: tl.constexpr,
        BLOCK_H: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """delta = sum over H of do * out, in fp32; the softmax's gradient is probs * (dprobs - delta)."""
        head = (tl.program_id(0) % num_heads).to(tl.int64)
        rows = tl.program_id(0) // num_heads * ROWS + tl.arange(0, ROWS)
        dims = tl.arange(0, BLOCK_H)
        out = _load(out_ptr + head * stride_on, stride_ot, 0, rows, num_tokens, dims, H).to(tl.float32)
        do = _load(do_ptr + head * stride_don, stride_dot, 0, rows, num_tokens, dims, H).to(tl.float32)
        tl.store(delta_ptr + head * stride_delta + rows, tl.sum(out * do, 1), mask=rows < num_tokens)

    @triton.jit(do_not_specialize=["stride_lse"])
    def flash_attn_dkdv(
        q_ptr,  # (T, N, H)
        k_ptr,  # (T, N, H)
        v_ptr,  # (T, N, H)
        do_ptr,  # (T, N, H)
        dk_ptr,  # (T, N, H)
        dv_ptr,  # (T, N, H)
        lse_ptr,  # (N, T) fp32, log2 of the softmax's denominator
        delta_ptr,  # (N, T) fp32
        slopes_ptr,  # (N,) fp32
        tiles_ptr,  # (n, 3) int32, see tile_table
        stride_qt,  # from token to token; q[t, n] itself is contiguous
        stride_qn,  # from head to head
        stride_kt,
        stride_kn,
        stride_vt,
        stride_vn,
        stride_dot,
        stride_don,
        stride_dkt,
        stride_dkn,
        stride_dvt,
        stride_dvn,
        stride_lse,  # T
        num_heads,
        scale,  # H^-0.5
        scale_log2,  # H^-0.5 * log2(e)
        H: tl.constexpr,
        BLOCK_H: tl.constexpr,
        ROWS: tl.constexpr,
        COLS: tl.constexpr,
        UPCAST: tl.constexpr,
    ):
        """dk and dv of ROWS keys: one pass over the sequence's queries. Tiles are transposed: (keys, queries)."""
        start, length, rows, head = _tile_of(tiles_ptr, num_heads, ROWS)  # pyright: ignore
        dims = tl.arange(0, BLOCK_H)
        slope_log2 = tl.load(slopes_ptr + head) * 1.4426950408889634
        k = _load(k_ptr + head * stride_kn, stride_kt, start, rows, length, dims, H)
        v = _load(v_ptr + head * stride_vn, stride_vt, start, rows, length, dims, H)

        dk = tl.zeros([ROWS, BLOCK_H], tl.float32)
        dv = tl.zeros([ROWS, BLOCK_H], tl.float32)
        for first in range(0, length, COLS):
            cols = first + tl.arange(0, COLS)
            q = _load(q_ptr + head * stride_qn, stride_qt, start, cols, length, dims, H)
            do = _load(do_ptr + head * stride_don, stride_dot, start, cols, length, dims, H)
            # lse = +inf makes the probabilities of a query beyond the end 0.
            offset = head * stride_lse + start + cols
            lse = tl.load(lse_ptr + offset, mask=cols < length, other=float("inf"))
            delta = tl.load(delta_ptr + offset, mask=cols < length, other=0.0)
            scores = _dot(k, tl.trans(q), UPCAST) * scale_log2 - slope_log2 * _distance(rows, cols)
            probs = tl.exp2(scores - lse[None, :])
            dv += _dot(probs.to(do.dtype), do, UPCAST)
            dscores = probs * (_dot(v, tl.trans(do), UPCAST) - delta[None, :])
            dk += _dot(dscores.to(q.dtype), q, UPCAST)

        _store(dk_ptr + head * stride_dkn, stride_dkt, start, rows, length, dims, dk * scale, H)
        _store(dv_ptr + head * stride_dvn, stride_dvt, start, rows, length, dims, dv, H)

    @triton.jit(do_not_specialize=["stride_lse"])
    def flash_attn_dq(
        q_ptr,  # (T, N, H)
        k_ptr,  # (T, N, H)
        v_ptr,  # (T, N, H)
        do_ptr,  # (T, N, H)
        dq_ptr,  # (T, N, H)
        lse_ptr,  # (N, T) fp32, log2 of the softmax's denominator
        delta_ptr,  # (N, T) fp32
        slopes_ptr,  # (N,) fp32
        tiles_ptr,  # (n, 3) int32, see tile_table
        stride_qt,  # from token to token; q[t, n] itself is contiguous
        stride_qn,  # from head to head
        stride_kt,
        stride_kn,
        stride_vt,
        stride_vn,
        stride_dot,
        stride_don,
        stride_dqt,
        stride_dqn,
        stride_lse,  # T
        num_heads,
        scale,  # H^-0.5
        scale_log2,  # H^-0.5 * log2(e)
        H: tl.constexpr,
        BLOCK_H: tl.constexpr,
        ROWS: tl.constexpr,
        COLS: tl.constexpr,
        UPCAST: tl.constexpr,
    ):
        """dq of ROWS queries: one pass over the sequence's keys."""
        start, length, rows, head = _tile_of(tiles_ptr, num_heads, ROWS)  # pyright: ignore
        dims = tl.arange(0, BLOCK_H)
        slope_log2 = tl.load(slopes_ptr + head) * 1.4426950408889634
        q = _load(q_ptr + head * stride_qn, stride_qt, start, rows, length, dims, H)
        do = _load(do_ptr + head * stride_don, stride_dot, start, rows, length, dims, H)
        offset = head * stride_lse + start + rows
        lse = tl.load(lse_ptr + offset, mask=rows < length, other=float("inf"))
        delta = tl.load(delta_ptr + offset, mask=rows < length, other=0.0)

        dq = tl.zeros([ROWS, BLOCK_H], tl.float32)
        for first in range(0, length, COLS):
            cols = first + tl.arange(0, COLS)
            # Keys beyond the end are loaded as zero, so they add nothing to dq.
            k = _load(k_ptr + head * stride_kn, stride_kt, start, cols, length, dims, H)
            v = _load(v_ptr + head * stride_vn, stride_vt, start, cols, length, dims, H)
            scores = _dot(q, tl.trans(k), UPCAST) * scale_log2 - slope_log2 * _distance(rows, cols)
            scores = tl.where((cols < length)[None, :], scores, float("-inf"))
            probs = tl.exp2(scores - lse[:, None])
            dscores = probs * (_dot(do, tl.trans(v), UPCAST) - delta[:, None])
            dq += _dot(dscores.to(k.dtype), k, UPCAST)

        _store(dq_ptr + head * stride_dqn, stride_dqt, start, rows, length, dims, dq * scale, H)

    @triton.jit(do_not_specialize=["stride_lse"])
    def flash_attn_whole(
        q_ptr,  # (T, N, H)
        k_ptr,  # (T, N, H)
        v_ptr,  # (T, N, H)
        do_ptr,  # (T, N, H)
        dq_ptr,  # (T, N, H)
        dk_ptr,  # (T, N, H)
        dv_ptr,  # (T, N, H)
        out_ptr,  # (T, N, H)
        lse_ptr,  # (N, T) fp32, log2 of the softmax's denominator
        slopes_ptr,  # (N,) fp32
        tiles_ptr,  # (n, 3) int32, see tile_table: one row per sequence
        stride_qt,  # from token to token; q[t, n] itself is contiguous
        stride_qn,  # from head to head
        stride_kt,
        stride_kn,
        stride_vt,
        stride_vn,
        stride_dot,
        stride_don,
        stride_dqt,
        stride_dqn,
        stride_dkt,
        stride_dkn,
        stride_dvt,
        stride_dvn,
        stride_ot,
        stride_on,
        stride_lse,  # T
        num_heads,
        scale,  # H^-0.5
        scale_log2,  # H^-0.5 * log2(e)
        H: tl.constexpr,
        BLOCK_H: tl.constexpr,
        ROWS: tl.constexpr,
        COLS: tl.constexpr,
        UPCAST: tl.constexpr,
    ):
        """dq, dk and dv of a sequence of at most ROWS tokens: all its keys, one pass over its queries.

        Each probability is computed once: five products, where dkdv and dq need seven. Tiles are (keys, queries).
        """
        start, length, rows, head = _tile_of(tiles_ptr, num_heads, ROWS)  # pyright: ignore
        dims = tl.arange(0, BLOCK_H)
        slope_log2 = tl.load(slopes_ptr + head) * 1.4426950408889634
        k = _load(k_ptr + head * stride_kn, stride_kt, start, rows, length, dims, H)
        v = _load(v_ptr + head * stride_vn, stride_vt, start, rows, length, dims, H)

        dk = tl.zeros([ROWS, BLOCK_H], tl.float32)
        dv = tl.zeros([ROWS, BLOCK_H], tl.float32)
        for first in range(0, length, COLS):
            cols = first + tl.arange(0, COLS)
            q = _load(q_ptr + head * stride_qn, stride_qt, start, cols, length, dims, H)
            do = _load(do_ptr + head * stride_don, stride_dot, start, cols, length, dims, H)
            out = _load(out_ptr + head * stride_on, stride_ot, start, cols, length, dims, H)
            delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
            # lse = +inf makes the probabilities of a query beyond the end 0. Keys beyond the end need a score of -inf:
            # theirs could overflow, and infinity times their zeros is NaN in dq.
            lse = tl.load(lse_ptr + head * stride_lse + start + cols, mask=cols < length, other=float("inf"))
            scores = _dot(k, tl.trans(q), UPCAST) * scale_log2 - slope_log2 * _distance(rows, cols)
            scores = tl.where((rows < length)[:, None], scores, float("-inf"))
            probs = tl.exp2(scores - lse[None, :])
            dv += _dot(probs.to(do.dtype), do, UPCAST)
            dscores = (probs * (_dot(v, tl.trans(do), UPCAST) - delta[None, :])).to(q.dtype)  # pyright: ignore
            dk += _dot(dscores, q, UPCAST)
            dq = _dot(tl.trans(dscores), k, UPCAST)
            _store(dq_ptr + head * stride_dqn, stride_dqt, start, cols, length, dims, dq * scale, H)

        _store(dk_ptr + head * stride_dkn, stride_dkt, start, rows, length, dims, dk * scale, H)
        _store(dv_ptr + head * stride_dvn, stride_dvt, start, rows, length, dims, dv, H)


# ----------------------------------------------------------------------------------------------------------------------
# Launches
# ----------------------------------------------------------------------------------------------------------------------

DELTA_TILE = 2048
"""Elements of a tile of flash_attn_delta: 16 per thread."""


def delta_rows(head_size: int) -> int:
    """Rows of a tile of flash_attn_delta."""
    return DELTA_TILE // padded_head_size(head_size)


def _options(q: Tensor, tile: Tile) -> dict[str, Any]:
    """Compile-time arguments of a kernel."""
    H = q.shape[2]
    return {
        "H": H,
        "BLOCK_H": padded_head_size(H),
        "ROWS": tile.rows,
        "COLS": tile.cols,
        "UPCAST": interpreted() and q.dtype == torch.bfloat16,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _aligned(x_TNH: Tensor) -> Tensor:
    """``x_TNH``, or a copy if its strides or start would make loads narrow (not at multiples of 16 elements).

    Triton compiles another kernel for narrow loads, and that one spills. An expanded gradient has strides of 0.
    """
    T, N, H = x_TNH.stride()
    misplaced = x_TNH.shape[2] % 16 == 0 and (T % 16 or N % 16 or x_TNH.storage_offset() % 16)
    if H != 1 or not T or not N or misplaced:
        return x_TNH.clone(memory_format=torch.contiguous_format)
    return x_TNH


def _strides(*tensors_TNH: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors_TNH for stride in x.stride()[:2])


def _forward(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, table: Tensor, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """out (T, N, H) and lse (N, T) fp32; ``tile`` is by default that of TILES."""
    T, N, H = q.shape
    q, k, v = map(_aligned, (q, k, v))
    tile = tile or tiles_for(H, q.dtype, architecture(q.device)).forward
    out = torch.empty(T, N, H, dtype=q.dtype, device=q.device)
    lse = torch.empty(N, T, dtype=torch.float32, device=q.device)
    if T:
        args = (q, k, v, out, lse, slopes, table, *_strides(q, k, v, out), T, N, H**-0.5 * LOG2E)
        launch(flash_attn_forward, len(table) * N, *args, **_options(q, tile))
    return out, lse


def _delta(out: Tensor, do: Tensor) -> Tensor:
    """(N, T) fp32: the sum over H of do * out."""
    T, N, H = out.shape
    delta = torch.empty(N, T, dtype=torch.float32, device=out.device)
    rows = delta_rows(H)
    constants = {"H": H, "BLOCK_H": padded_head_size(H), "ROWS": rows}
    launch(flash_attn_delta, -(-T // rows) * N, out, do, delta, *_strides(out, do), T, N, T, **constants)
    return delta


def _launch_gradients(
    kernel: Any,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    slopes: Tensor,
    table: Tensor,
    grads: list[Tensor],
    tile: Tile,
) -> None:
    """Write ``grads``, each (T, N, H): dk and dv by flash_attn_dkdv, or dq by flash_attn_dq."""
    T, N, H = q.shape
    sizes = (*_strides(q, k, v, do, *grads), T, N, H**-0.5, H**-0.5 * LOG2E)
    args = (q, k, v, do, *grads, lse, delta, slopes, table, *sizes)
    launch(kernel, len(table) * N, *args, **_options(q, tile))


def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    tables: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    grads: Sequence[Tensor],
    whole: Tile | None = None,
) -> None:
    """Write ``grads``: dq, dk, dv, each (T, N, H). ``tables`` are those of the tiles that ``Tiles.backward`` names;
    ``whole`` is by default that of TILES.
    """
    T, N, H = q.shape
    if not T:
        return
    tiles = tiles_for(H, q.dtype, architecture(q.device))
    do, q, k, v = map(_aligned, (do, q, k, v))
    dq, dk, dv = grads
    if len(tables) == 1:
        tile = whole or tiles.whole
        assert tile is not None, "whose table it is"
        sizes = (*_strides(q, k, v, do, *grads, out), T, N, H**-0.5, H**-0.5 * LOG2E)
        args = (q, k, v, do, *grads, out, lse, slopes, *tables, *sizes)
        launch(flash_attn_whole, len(tables[0]) * N, *args, **_options(q, tile))
        return
    saved = (do, q, k, v, lse, _delta(out, do), slopes)
    _launch_gradients(flash_attn_dkdv, *saved, tables[0], [dk, dv], tiles.dkdv)
    _launch_gradients(flash_attn_dq, *saved, tables[1], [dq], tiles.dq)


# ----------------------------------------------------------------------------------------------------------------------
# Autograd: a Function in eager mode. torch.compile cannot trace a launch, so it gets custom ops (60 us slower if eager)
# ----------------------------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, slopes, _, backward_tables = inputs
    ctx.save_for_backward(q, k, v, slopes, *output, *backward_tables)


class _FlashAttention(torch.autograd.Function):
    """Saves q, k, v, out and lse; the backward recomputes the probabilities."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        q, k, v, slopes, table, _ = inputs
        output = _forward(q, k, v, slopes, table)
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, slopes, out, lse, *tables = ctx.saved_tensors
        T, N, H = q.shape
        # One buffer: bert_padding's unpack_heads returns it as the packed product's gradient without a copy.
        dq, dk, dv = torch.empty(T, 3, N, H, dtype=q.dtype, device=q.device).unbind(1)
        _backward(grads[0], q, k, v, slopes, tables, out, lse, (dq, dk, dv))
        return dq, dk, dv, None, None, None


@torch.library.custom_op(f"{ops_of(__name__)}::forward", mutates_args=())
def _flash_attn_op(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, table: Tensor, backward_tables: list[Tensor]
) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, slopes, table)


@_flash_attn_op.register_fake
def _(q, k, v, slopes, table, backward_tables):
    T, N, H = q.shape
    return q.new_empty(T, N, H), q.new_empty(N, T, dtype=torch.float32)


@torch.library.custom_op(f"{ops_of(__name__)}::backward", mutates_args=())
def _flash_attn_backward_op(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, out: Tensor, lse: Tensor, tables: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _backward(do, q, k, v, slopes, tables, out, lse, (dq, dk, dv))
    return dq, dk, dv


@_flash_attn_backward_op.register_fake
def _(do, q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _op_backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Any, ...]:
    q, k, v, slopes, out, lse, *tables = ctx.saved_tensors
    grads = _flash_attn_backward_op(do, q, k, v, slopes, out, lse, tables)
    return *grads, None, None, [None] * len(tables)


_flash_attn_op.register_autograd(_op_backward, setup_context=_save)


def flash_attn(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, layout: Layout, alibi_slopes: Tensor) -> Tensor:
    """Softmax attention with ALiBi within each sequence, no dropout. Stores nothing of size S^2.

    Args:
        q_TNH, k_TNH, v_TNH: all fp16, bf16 or fp32, H at most 128; may be views. Autocast does not cast them;
            accumulation, softmax and bias are fp32.
        layout: where each sequence starts. If its tile tables are missing, they are computed here.
        alibi_slopes: (N,) fp32.

    Returns:
        (T, N, H), contiguous, in the dtype of q.

    Raises:
        ValueError: unsupported dtype or head size.
    """
    if not q_TNH.dtype == k_TNH.dtype == v_TNH.dtype or q_TNH.dtype not in DTYPES:
        given = ", ".join(str(x.dtype) for x in (q_TNH, k_TNH, v_TNH))
        raise ValueError(f"attention 'triton': expected q, k, v of one dtype of fp16, bf16, fp32, got {given}")
    if alibi_slopes.dtype != torch.float32:
        raise ValueError(f"attention 'triton': expected slopes in fp32, got {alibi_slopes.dtype}")
    tiles = tiles_for(q_TNH.shape[2], q_TNH.dtype, architecture(q_TNH.device))
    backward = [tile.rows for tile in tiles.backward(layout.max_seqlen)]
    tables = layout.tables or tile_tables(layout, {tiles.forward.rows, *backward})
    args = (q_TNH, k_TNH, v_TNH, alibi_slopes, tables[tiles.forward.rows], [tables[rows] for rows in backward])
    if torch.compiler.is_compiling():
        return _flash_attn_op(*args)[0]
    return _FlashAttention.apply(*args)  # pyright: ignore[reportReturnType]
