"""What the fused LayerNorm and GEGLU have in common."""

import pytest
import torch

from benchmarks.kernels.compare import kept_bytes
from src.geglu_triton import _forward_op as geglu_op
from src.geglu_triton import geglu
from src.layer_norm_triton import _forward_op as layer_norm_op
from src.layer_norm_triton import layer_norm
from tests.model import test_geglu_triton, test_layer_norm_triton
from tests.model.test_kernels import DEVICE, P, key_of, run

INPUTS = {"layer_norm": test_layer_norm_triton.inputs_of, "geglu": test_geglu_triton.inputs_of}
MASKS = {"layer_norm": test_layer_norm_triton.mask_of, "geglu": test_geglu_triton.mask_of}
pytestmark = pytest.mark.parametrize("name", INPUTS)


def fused(name, p=0.0, key=None):
    """The kernel as a function of ``INPUTS``."""
    if name == "geglu":
        return lambda x: geglu(x, p, key)
    return lambda x, weight, bias, residual: layer_norm(x, weight, bias, 1e-12, residual, p, key)


def test_same_bits_again(name):
    tensors, dy = INPUTS[name](127, 96, torch.float16)
    first, second = (run(fused(name, P, key_of(3)), tensors, dy) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_strided_rows_and_more_dimensions(name):
    wide, (weight, bias) = torch.randn(6, 120, device=DEVICE), torch.randn(2, 40, device=DEVICE)
    for x in (wide[:, 40:80], wide[:, :40].view(2, 3, 40), wide.t()[:, :4], wide[:, ::3]):
        x = x.detach().requires_grad_()
        if name == "geglu":
            out, want, tolerance = geglu(x), test_geglu_triton.plain(x), {}
        else:
            w, b = weight[: x.shape[-1]], bias[: x.shape[-1]]
            out, want = layer_norm(x, w, b, 1e-5, x), torch.nn.functional.layer_norm(2 * x, w.shape, w, b, 1e-5)
            tolerance = dict(rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out, want, **tolerance)
        got = torch.autograd.grad(out.sum(), x)  # the output's gradient has stride 0
        torch.testing.assert_close(got, torch.autograd.grad(want.sum(), x), **tolerance)


def test_no_rows(name):
    tensors, dy = INPUTS[name](0, 24)
    out, dx, *others = run(fused(name), tensors, dy)
    assert out.shape == dy.shape and dx.shape == tensors[0].shape and not any(grad[:24].any() for grad in others)


def test_dropout_depends_only_on_key_and_position(name):
    """Share kept; adjacent elements are independent; another key, another mask."""
    T, D = 64, 96
    keep = MASKS[name](T, D, key_of(1))
    assert abs(keep.float().mean() - (1 - P)) < 5 * (P * (1 - P) / keep.numel()) ** 0.5
    assert torch.equal(keep, MASKS[name](T, D, key_of(1)))
    assert torch.equal(keep[:7], MASKS[name](7, D, key_of(1)))  # not on the other rows
    for other in (2, 1 + 2**32, -1):
        agree = (keep == MASKS[name](T, D, key_of(other))).float().mean()
        assert abs(agree - (P * P + (1 - P) ** 2)) < 0.03
    flat = keep.flatten().float()
    for lag in (1, 2, 4, 8, D):
        assert abs(torch.corrcoef(torch.stack([flat[lag:], flat[:-lag]]))[0, 1]) < 0.07


def test_dropout_below_one_bit_is_none(name):
    tensors, dy = INPUTS[name](7, 96)
    none, tiny = run(fused(name), tensors, dy), run(fused(name, 1e-6, key_of()), tensors, dy)
    assert all(map(torch.equal, none, tiny))


def test_dropout_without_key_and_fp64_are_refused(name):
    (x, *others), _ = INPUTS[name](2, 8)
    with pytest.raises(ValueError, match="needs a key"):
        fused(name, 0.1)(x, *others)
    with pytest.raises(TypeError, match="got torch.float64"):
        fused(name)(x.double(), *others)


@pytest.mark.parametrize("p", [0.0, P])
def test_kept_for_the_backward(name, p):
    """Only mean and 1/std, 8 bytes per row, of LayerNorm. Inputs and the caller's key do not count."""
    tensors, _ = INPUTS[name](33, 96, torch.float16)
    key = key_of() if p else torch.empty(0)
    _, kept = kept_bytes(fused(name, p, key if p else None), *tensors, ignored=(key,))
    assert kept == {"layer_norm": 8 * 33, "geglu": 0}[name]


def test_custom_op_is_sound(name):
    """Schema and fake tensors, with and without dropout; autograd and tracing with it."""
    (x, *others), _ = INPUTS[name](5, 24)
    op, cases = geglu_op, [(x, key_of(), P), (x, None, 0.0)]
    if name == "layer_norm":
        weight, bias, residual = others
        op, cases = layer_norm_op, [(x, residual, weight, bias, key_of(), 1e-12, P, torch.float32)]
        cases += [(x, r, weight, bias, None, 1e-12, 0.0, torch.float16) for r in (residual, None)]
    torch.library.opcheck(op, cases[0])
    for case in cases[1:]:
        torch.library.opcheck(op, case, test_utils=("test_schema", "test_faketensor"))


def test_compiled_with_dropout_equals_eager(name):
    function = fused(name, P, key_of(9))
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (3, 17, 33):
        tensors, dy = INPUTS[name](T, 24)
        want, got = run(function, tensors, dy), run(compiled, tensors, dy)
        assert all(map(torch.equal, got, want))
