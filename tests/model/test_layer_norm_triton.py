"""The fused LayerNorm against plain torch and fp64. What it shares with GEGLU: test_fused_kernels.py."""

import pytest
import torch
import torch.nn.functional as F

from src import layer_norm_triton, triton_common
from src.layer_norm_triton import layer_norm
from tests.model.test_kernels import DEVICE, DTYPES, SCALE, P, assert_within_budget, key_of, run

NAMES = ("y", "dx", "dweight", "dbias", "dresidual")


def inputs_of(T, D, dtype=torch.float32, residual=True):
    """x, weight, bias and residual, and a gradient for the output."""
    g = torch.Generator().manual_seed(T * D)
    x, r = (torch.randn(T, D, generator=g).add(0.5).to(dtype) for _ in range(2))
    weight, bias = torch.randn(D, generator=g), torch.randn(D, generator=g)
    tensors = (x, weight, bias, r) if residual else (x, weight, bias)
    return [t.to(DEVICE).requires_grad_() for t in tensors], torch.randn(T, D, generator=g).to(dtype).to(DEVICE)


def mask_of(T, D, key):
    """Which elements the kernel keeps: the gradient of a sum of y is 0 where it drops. (T, D) bool."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(T, D, generator=g).to(DEVICE).requires_grad_()
    y = layer_norm(x, torch.randn(D, generator=g).to(DEVICE), torch.zeros(D, device=DEVICE), 1e-12, x.detach(), P, key)
    (dx,) = torch.autograd.grad(y, x, torch.randn(T, D, generator=g).to(DEVICE))
    return dx != 0


def plain(x, weight, bias, residual=None, keep=None, dtype=torch.float32):
    z = x.to(dtype)
    if keep is not None:
        z = z * keep * SCALE
    if residual is not None:
        z = z + residual.to(dtype)
    return F.layer_norm(z, weight.shape, weight.to(dtype), bias.to(dtype), 1e-12)


def check(tensors, dy, function, keep=None):
    """Output and all gradients of ``function(*tensors)`` within the budget."""
    got = run(function, tensors, dy)
    out_dtype = got[0].dtype
    rough = run(lambda x, w, b, r=None: plain(x, w, b, r, keep).to(out_dtype), tensors, dy)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    exact = run(lambda x, w, b, r=None: plain(x, w, b, r, keep, torch.float64), doubles, dy)
    for name, *values in zip(NAMES, got, rough, exact, strict=False):
        assert values[0].shape == values[2].shape
        assert_within_budget(*values, name)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "D", "residual", "p"),
    [
        (1, 24, True, 0.0),
        (7, 96, True, P),
        (33, 768, True, 0.0),
        (127, 24, True, P),
        (33, 96, False, 0.0),
        (7, 1000, False, P),
        (3, 4096, False, 0.0),
    ],
)
def test_outputs_and_gradients(T, D, residual, p, dtype, poisoned):
    key = key_of(5) if p else None
    keep = mask_of(T, D, key) if p else None
    tensors, dy = inputs_of(T, D, dtype, residual)
    poisoned.clear()
    triton_common.launches.clear()
    got = check(tensors, dy, lambda x, w, b, r=None: layer_norm(x, w, b, 1e-12, r, p, key), keep)
    assert triton_common.launches == {"layer_norm_forward": 1, "layer_norm_backward": 1}
    assert [g.dtype for g in got] == [dtype, dtype, torch.float32, torch.float32, dtype][: len(got)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_one_column_is_its_bias(dtype):
    """The gradient is (g - mean(g)) / std with g = dy * weight. Here mean(g) = g, so it is 0.

    A GPU rounds g in the mean, but not in the fused multiply-add that subtracts it: the rest is at most the rounding
    error of g, times 1/std.
    """
    tensors, dy = inputs_of(5, 1, dtype)
    y, dx, dweight, dbias, dresidual = run(lambda x, w, b, r: layer_norm(x, w, b, 1e-12, r), tensors, dy)
    assert torch.equal(y, tensors[2].to(dtype).expand(5, 1)) and not dweight.any()
    torch.testing.assert_close(dbias, dy.float().sum(0))
    rstd = 1e6  # of a variance of 0, with an epsilon of 1e-12
    assert dx.abs().max() <= rstd * torch.finfo(torch.float32).eps * (dy.float() * tensors[1]).abs().max()
    assert torch.equal(dx, dresidual)


def test_more_tiles_than_programs(monkeypatch):
    """Each program takes several tiles, the last ones fewer."""
    monkeypatch.setattr(layer_norm_triton, "PROGRAMS", 3)
    tensors, dy = inputs_of(70, 600, torch.float32)
    check(tensors, dy, lambda x, w, b, r: layer_norm(x, w, b, 1e-12, r))


def test_large_values_far_from_zero():
    """The variance is not the difference of two large numbers."""
    x = torch.randn(9, 96, device=DEVICE) + 1e4
    y = layer_norm(x, torch.ones(96, device=DEVICE), torch.zeros(96, device=DEVICE), 1e-12)
    exact = F.layer_norm(x.double(), (96,), eps=1e-12)
    assert_within_budget(y, F.layer_norm(x, (96,), eps=1e-12), exact, "y")


def test_residual_of_another_dtype():
    (x, weight, bias, residual), dy = inputs_of(9, 96, torch.float32)
    residual = residual.detach().half().requires_grad_()
    got = check([x, weight, bias, residual], dy, lambda x, w, b, r: layer_norm(x, w, b, 1e-12, r))
    assert got[0].dtype == torch.float32 and got[4].dtype == torch.float16


def test_a_hidden_size_above_the_limit_is_refused():
    with pytest.raises(ValueError, match="expected hidden size of at most 4096, got 5000; set kernels to torch"):
        layer_norm(torch.ones(1, 5000, device=DEVICE), torch.ones(5000), torch.ones(5000), 1e-5)


def test_autocast_and_parameters_in_half():
    (x, weight, bias, residual), dy = inputs_of(9, 96, torch.float32)
    with torch.autocast(DEVICE, torch.float16):
        y = layer_norm(x, weight, bias, 1e-12, residual.half())
    assert y.dtype == torch.float16
    grads = torch.autograd.grad(y, (x, weight), dy.half())
    assert [g.dtype for g in grads] == [torch.float32, torch.float32]
    half = weight.detach().half().requires_grad_()
    (grad,) = torch.autograd.grad(layer_norm(x, half, bias, 1e-12).sum(), half)
    assert grad.dtype == torch.float16
