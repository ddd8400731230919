"""Reference against the formula and torch against the reference, on ragged batches. Kernels: test_flash_attn_triton."""

import os
import subprocess
import sys
import types
from importlib.metadata import PackageNotFoundError

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


class _Scored(torch.autograd.Function):
    """A score_mod with its score_mod_bwd, called with the arguments that flash-attn-4 passes."""

    @staticmethod
    def forward(ctx, score, score_mod, score_mod_bwd, head, aux_tensors):
        i = torch.arange(len(score), dtype=torch.int32)
        where = dict(q_idx=i[:, None], kv_idx=i, seqlen_info=None, aux_tensors=aux_tensors)
        ctx.backward = lambda grad: score_mod_bwd(grad, score, torch.zeros(1, dtype=torch.int32), head, **where)
        return score_mod(score, torch.zeros(1, dtype=torch.int32), head, **where)

    @staticmethod
    def backward(ctx, grad):
        return ctx.backward(grad), None, None, None, None


def flash_attn_4_in_torch(q, k, v, *, cu_seqlens_q, score_mod, score_mod_bwd, aux_tensors, **kwargs):
    """What flash_attn.cute computes, of one sequence and head at a time, in fp32."""
    out = torch.zeros_like(q)
    for start, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        for n in range(q.shape[1]):
            wide_q, wide_k, wide_v = (x[start:end, n].float() for x in (q, k, v))
            head = torch.tensor([n], dtype=torch.int32)
            score = wide_q @ wide_k.T * q.shape[-1] ** -0.5
            score = _Scored.apply(score, score_mod, score_mod_bwd, head, aux_tensors)
            out[start:end, n] = (score.softmax(1) @ wide_v).to(q.dtype)
    flash_attn_4_in_torch.called = kwargs
    return out, None


@pytest.fixture
def flash_attn_4(monkeypatch):
    """A stand-in for the package, installed on a machine with a GPU that it supports."""
    package = types.SimpleNamespace(flash_attn_varlen_func=flash_attn_4_in_torch)
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", package)
    monkeypatch.setitem(A.MISSING, "flash_attn_4", lambda device_type: None)


def test_flash_attn_4_is_given_alibi(flash_attn_4):
    """Its score_mod and score_mod_bwd, run on tensors, give the reference's output and gradients."""
    qkv, *rest = make(RAGGED, dtype=torch.float16)
    out, grad = run("flash_attn_4", qkv, *rest)
    want, want_grad = run("reference", qkv, *rest)
    torch.testing.assert_close(out, want, rtol=2e-3, atol=2e-5)
    torch.testing.assert_close(grad, want_grad, rtol=2e-3, atol=1e-3)
    layout = rest[0]
    lengths = dict(cu_seqlens_k=layout.cu_seqlens, max_seqlen_q=127, max_seqlen_k=127)
    assert flash_attn_4_in_torch.called == dict(lengths, deterministic=False)


def test_flash_attn_4_is_deterministic_when_torch_is(flash_attn_4):
    torch.use_deterministic_algorithms(True)
    try:
        run("flash_attn_4", *make([3], dtype=torch.bfloat16))
    finally:
        torch.use_deterministic_algorithms(False)
    assert flash_attn_4_in_torch.called["deterministic"] is True


def test_flash_attn_4_refuses_what_its_kernels_cannot(flash_attn_4):
    with pytest.raises(ValueError, match=r"'flash_attn_4': expected fp16 or bf16, got torch.float32"):
        run("flash_attn_4", *make([5], dtype=torch.float32))
    for H in (12, 136):
        with pytest.raises(ValueError, match=f"multiple of 8 and at most 128, got {H}"):
            run("flash_attn_4", *make([5], H=H, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="'flash_attn_4' has no dropout: .* reference, torch"):
        A.resolve("flash_attn_4", 0.1)


def test_each_package_is_looked_for_by_its_own_name(monkeypatch):
    """Both install a package flash_attn."""

    def only(installed):
        def version(distribution):
            if distribution != installed:
                raise PackageNotFoundError(distribution)
            return "1"

        A._package_missing.cache_clear()
        monkeypatch.setattr(A, "version", version)
        return {name: A.MISSING[name]("cuda") for name in ("flash_attn", "flash_attn_4")}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    missing = "the package {} is not installed ({})".format
    assert only("flash-attn") == {
        "flash_attn": None,
        "flash_attn_4": missing("flash-attn-4", "requirements-flash-attn-4.txt"),
    }
    assert only("flash-attn-4") == {"flash_attn": missing("flash-attn", "requirements-gpu.txt"), "flash_attn_4": None}
    assert A.MISSING["flash_attn_4"]("cpu") == "flash-attn-4 needs a CUDA device, and this is cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, runs in {(8, 0): False, (9, 0): True, (10, 3): True, (11, 0): True, (12, 0): False}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert (A.MISSING["flash_attn_4"]("cuda") is None) == runs
    A._package_missing.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["flash_attn", "flash_attn_4"])
def test_packages_round_at_most_twice_as_much_as_plain_torch(impl, dtype):
    """Output and gradients, against fp32."""
    try:
        A.resolve(impl, device_type="cuda")
    except ValueError as reason:
        pytest.skip(str(reason))
    qkv, layout, slopes = make([513, *RAGGED], N=12, H=64, dtype=torch.float32)
    layout = unpad_layout(layout.cu_seqlens.diff().cuda())
    qkv, slopes = qkv.detach().to("cuda", dtype).requires_grad_(), slopes.cuda()
    grad = torch.randn(qkv[:, 0].shape, device="cuda").to(dtype)

    rows = []  # of plain torch: every product and the weights in ``dtype``
    lengths = layout.cu_seqlens.diff().tolist()
    for q, k, v in zip(*(x.transpose(0, 1).split(lengths, 1) for x in qkv.unbind(1)), strict=True):
        i = torch.arange(q.shape[1], device="cuda")
        bias = -slopes[:, None, None] * (i[:, None] - i).abs()
        rows.append(((q @ k.transpose(1, 2) * 64**-0.5 + bias).softmax(2).to(dtype) @ v).transpose(0, 1))
    plain = torch.cat(rows)
    plain_results = plain, torch.autograd.grad(plain, qkv, grad)[0]
    exact = run("reference", qkv.detach().float().requires_grad_(), layout, slopes, grad.float())
    for got, want, other in zip(run(impl, qkv, layout, slopes, grad), exact, plain_results, strict=True):
        assert got.isfinite().all()
        allowed = max(2 * (other.float() - want).abs().max(), 4 * torch.finfo(dtype).eps * want.abs().max())
        assert (got.float() - want).abs().max() <= allowed


FOR_ANOTHER_CARD = """
import torch
from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
from src.attention import _alibi, _alibi_backward
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    q, k, v = torch.empty(1000, 3, 12, 64, dtype=torch.bfloat16, device="cuda").unbind(1)
    cu_seqlens = torch.empty(5, dtype=torch.int32, device="cuda")
    mod = dict(score_mod=_alibi, aux_tensors=[torch.empty(12, device="cuda")])
    lengths = dict(cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=500, max_seqlen_k=500)
    out, lse, *_ = _flash_attn_fwd(q, k, v, return_lse=True, **lengths, **mod)
    _flash_attn_bwd(q, k, v, out, torch.empty_like(out), lse, score_mod_bwd=_alibi_backward, **lengths, **mod)
"""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["90", "100"])
def test_flash_attn_4_compiles_alibi_without_a_gpu(architecture, tmp_path):
    """Forward and backward, by the package's own compiler; the PTX converts distances to fp32."""
    if (reason := A._flash_attn_4_missing("cuda")) is not None and "not installed" in reason:
        pytest.skip(reason)
    target = {"FLASH_ATTENTION_ARCH": f"sm_{architecture}", "CUTE_DSL_ARCH": f"sm_{architecture}a"}
    keep = {"CUTE_DSL_KEEP": "ptx", "CUTE_DSL_DUMP_DIR": str(tmp_path), "FLASH_ATTENTION_NUM_SMS": "132"}
    command = [sys.executable, "-c", FOR_ANOTHER_CARD]
    done = subprocess.run(command, env={**os.environ, **target, **keep}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for kernel in ("fwd_sm", "bwd_sm"):
        (ptx,) = (path.read_text() for path in tmp_path.glob(f"*flash_{kernel}{architecture}*.ptx"))
        assert "abs.s32" in ptx and "cvt.rn.f32.s32" in ptx
