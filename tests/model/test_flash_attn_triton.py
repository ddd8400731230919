"""The attention kernels against the reference: on a CPU in Triton's interpreter, on a GPU compiled."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src import attention as A
from src import attention_tiles, triton_common
from src import flash_attn_triton as F
from src.bert_padding import unpack_heads, unpad_layout
from src.triton_common import launches
from tests.model.test_kernels import DEVICE, DTYPES

pytestmark = pytest.mark.skipif(
    triton_common.unavailable(DEVICE) is not None, reason=str(triton_common.unavailable(DEVICE))
)

LARGE = attention_tiles.Tiles(*4 * [attention_tiles.Tile(64, 64, 4, 1)])
_SMALL = [attention_tiles.Tile(*sizes, 4, 1) for sizes in ((32, 16), (16, 32), (16, 16), (64, 16))]
SMALL = [attention_tiles.Tiles(*_SMALL[:3]), attention_tiles.Tiles(*_SMALL)]


@pytest.fixture(autouse=True)
def no_tf32():
    """Composer allows it, and then the reference would be inexact."""
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """The interpreter's time depends on steps, not on work: use larger tiles for fp32 there."""
    if DEVICE == "cpu":
        chosen = F.tiles_for
        monkeypatch.setattr(
            F, "tiles_for", lambda H, dtype, arch: LARGE if dtype.itemsize == 4 else chosen(H, dtype, arch)
        )


def make(lengths, N=1, H=16, dtype=torch.float32, seed=0, scale=1.0, device=DEVICE):
    """q, k, v as views of one packed product, and a gradient for the output."""
    torch.manual_seed(seed)
    layout = unpad_layout(torch.tensor(lengths, device=device))
    qkv = (scale * torch.randn(sum(lengths), 3, N, H)).to(device, dtype).requires_grad_()
    grad = torch.randn(sum(lengths), N, H).to(device, dtype)
    return qkv, layout, grad


def run(impl, qkv, layout, grad, slopes=None):
    slopes = A.alibi_slopes(qkv.shape[2]).to(qkv.device) if slopes is None else slopes
    out = A.attention(*unpack_heads(qkv), layout, slopes, impl=impl)
    return out, torch.autograd.grad(out, qkv, grad)[0]


def assert_within_budget(qkv, layout, grad, slopes=None, largest_lse=0.0):
    """Errors of output and gradients against fp64 are at most twice those of the padded reference in the same dtype.

    A floor covers two cases. The gradient of a softmax over one token is exactly 0 in eager PyTorch, here it is the
    rounding of do.v - do.out (measured: 3 eps). And a probability is exp2(s - lse), with lse rounded to fp32.
    """
    got = run("triton", qkv, layout, grad, slopes)
    want = run("reference", qkv.detach().double().requires_grad_(), layout, grad.double(), slopes)
    plain = run("reference", qkv.detach().requires_grad_(), layout, grad, slopes)
    for what, x, y, z in zip(("out", "dq dk dv"), got, want, plain, strict=True):
        assert x.dtype == qkv.dtype and x.isfinite().all()
        floor = (4 * torch.finfo(x.dtype).eps + largest_lse * 2**-24) * y.abs().max().item()
        parts = ((t,) if what == "out" else t.unbind(1) for t in (x, y, z))
        for i, (of_x, of_y, of_z) in enumerate(zip(*parts, strict=True)):
            error = (of_x.double() - of_y).abs().max().item()
            allowed = max(2 * (of_z.double() - of_y).abs().max().item(), floor)
            assert error <= allowed, f"{what} {i}: {error:.3g} > {allowed:.3g}"


# Pairwise: each length, head size and number of heads at least once, not the product of all.
CASES = [
    ([0, 1, 15, 16, 17], 1, 16),
    ([63, 64, 65], 3, 24),
    ([127, 1, 0, 0, 200], 1, 32),
    ([17, 63, 16], 3, 48),
    ([65, 15], 12, 64),
    ([200, 33], 1, 80),
    ([64, 127, 1], 1, 128),
    ([513, 2], 1, 16),
    ([1], 2, 16),
    ([0, 0, 5, 0], 2, 16),
    ([1, 1, 1], 2, 16),
]


@pytest.mark.parametrize(("lengths", "N", "H"), CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(lengths, N, H, dtype):
    """A whole sequence in one tile where all are short enough."""
    before = launches.copy()
    assert_within_budget(*make(lengths, N, H, dtype))
    whole = F.tiles_for(H, dtype, F.architecture(torch.device(DEVICE))).whole
    split = whole is None or max(lengths) > whole.rows
    ran = {f"flash_attn_{name}": 1 for name in ("forward", *(("delta", "dkdv", "dq") if split else ("whole",)))}
    assert launches - before == ran


@pytest.mark.parametrize("tiles", SMALL, ids=["split", "whole"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_of_other_sizes_give_the_same(dtype, tiles, monkeypatch):
    monkeypatch.setattr(F, "tiles_for", lambda *args: tiles)
    assert_within_budget(*make([33, 16, 1, 50], 2, 24, dtype))


def test_an_empty_batch():
    out, grad = run("triton", *make([0, 0]))
    assert out.shape == (0, 1, 16) and grad.shape == (0, 3, 1, 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores(dtype):
    """Scores of +-80 and more, at which exp overflows in fp16 and underflows in fp32."""
    qkv, layout, grad = make([70, 9], 2, 16, dtype, scale=4.5)
    scores = torch.einsum("inh,jnh->nij", *qkv[:70, :2].detach().double().unbind(1)) / 4
    assert scores.min() < -80 and scores.max() > 80
    assert_within_budget(qkv, layout, grad, largest_lse=scores.max().item() * F.LOG2E)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_far_below_zero(dtype):
    """A key beyond the end has a score of about 0, and exp2(0 - lse) is infinite here: it must not reach dq."""
    qkv, layout, grad = make([9, 3], 1, 16, dtype)
    opposite = torch.tensor([8.0, -8.0, 1.0]).to(qkv)[:, None, None]  # each score is -256 - distance
    assert_within_budget((qkv.detach() * 0.01 + opposite).requires_grad_(), layout, grad, largest_lse=400)


def test_views_of_any_stride():
    """Heads and tokens far apart, a head's dimensions not contiguous or not aligned, an expanded gradient."""
    T, N, H = 40, 2, 16
    layout = unpad_layout(torch.tensor([33, 7], device=DEVICE))
    torch.manual_seed(0)
    q = torch.randn(N, T, 3 * H + 1, device=DEVICE)[:, :, H + 1 : 2 * H + 1].transpose(0, 1)
    k = torch.randn(T, N, 2 * H, device=DEVICE)[:, :, ::2]
    v = torch.randn(H, N, T, device=DEVICE).permute(2, 1, 0)
    slopes = A.alibi_slopes(N).to(DEVICE)
    got, want = [], []
    for impl, result in (("triton", got), ("reference", want)):
        x = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (q, k, v)]
        out = A.attention(*x, layout, slopes, impl=impl)
        result += [out, *torch.autograd.grad(out, x, torch.ones((), device=DEVICE).expand_as(out))]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("longest", [33, 65])
def test_every_row_is_written_and_nothing_else(longest, poisoned):
    batch = make([longest, 1, 0, 20], 2, 24)
    want, got = run("reference", *batch), run("triton", *batch)
    # out, lse, the packed gradient, and delta where the backward is split
    assert len(poisoned) == 3 + (longest > 64 or DEVICE == "cuda")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


some_lengths = st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any)
few = settings(max_examples=12, deadline=None, derandomize=True)


@few
@given(some_lengths, st.integers(0, 3))
def test_no_token_sees_another_sequence(lengths, which):
    """Changing one sequence changes no bit of the others' outputs and gradients."""
    qkv, layout, grad = make(lengths)
    which %= len(lengths)
    start, end = layout.cu_seqlens[which : which + 2].tolist()
    changed = qkv.detach().clone()
    changed[start:end] += 1
    (a, da), (b, db) = run("triton", qkv, layout, grad), run("triton", changed.requires_grad_(), layout, grad)
    others = [*range(start), *range(end, sum(lengths))]
    assert torch.equal(a[others], b[others]) and torch.equal(da[others], db[others])
    assert start == end or not torch.equal(a[start:end], b[start:end])


@few
@given(some_lengths, st.randoms(use_true_random=False))
def test_any_order_of_sequences_gives_the_same_rows(lengths, random):
    qkv, layout, grad = make(lengths)
    order = random.sample(range(len(lengths)), len(lengths))
    starts = layout.cu_seqlens.tolist()
    rows = [row for b in order for row in range(starts[b], starts[b + 1])]
    other = unpad_layout(torch.tensor(lengths, device=DEVICE)[order])
    a, da = run("triton", qkv, layout, grad)
    b, db = run("triton", qkv.detach()[rows].requires_grad_(), other, grad[rows])
    assert torch.equal(a[rows], b) and torch.equal(da[rows], db)


def test_the_packed_gradient_is_not_copied():
    """unpack_heads returns the buffer that the kernels wrote; it stacks gradients that do not share one."""
    x = torch.randn(5, 3, 2, 4, requires_grad=True)
    buffer = torch.randn(5, 3, 2, 4)
    (grad,) = torch.autograd.grad(unpack_heads(x), x, buffer.unbind(1))
    assert grad.data_ptr() == buffer.data_ptr() and torch.equal(grad, buffer)
    apart = [t.clone() for t in buffer.unbind(1)]
    assert torch.equal(torch.autograd.grad(unpack_heads(x), x, apart)[0], buffer)
    q, k, v = buffer.unbind(1)
    (grad,) = torch.autograd.grad(unpack_heads(x), x, (k, q, v))  # adjacent, in another order
    assert torch.equal(grad, torch.stack((k, q, v), 1))
    pair = torch.randn(5, 2, 2, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(unpack_heads(pair), pair, (k, v))  # two of three, with a gap between tokens
    assert torch.equal(grad, buffer[:, 1:])


@pytest.mark.parametrize("rows", [1, 16, 64])
def test_tile_table_covers_each_token_once(rows):
    lengths = [3, 0, 65, 16, 1, 64, 0]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    table = attention_tiles.tile_table(cu_seqlens, rows)
    assert table.dtype == torch.int32 and table.shape == (sum(-(-n // rows) for n in lengths), 3)
    tokens = [start + row for start, n, first in table.tolist() for row in range(first, min(first + rows, n))]
    assert sorted(tokens) == list(range(sum(lengths)))
    assert table[:, 1].tolist() == sorted(table[:, 1].tolist(), reverse=True)
    assert attention_tiles.tile_table(torch.zeros(1, dtype=torch.int32), rows).shape == (0, 3)


def test_unsupported_inputs_are_refused():
    with pytest.raises(ValueError, match="one dtype of fp16, bf16, fp32"):
        run("triton", *make([5], dtype=torch.float64))
    with pytest.raises(ValueError, match="at most 128"):
        run("triton", *make([5], H=144, dtype=torch.float16))
    with pytest.raises(ValueError, match="slopes in fp32"):
        run("triton", *make([5]), torch.ones(1, dtype=torch.float16, device=DEVICE))
    with pytest.raises(ValueError, match="'triton' has no dropout: .* reference, torch"):
        A.resolve("triton", 0.1)


def test_auto_is_triton_on_cuda():
    assert A.resolve("auto", device_type="cpu") == "torch" and A.resolve("auto", device_type="cuda") == "triton"
    with pytest.raises(ValueError, match="flash-attn"):
        A.resolve("flash_attn", device_type="cpu")


def test_custom_op_is_sound():
    """Schema, fake tensors, autograd registration, and tracing with changing sizes, as torch.library checks them."""
    qkv, layout, _ = make([17, 5], 2, 16)
    tiles = F.tiles_for(16, qkv.dtype, F.architecture(qkv.device))
    q, k, v = (x.detach().requires_grad_() for x in qkv.unbind(1))
    for chosen in (tiles.backward(17), tiles.backward(65)):
        table, *tables = (attention_tiles.tile_table(layout.cu_seqlens, tile.rows) for tile in (tiles.forward, *chosen))
        torch.library.opcheck(F._flash_attn_op, (q, k, v, A.alibi_slopes(2).to(DEVICE), table, tables))


def test_compiled_is_eager():
    """One graph for each kind of backward, for all sizes, no break; the same bits as eager."""
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    def attend(qkv, slopes, layout):
        return A.attention(*unpack_heads(qkv), layout, slopes, impl="triton") * 2

    compiled = torch.compile(attend, backend=backend, fullgraph=True, dynamic=True)
    # All sizes of the first batch differ: the compiler would take equal ones for one variable.
    for lengths in ([33, 7, 2, 0, 70, 150], [17, 5], [64, 40, 1]):
        qkv, layout, grad = make(lengths, 2, 16)
        slopes, layout = A.alibi_slopes(2).to(DEVICE), replace(layout, tables=attention_tiles.tile_tables(layout))
        got, want = (f(qkv, slopes, layout) for f in (compiled, attend))
        assert torch.equal(got, want)
        assert torch.equal(torch.autograd.grad(got, qkv, grad)[0], torch.autograd.grad(want, qkv, grad)[0])
    assert len(seen) == (2 if DEVICE == "cpu" else 1)  # fp32 on a GPU has no tile of a whole sequence


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_and_autocast_change_no_bit(dtype):
    """Under autocast too, the dtype of the inputs decides."""
    batch = make([65, 33], 3, 24, dtype)
    first, second = run("triton", *batch), run("triton", *batch)
    with torch.autocast(DEVICE, torch.bfloat16):
        third = run("triton", *batch)
    assert all(map(torch.equal, first, second)) and all(map(torch.equal, first, third))


@pytest.mark.skipif(DEVICE == "cpu", reason="64-bit offsets take more memory and time than the interpreter has")
def test_offsets_beyond_32_bits():
    """2^31 elements lie before the last sequence."""
    N, H, L = 32, 128, 4096
    sequences = 2**31 // (3 * N * H * L) + 2
    layout = unpad_layout(torch.full((sequences,), L, device=DEVICE))
    qkv = torch.zeros(sequences * L, 3, N, H, dtype=torch.float16, device=DEVICE)
    last, alone, grad = make([L], N, H, torch.float16)
    qkv[-L:] = last.detach()
    full_grad = torch.zeros(sequences * L, N, H, dtype=torch.float16, device=DEVICE)
    full_grad[-L:] = grad
    out, dqkv = run("triton", qkv.requires_grad_(), layout, full_grad)
    want, want_grad = run("triton", last, alone, grad)
    assert torch.equal(out[-L:], want) and torch.equal(dqkv[-L:], want_grad)
