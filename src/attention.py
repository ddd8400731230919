"""Attention over unpadded sequences, with ALiBi: one function, five implementations.

    attention(q, k, v, layout, alibi_slopes, dropout_p=0.0, impl="auto") -> (T, N, H)

    reference    padded, explicit bias: the definition, with which tests compare the others    any device
    torch        scaled_dot_product_attention, one call per sequence length                    any device
    triton       our kernels (flash_attn_triton.py)                                            CUDA
    flash_attn   the flash-attn package (requirements-gpu.txt)                                 CUDA
    flash_attn_4 the flash-attn-4 package (requirements-flash-attn-4.txt)                      Hopper, Blackwell

For tokens i and j of one sequence, and head n:

    score[i, j] = q[i] . k[j] * H^-0.5 - slope[n] * |i - j|
    out[i]      = sum_j softmax_j(score[i, j]) * v[j]

ALiBi: Press et al., 2021, arXiv 2108.12409; symmetric as in MosaicBERT, arXiv 2312.17482. Scores, bias and softmax are
at least fp32, under autocast too: in bf16 the bias would err by 0.67 at distance 511.

Letters: B sequences, S padded length, T tokens of the batch, N heads, H head size, L length of one sequence. As a
suffix they give a tensor's shape: q_TNH is (T, N, H).
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import flash_attn_triton, triton_common
from .bert_padding import Layout, PaddedLayout
from .graphs import in_graph

log = logging.getLogger(__name__)
aten: Any = torch.ops.aten  # its ops are not typed


def alibi_slopes(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """Slope of each head, (N,) fp32 (Press et al., 2021, section 3 and its reference implementation).

    For a power of two, the geometric sequence that ends at 2^-8. For any other N, the slopes of the next lower power of
    two, then every second slope of twice that number: for 12, 2^-1 ... 2^-8, then 2^-0.5, 2^-1.5, 2^-2.5, 2^-3.5.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    exponents = [8 * (i + 1) / power for i in range(power)]
    exponents += [8 * (i + 1) / (2 * power) for i in range(0, 2 * (num_heads - power), 2)]
    return torch.tensor([2.0**-e for e in exponents], dtype=torch.float32, device=device)


class AlibiSlopes(torch.nn.Module):
    """The slopes (N,) as a buffer that moves with the model, stays fp32 and is not saved.

    transformers 5 builds models on the meta device and leaves a buffer that was not saved uninitialised. Hence
    ``fill``, and a check before the first use.
    """

    slopes: Tensor

    def __init__(self, num_heads: int):
        super().__init__()
        self.register_buffer("slopes", alibi_slopes(num_heads), persistent=False)
        self.checked: Tensor | None = None

    def fill(self, device: torch.device) -> None:
        """Compute the slopes again, on ``device``."""
        self.slopes = alibi_slopes(len(self.slopes), device)

    def _apply(self, fn, recurse=True):  # pyright: ignore[reportIncompatibleMethodOverride]
        # .half(), .to(bfloat16) and to_empty() all come through here.
        super()._apply(fn, recurse)
        self.fill(self.slopes.device)
        return self

    def forward(self, device: torch.device) -> Tensor:
        """The slopes, (N,) fp32, for a model on ``device``.

        Raises:
            ValueError: wrong values. Checked once per tensor; on a GPU the check synchronizes.
        """
        if self.slopes.is_meta and device.type != "meta":  # after load_state_dict(assign=True)
            self.fill(device)
        # in_graph first: otherwise torch.compile guards on ``checked``, and compiles the model twice.
        if not in_graph() and self.checked is not self.slopes and not self.slopes.is_meta:
            want = alibi_slopes(len(self.slopes), "cpu")
            if not torch.equal(self.slopes.cpu(), want):
                raise ValueError(
                    f"the ALiBi slopes are {self.slopes.tolist()}, expected {want.tolist()}: the model was loaded "
                    "without initialising its buffers. Load it by from_pretrained with trust_remote_code=True"
                )
            self.checked = self.slopes
        return self.slopes


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout | PaddedLayout,
    alibi_slopes: Tensor,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention with ALiBi within each sequence of an unpadded batch.

    Args:
        q, k, v: (T, N, H); may be views of one packed product.
        layout: where each sequence starts. Only ``triton`` uses its tile tables; if they are missing, it computes them,
            which synchronizes a GPU. With a ``PaddedLayout``, q, k, v
            are (B, S, N, H), and ``padded`` computes them, whatever ``impl`` is.
        alibi_slopes: (N,) fp32.
        dropout_p: probability of dropping an attention weight; 0 outside training.
        impl: a name that ``resolve`` accepts.

    Returns:
        (T, N, H) in the dtype of q.
    """
    options = {"dropout_p": dropout_p} if dropout_p else {}
    # Autocast would take the products in bf16; the contract is fp32 scores.
    with torch.autocast(q.device.type, enabled=False):
        if isinstance(layout, PaddedLayout):
            return padded(q, k, v, layout.mask, alibi_slopes, **options)
        run = IMPLEMENTATIONS[resolve(impl, dropout_p, q.device.type)]
        return run(q, k, v, layout, alibi_slopes, **options)


def resolve(impl: str, dropout_p: float = 0.0, device_type: str | None = None) -> str:
    """The implementation that ``impl`` names; for ``auto``, triton on a GPU that supports it, torch elsewhere.

    By default ``device_type`` is cuda on a machine with a GPU, cpu elsewhere.

    Raises:
        ValueError: unknown name; the implementation does not run on the device; or it has no dropout and ``dropout_p``
            is not 0.
    """
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    name = impl
    if impl == "auto":
        name = "triton" if device_type == "cuda" and triton_common.unavailable("cuda") is None else "torch"
        if not in_graph():
            _log_once(name, device_type)
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"unknown attention {impl!r}; expected one of auto, {', '.join(IMPLEMENTATIONS)}")
    missing = MISSING[name](device_type) if name in MISSING else None
    if missing is not None:
        raise ValueError(f"attention {name!r} cannot run here: {missing}; set attention to auto")
    if dropout_p > 0 and name not in WITH_DROPOUT:
        raise ValueError(
            f"attention {name!r} has no dropout: set attention_probs_dropout_prob to 0, "
            f"or attention to one of {', '.join(sorted(WITH_DROPOUT))}"
        )
    return name


@cache
def _log_once(name: str, device_type: str) -> None:
    log.info("attention: auto is %s on %s", name, device_type)


# ----------------------------------------------------------------------------------------------------------------------
# reference
# ----------------------------------------------------------------------------------------------------------------------


def attention_weights(q_BSNH: Tensor, k_BSNH: Tensor, mask_BS: Tensor, alibi_slopes: Tensor) -> Tensor:
    """The weights softmax_j(score[i, j]), (B, N, S, S) in fp32 or fp64: 0 for padding j, undefined for padding i.

    Args:
        q_BSNH, k_BSNH: queries and keys.
        mask_BS: bool, false at padding, which may be anywhere: distances count tokens.
        alibi_slopes: (N,) fp32.
    """
    dtype = torch.promote_types(q_BSNH.dtype, torch.float32)
    q_BNSH, k_BNSH = (x.transpose(1, 2).to(dtype) for x in (q_BSNH, k_BSNH))
    position_BS = mask_BS.long().cumsum(1)
    distance_BSS = (position_BS[:, :, None] - position_BS[:, None, :]).abs()
    bias_BNSS = -alibi_slopes.to(dtype)[:, None, None] * distance_BSS[:, None]
    scores_BNSS = q_BNSH @ k_BNSH.transpose(-1, -2) * q_BNSH.shape[-1] ** -0.5 + bias_BNSS
    return scores_BNSS.masked_fill(~mask_BS[:, None, None, :], torch.finfo(dtype).min).softmax(dim=-1)


def padded(
    q_BSNH: Tensor, k_BSNH: Tensor, v_BSNH: Tensor, mask_BS: Tensor, alibi_slopes: Tensor, dropout_p: float = 0.0
) -> Tensor:
    """Attention of a padded batch, (B, S, N, H), with shapes that depend on the inputs' alone."""
    probs_BNSS = F.dropout(attention_weights(q_BSNH, k_BSNH, mask_BS, alibi_slopes), dropout_p)
    out_BNSH = probs_BNSS @ v_BSNH.transpose(1, 2).to(probs_BNSS.dtype)
    return out_BNSH.transpose(1, 2).to(q_BSNH.dtype)


def reference(
    q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, layout: Layout, alibi_slopes: Tensor, dropout_p: float = 0.0
) -> Tensor:
    """The definition: ``padded`` of the batch padded again. Memory grows as B * N * S^2."""
    lengths_B = layout.cu_seqlens.diff().long()
    mask_BS = torch.arange(layout.max_seqlen, device=q_TNH.device) < lengths_B[:, None]

    def pad(x_TNH: Tensor) -> Tensor:
        x_BSNH = x_TNH.new_zeros(*mask_BS.shape, *x_TNH.shape[1:])
        x_BSNH[mask_BS] = x_TNH
        return x_BSNH

    return padded(pad(q_TNH), pad(k_TNH), pad(v_TNH), mask_BS, alibi_slopes, dropout_p)[mask_BS]


# ----------------------------------------------------------------------------------------------------------------------
# torch: scaled_dot_product_attention, one call per length
# ----------------------------------------------------------------------------------------------------------------------

TILE_ELEMENTS = 2**22
"""Maximal size of a tile's bias, 16 MiB in fp32; keeps memory linear in the length. Measured: 2**20 makes sequences of
512 a tenth slower; 2**24 gains nothing."""


@dataclass(frozen=True)
class _Tile:
    """Work of one call: some query rows, and all keys, of adjacent sequences of one length."""

    tokens: slice  # of the T tokens: those of the sequences
    sequences: int
    length: int  # L, of each sequence
    queries: slice  # of 0..L-1: the query rows of each sequence

    def keys_of(self, x_TNH: Tensor) -> Tensor:
        """All tokens of the tile's sequences, a view (sequences, N, L, H)."""
        return x_TNH[self.tokens].unflatten(0, (self.sequences, self.length)).transpose(1, 2)

    def queries_of(self, x_TNH: Tensor) -> Tensor:
        """The tile's query rows, a view (sequences, N, rows, H)."""
        return self.keys_of(x_TNH)[:, :, self.queries]


def _tiles(cu_seqlens: list[int], num_heads: int) -> Iterator[_Tile]:
    """Cut a ragged batch into tiles whose bias has at most TILE_ELEMENTS elements.

    Adjacent sequences of equal length, common where documents are cut into chunks, share a tile if their rows fit.
    """
    lengths = [end - start for start, end in pairwise(cu_seqlens)]
    rows = max(1, TILE_ELEMENTS // (num_heads * max(lengths, default=1) or 1))  # query rows of one sequence per tile
    start = 0
    for length, equal in groupby(length for length in lengths if length):
        count = sum(1 for _ in equal)
        together = count if rows >= length else 1
        for _ in range(0, count, together):
            tokens = slice(start, start + together * length)
            for row in range(0, length, rows):
                yield _Tile(tokens, together, length, slice(row, min(row + rows, length)))
            start = tokens.stop


def _biased_tiles(cu_seqlens: list[int], slopes: Tensor, dtype: torch.dtype) -> Iterator[tuple[_Tile, Tensor]]:
    """Each tile with its bias, (1, N, rows, L).

    Each bias is a slice of one Toeplitz table, -slope * |row - column|, of at most twice TILE_ELEMENTS: a tile whose
    queries start at row r uses the columns from last_row - r on.
    """
    tiles = list(_tiles(cu_seqlens, len(slopes)))
    last_row = max((tile.queries.start for tile in tiles), default=0)
    row = torch.arange(max((tile.queries.stop - tile.queries.start for tile in tiles), default=0), device=slopes.device)
    column = torch.arange(-last_row, max((tile.length for tile in tiles), default=0), device=slopes.device)
    table = -slopes.to(dtype)[:, None, None] * (row[:, None] - column).abs()  # (N, rows, columns)
    for tile in tiles:
        rows, first = tile.queries.stop - tile.queries.start, last_row - tile.queries.start
        yield tile, table[None, :, :rows, first : first + tile.length]


class _FlashOnCPU(torch.autograd.Function):
    """torch's flash kernel for CPUs, tile by tile. Saves q, k, v, out and the log-sum-exp; computes the bias again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], slopes: Tensor) -> Tensor:
        dtype = torch.promote_types(q.dtype, torch.float32)
        wide_q, wide_k, wide_v = q.to(dtype), k.to(dtype), v.to(dtype)
        out = torch.empty(q.shape, dtype=dtype)
        lse = []
        for tile, bias in _biased_tiles(cu_seqlens, slopes, dtype):
            qkv = tile.queries_of(wide_q), tile.keys_of(wide_k), tile.keys_of(wide_v)
            rows, log_sum_exp = aten._scaled_dot_product_flash_attention_for_cpu(*qkv, attn_mask=bias)
            tile.queries_of(out).copy_(rows)
            lse.append(log_sum_exp)
        ctx.cu_seqlens = cu_seqlens
        ctx.save_for_backward(q, k, v, slopes, out, *lse)
        return out.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, slopes, out, *lse = ctx.saved_tensors
        dout, wide_q, wide_k, wide_v = (x.to(out.dtype) for x in (dout, q, k, v))
        dq, dk, dv = (torch.empty(q.shape, dtype=out.dtype) for _ in range(3))
        for (tile, bias), log_sum_exp in zip(_biased_tiles(ctx.cu_seqlens, slopes, out.dtype), lse, strict=True):
            qkv = tile.queries_of(wide_q), tile.keys_of(wide_k), tile.keys_of(wide_v)
            results = tile.queries_of(out), log_sum_exp
            tile_dq, tile_dk, tile_dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                tile.queries_of(dout), *qkv, *results, dropout_p=0.0, is_causal=False, attn_mask=bias
            )
            tile.queries_of(dq).copy_(tile_dq)
            for whole, grad in ((dk, tile_dk), (dv, tile_dv)):
                if tile.queries.start == 0:
                    tile.keys_of(whole).copy_(grad)
                else:
                    tile.keys_of(whole).add_(grad)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


@torch.compiler.disable  # depends on the lengths of a batch, so each new batch would be compiled again
def torch_ragged(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, alibi_slopes: Tensor, dropout_p: float = 0.0
) -> Tensor:
    """torch's scaled_dot_product_attention per sequence, without padding; adjacent sequences of one length together.

    On a CPU without dropout, memory is linear in T. With dropout, torch keeps (N, L, L) probabilities per sequence. On
    a GPU it keeps a bias (N, L, L) per length, and synchronizes to read ``cu_seqlens``.
    """
    if q.device.type == "cpu" and dropout_p == 0:
        return _FlashOnCPU.apply(q, k, v, layout.cu_seqlens.tolist(), alibi_slopes)  # pyright: ignore[reportReturnType]
    dtype = torch.promote_types(q.dtype, torch.float32)
    wide_q, wide_k, wide_v = q.to(dtype), k.to(dtype), v.to(dtype)
    rows, copies = [], {}
    for tile, bias in _biased_tiles(layout.cu_seqlens.tolist(), alibi_slopes, dtype):
        if q.is_cuda:  # torch's memory-efficient kernel loads 16 bytes at once, but a slice may start unaligned
            key = tile.length, tile.queries.start
            if key not in copies:
                copies[key] = bias.clone(memory_format=torch.contiguous_format)
            bias = copies[key]
        qkv = tile.queries_of(wide_q), tile.keys_of(wide_k), tile.keys_of(wide_v)
        rows.append(F.scaled_dot_product_attention(*qkv, attn_mask=bias, dropout_p=dropout_p))
    out = torch.cat([x.transpose(1, 2).flatten(0, 1) for x in rows])
    return out.to(q.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# flash_attn and flash_attn_4, and the table of implementations
# ----------------------------------------------------------------------------------------------------------------------


def flash_attn_package(q: Tensor, k: Tensor, v: Tensor, layout: Layout, alibi_slopes: Tensor) -> Tensor:
    """flash_attn_varlen_func of the flash-attn package, 2.4 (the first with slopes) or later; fp16 and bf16 only.

    The backward adds dq by atomics unless ``torch.use_deterministic_algorithms`` is on.

    Raises:
        ValueError: the package does not import, or another dtype.
    """
    try:
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"attention 'flash_attn' cannot run here: {error}") from error
    _check_half(q, "flash_attn")
    lengths = (layout.cu_seqlens, layout.cu_seqlens, layout.max_seqlen, layout.max_seqlen)  # of queries, of keys
    deterministic = torch.are_deterministic_algorithms_enabled()
    return flash_attn_varlen_func(q, k, v, *lengths, alibi_slopes=alibi_slopes, deterministic=deterministic)


@torch.compiler.disable  # it compiles its kernels by its own compiler at their first call
def flash_attn_4_package(q: Tensor, k: Tensor, v: Tensor, layout: Layout, alibi_slopes: Tensor) -> Tensor:
    """flash_attn_varlen_func of the flash-attn-4 package, with ALiBi as its score_mod; fp16 and bf16 only.

    The backward adds dq by atomics unless ``torch.use_deterministic_algorithms`` is on.

    Raises:
        ValueError: the package does not import, another dtype, or a head size that its backward does not support.
    """
    try:
        from flash_attn.cute import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"attention 'flash_attn_4' cannot run here: {error}") from error
    _check_half(q, "flash_attn_4")
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        raise ValueError(
            f"attention 'flash_attn_4': expected a head size that is a multiple of 8 and at most 128, "
            f"got {q.shape[-1]}; set attention to auto"
        )
    out, _ = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=layout.cu_seqlens,
        cu_seqlens_k=layout.cu_seqlens,
        max_seqlen_q=layout.max_seqlen,
        max_seqlen_k=layout.max_seqlen,
        score_mod=_alibi,
        score_mod_bwd=_alibi_backward,
        aux_tensors=[alibi_slopes],
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out


def _alibi(score: Any, batch: Any, head: Any, q_idx: Any, kv_idx: Any, seqlen_info: Any, aux_tensors: Any) -> Any:
    """score - slope * |i - j|; flash-attn-4 traces it into its kernels.

    Args:
        score: q . k * H^-0.5 of some elements of one head, fp32.
        head: index of their head, int32, as often as there are elements.
        q_idx, kv_idx: positions within the sequence, int32.
        aux_tensors: the slopes (N,), fp32.
    """
    return score - aux_tensors[0][head[0]] * abs(q_idx - kv_idx)


def _alibi_backward(grad: Any, score: Any, *where: Any, **kwargs: Any) -> Any:
    """Gradient of ``score``: that of ``_alibi``'s result, as the bias is added."""
    return grad


def _check_half(q: Tensor, name: str) -> None:
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"attention {name!r}: expected fp16 or bf16, got {q.dtype}; set precision to amp_bf16")


@cache
def _package_missing(distribution: str, requirements: str, device_type: str) -> str | None:
    """Asks for the distribution: flash-attn and flash-attn-4 both install ``flash_attn``, and ``flash_attn.cute``."""
    try:
        version(distribution)
    except PackageNotFoundError:
        return f"the package {distribution} is not installed ({requirements})"
    return None if device_type == "cuda" else f"{distribution} needs a CUDA device, and this is {device_type}"


@torch.compiler.assume_constant_result
def _flash_attn_missing(device_type: str) -> str | None:
    return _package_missing("flash-attn", "requirements-gpu.txt", device_type)


@torch.compiler.assume_constant_result
def _flash_attn_4_missing(device_type: str) -> str | None:
    reason = _package_missing("flash-attn-4", "requirements-flash-attn-4.txt", device_type)
    if reason is None and torch.cuda.is_available():  # False: asked for another machine
        major, minor = torch.cuda.get_device_capability()
        if major not in (9, 10, 11):
            need = "compute capability 9, 10 or 11 (Hopper, Blackwell)"
            return f"flash-attn-4's backward needs {need}, and this GPU has {major}.{minor}"
    return reason


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "reference": reference,
    "torch": torch_ragged,
    "triton": flash_attn_triton.flash_attn,
    "flash_attn": flash_attn_package,
    "flash_attn_4": flash_attn_4_package,
}
WITH_DROPOUT = {"reference", "torch"}
MISSING = {
    "triton": triton_common.unavailable,
    "flash_attn": _flash_attn_missing,
    "flash_attn_4": _flash_attn_4_missing,
}
"""Why an implementation cannot run on a type of device, or None. Implementations not listed run on any."""
