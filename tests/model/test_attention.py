"""Reference against the formula and torch against the reference, on ragged batches. Kernels: test_flash_attn_triton."""

import pytest
import torch

from benchmarks.kernels.compare import kept_bytes
from src import attention as A
from src.bert_padding import unpad_layout

RAGGED = [33, 1, 7, 7, 7, 127, 1, 64, 64, 5]


def make(lengths, N=3, H=16, dtype=torch.float64, seed=0):
    """q, k, v as views of one packed product, as the model makes them."""
    torch.manual_seed(seed)
    qkv = torch.randn(sum(lengths), 3, N, H, dtype=dtype, requires_grad=True)
    return qkv, unpad_layout(torch.tensor(lengths)), A.alibi_slopes(N)


def run(impl, qkv, layout, slopes, grad=None, dropout_p=0.0):
    out = A.attention(*qkv.unbind(1), layout, slopes, dropout_p, impl)
    if grad is None:
        grad = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    return out, torch.autograd.grad(out, qkv, grad)[0]


def by_definition(qkv, cu_seqlens, slopes):
    """One sequence and one head at a time, from the formula."""
    out = torch.empty_like(qkv[:, 0])
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        for n in range(qkv.shape[2]):
            q, k, v = qkv[start:end, :, n].unbind(1)
            i = torch.arange(end - start)
            scores = q @ k.T / q.shape[-1] ** 0.5 - slopes[n] * (i[:, None] - i).abs()
            out[start:end, n] = torch.exp(scores - scores.logsumexp(1, keepdim=True)) @ v
    return out


def test_reference_is_the_formula():
    qkv, layout, slopes = make(RAGGED)
    with torch.no_grad():
        out = A.attention(*qkv.unbind(1), layout, slopes, impl="reference")
        torch.testing.assert_close(out, by_definition(qkv, layout.cu_seqlens, slopes), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [RAGGED, [1], [127], [1, 1, 1], [64] * 5, [3, 0, 2, 0]], ids=str)
@pytest.mark.parametrize("tile_elements", [1, 500, 2**20])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_torch_equals_reference(lengths, tile_elements, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(A, "TILE_ELEMENTS", tile_elements)
    batch = make(lengths, dtype=dtype)
    (out, grad), (want, want_grad) = run("torch", *batch), run("reference", *batch)
    assert out.dtype == dtype
    torch.testing.assert_close(out, want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad, want_grad, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_bias_is_exact_at_long_distances(impl):
    """Alone, as queries are zero. Other slopes than powers of two, distances over 256: neither is exact in bf16."""
    qkv, layout, slopes = make([600], N=12)
    with torch.no_grad():
        qkv[:, 0] = 0
        out = A.attention(*qkv.unbind(1), layout, slopes, impl=impl)
        torch.testing.assert_close(out, by_definition(qkv, layout.cu_seqlens, slopes.double()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_torch_gradients_are_derivatives(dropout_p, monkeypatch):
    """Of the forward with the same dropout masks."""
    monkeypatch.setattr(A, "TILE_ELEMENTS", 30)
    qkv, *rest = make([4, 1, 5], N=2, H=3)

    def f(x):
        torch.manual_seed(3)
        return A.attention(*x.unbind(1), *rest, dropout_p, "torch")

    assert torch.autograd.gradcheck(f, qkv)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_extreme_scores_stay_finite(impl):
    qkv, *rest = make([33, 7], dtype=torch.float32)
    out, grad = run(impl, (qkv.detach() * 20).requires_grad_(), *rest)  # scores of several hundred
    assert out.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_low_precision_only_rounds_inputs_and_output(impl, dtype):
    """Scores, bias and softmax are fp32: the error is that of rounding the result once."""
    qkv, *rest = make([300, 5], dtype=dtype)
    out, _ = run(impl, qkv, *rest)
    want, _ = run("reference", qkv.detach().float().requires_grad_(), *rest)
    assert out.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.float(), want, rtol=eps, atol=eps * 1e-2)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_autocast_does_not_lower_the_scores(impl):
    qkv, *rest = make([300, 5], dtype=torch.float32)
    grad = torch.randn(305, 3, 16)
    want, want_grad = run(impl, qkv, *rest, grad)
    with torch.autocast("cpu", torch.bfloat16):
        out = A.attention(*qkv.unbind(1), *rest, impl=impl)
    assert torch.equal(out, want) and torch.equal(torch.autograd.grad(out, qkv, grad)[0], want_grad)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_dropout_keeps_the_mean_and_follows_the_seed(impl):
    N, H, L = 2, 4, 40
    qkv = torch.zeros(L, 3, N, H, dtype=torch.float64, requires_grad=True)  # equal scores, except for ALiBi
    with torch.no_grad():
        qkv[:, 2] = 1.0
    rest = (unpad_layout(torch.tensor([L])), torch.zeros(N))
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(run(impl, qkv, *rest, dropout_p=0.25)[0])
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    # Each output is mean(keep) / 0.75 over 40 keys: standard deviation 0.09, of the mean over 80 rows 0.01.
    assert abs(outs[0].mean() - 1) < 0.05 and outs[0].std() > 0.03


def test_memory_kept_for_the_backward_is_linear_in_the_length():
    def kept(L):
        qkv, *rest = make([L] * 2, N=2, H=4, dtype=torch.float32)
        return kept_bytes(lambda x: A.attention(*x.unbind(1), *rest, impl="torch"), qkv)[1]

    assert 0 < kept(256) < 4.5 * kept(64)


def test_tiles_cover_each_row_once_and_stay_small(monkeypatch):
    lengths, heads = [5, 5, 5, 0, 300, 1, 1, 40], 2
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).tolist()
    seen = torch.zeros(cu_seqlens[-1], dtype=torch.int64)
    monkeypatch.setattr(A, "TILE_ELEMENTS", 1000)
    for tile, bias in A._biased_tiles(cu_seqlens, A.alibi_slopes(heads), torch.float32):
        rows = tile.queries.stop - tile.queries.start
        assert bias.shape == (1, heads, rows, tile.length)
        assert bias.untyped_storage().nbytes() <= 4 * 2 * 1000
        assert heads * rows * tile.length <= 1000 and (tile.sequences == 1 or rows == tile.length)
        seen[tile.tokens].unflatten(0, (tile.sequences, tile.length))[:, tile.queries] += 1
    assert (seen == 1).all()


def test_slopes_of_a_power_of_two_and_of_twelve():
    assert A.alibi_slopes(8).tolist() == [2.0**-e for e in range(1, 9)]
    twelve = [2.0**-e for e in (1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5)]
    torch.testing.assert_close(A.alibi_slopes(12), torch.tensor(twelve), rtol=1e-6, atol=0)
    assert A.alibi_slopes(12).dtype == torch.float32 and len(A.alibi_slopes(3)) == 3
