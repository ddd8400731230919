"""The fused GEGLU against plain torch and fp64."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.kernels.saved_bytes import kept_bytes
from src import geglu_triton, triton_common
from src.geglu_triton import geglu
from tests.model.test_kernels import (
    DEVICE,
    DTYPES,
    assert_within_budget,
    poisoned,  # noqa: F401
)

P = 0.3
SCALE = 1 / (1 - int(P * 2**16) / 2**16)


def inputs_of(T, width, dtype):
    g = torch.Generator().manual_seed(T * width)
    x, dy = torch.randn(T, 2 * width, generator=g).mul(2), torch.randn(T, width, generator=g)
    return x.to(dtype).to(DEVICE).requires_grad_(), dy.to(dtype).to(DEVICE)


def key_of(seed=0):
    return torch.tensor([seed], dtype=torch.int64, device=DEVICE)


def mask_of(T, width, key):
    """Which elements the forward keeps, (T, I) bool."""
    return geglu(torch.ones(T, 2 * width, device=DEVICE), P, key) != 0


def plain(x, keep=None):
    gate, up = x.chunk(2, dim=-1)
    out = F.gelu(gate) * up
    return out if keep is None else out * keep * SCALE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "width", "p"), [(1, 40, 0.0), (7, 96, P), (33, 1, P), (127, 24, P), (5, 3072, 0.0)])
def test_output_and_gradient(T, width, p, dtype, poisoned):  # noqa: F811
    """The mask is read off the forward's output for other input: that gradients agree shows it in the backward too."""
    key = key_of(5) if p else None
    keep = mask_of(T, width, key) if p else None
    x, dy = inputs_of(T, width, dtype)
    triton_common.launches.clear()
    out = geglu(x, p, key)
    (grad,) = torch.autograd.grad(out, x, dy)
    assert triton_common.launches == {"geglu_forward": 1, "geglu_backward": 1}
    rough = plain(x, keep).to(dtype)
    (rough_grad,) = torch.autograd.grad(rough, x, dy)
    x64 = x.detach().double().requires_grad_()
    exact = plain(x64, keep)
    (exact_grad,) = torch.autograd.grad(exact, x64, dy.double())
    assert out.dtype == grad.dtype == dtype
    assert_within_budget(out, rough, exact, "out")
    assert_within_budget(grad, rough_grad, exact_grad, "gradient")


def test_large_gates():
    """gelu and its derivative at +-80 and at 0 are exact: x or 0, 1 or 0, and 1/2."""
    gate = torch.tensor([80.0, -80.0, 0.0, 1e4, -1e4], device=DEVICE)
    x = torch.stack([gate, torch.full_like(gate, 3.0)], dim=-1).requires_grad_()
    out = geglu(x)
    torch.testing.assert_close(out.flatten(), 3 * gate.clamp(min=0))
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad[:, 0], torch.tensor([3.0, 0.0, 1.5, 3.0, 0.0], device=DEVICE))
    torch.testing.assert_close(grad[:, 1], gate.clamp(min=0))


def test_rows_may_be_strided_and_have_more_dimensions():
    wide = torch.randn(6, 120, device=DEVICE)
    for x in (wide[:, 40:80], wide[:, :40].view(2, 3, 40), wide.t()[:, :4], wide[:, ::3]):
        x = x.detach().requires_grad_()
        out = geglu(x)
        torch.testing.assert_close(out, plain(x))
        got = torch.autograd.grad(out.sum(), x)  # the gradient comes with stride 0
        torch.testing.assert_close(got, torch.autograd.grad(plain(x).sum(), x))


def test_no_rows():
    x = torch.empty(0, 48, device=DEVICE, requires_grad=True)
    out = geglu(x)
    assert out.shape == (0, 24) and torch.autograd.grad(out.sum(), x)[0].shape == (0, 48)


def test_same_bits_again_and_another_mask_for_another_key():
    x, dy = inputs_of(50, 96, torch.float16)

    def run(key):
        out = geglu(x, P, key)
        return out, *torch.autograd.grad(out, x, dy)

    first, second, other = run(key_of(3)), run(key_of(3)), run(key_of(4))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    keep, another = first[0] != 0, other[0] != 0
    n = keep.numel()
    assert abs(keep.float().mean() - (1 - P)) < 5 * (P * (1 - P) / n) ** 0.5
    assert abs((keep == another).float().mean() - (P * P + (1 - P) ** 2)) < 0.04


def test_wide_rows_have_one_mask_over_all_their_tiles():
    """Each of a row's tiles draws other bits."""
    keep = mask_of(8, 2 * geglu_triton.BLOCK, key_of(1))
    left, right = keep.chunk(2, dim=-1)
    assert abs((left == right).float().mean() - (P * P + (1 - P) ** 2)) < 0.04


def test_dropout_of_less_than_a_bit_is_none():
    x, _ = inputs_of(7, 96, torch.float32)
    assert torch.equal(geglu(x), geglu(x, 1e-6, key_of()))


def test_what_is_refused():
    x = torch.ones(2, 8, device=DEVICE)
    with pytest.raises(ValueError, match="needs a key"):
        geglu(x, 0.1)
    with pytest.raises(ValueError, match="an even number of columns, got 7"):
        geglu(x[:, :7])
    with pytest.raises(TypeError, match="got torch.float64"):
        geglu(x.double())


@pytest.mark.parametrize("p", [0.0, P])
def test_kept_for_the_backward(p):
    """Its argument alone; the key is the caller's."""
    x, _ = inputs_of(33, 96, torch.float16)
    key = key_of() if p else None
    assert kept_bytes(geglu, x, p, key)[1] == 0


def test_custom_op():
    x, _ = inputs_of(5, 24, torch.float32)
    torch.library.opcheck(geglu_triton._forward_op, (x, key_of(), P))
    torch.library.opcheck(geglu_triton._forward_op, (x, None, 0.0), test_utils=("test_schema", "test_faketensor"))


def test_compiled_with_dropout_equals_eager():
    key = key_of(9)

    def glu(x):
        return geglu(x, P, key)

    torch._dynamo.reset()
    compiled = torch.compile(glu, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (3, 17, 33):
        x, dy = inputs_of(T, 24, torch.float32)
        want, got = glu(x), compiled(x)
        assert torch.equal(got, want)
        assert torch.equal(torch.autograd.grad(got, x, dy)[0], torch.autograd.grad(want, x, dy)[0])
