"""The fused GEGLU against plain torch and fp64. What it shares with LayerNorm: test_fused_kernels.py."""

import pytest
import torch
import torch.nn.functional as F

from src import geglu_triton, triton_common
from src.geglu_triton import geglu
from tests.model.test_kernels import DEVICE, DTYPES, SCALE, P, assert_within_budget, key_of, run


def inputs_of(T, width, dtype=torch.float32):
    """The packed input, as a list, and a gradient for the output."""
    g = torch.Generator().manual_seed(T * width)
    x, dy = torch.randn(T, 2 * width, generator=g).mul(2), torch.randn(T, width, generator=g)
    return [x.to(dtype).to(DEVICE).requires_grad_()], dy.to(dtype).to(DEVICE)


def mask_of(T, width, key):
    """Which elements the forward keeps, (T, I) bool."""
    return geglu(torch.ones(T, 2 * width, device=DEVICE), P, key) != 0


def plain(x, keep=None):
    gate, up = x.chunk(2, dim=-1)
    out = F.gelu(gate) * up
    return out if keep is None else out * keep * SCALE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "width", "p"), [(1, 40, 0.0), (7, 96, P), (33, 1, P), (127, 24, P), (5, 3072, 0.0)])
def test_output_and_gradient(T, width, p, dtype, poisoned):
    """The mask is read from the output for another input. Gradients agree only if the backward uses the same mask."""
    key = key_of(5) if p else None
    keep = mask_of(T, width, key) if p else None
    inputs, dy = inputs_of(T, width, dtype)
    triton_common.launches.clear()
    got = run(lambda x: geglu(x, p, key), inputs, dy)
    assert triton_common.launches == {"geglu_forward": 1, "geglu_backward": 1}
    rough = run(lambda x: plain(x, keep).to(dtype), inputs, dy)
    exact = run(lambda x: plain(x, keep), [inputs[0].detach().double().requires_grad_()], dy)
    for name, *values in zip(("out", "gradient"), got, rough, exact, strict=True):
        assert values[0].dtype == dtype
        assert_within_budget(*values, name)


def test_large_gates():
    """gelu and its derivative at +-80 and at 0 are exact: x or 0, 1 or 0, and 1/2."""
    gate = torch.tensor([80.0, -80.0, 0.0, 1e4, -1e4], device=DEVICE)
    x = torch.stack([gate, torch.full_like(gate, 3.0)], dim=-1).requires_grad_()
    out = geglu(x)
    torch.testing.assert_close(out.flatten(), 3 * gate.clamp(min=0))
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad[:, 0], torch.tensor([3.0, 0.0, 1.5, 3.0, 0.0], device=DEVICE))
    torch.testing.assert_close(grad[:, 1], gate.clamp(min=0))


def test_each_tile_of_a_wide_row_has_its_own_mask():
    keep = mask_of(8, 2 * geglu_triton.BLOCK, key_of(1))
    left, right = keep.chunk(2, dim=-1)
    assert abs((left == right).float().mean() - (P * P + (1 - P) ** 2)) < 0.04


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="an even number of columns, got 7"):
        geglu(torch.ones(2, 7, device=DEVICE))
