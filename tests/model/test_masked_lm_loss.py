"""The loss that overwrites its logits, behind the product that makes them, in plain torch, against F.cross_entropy.

Its kernel: test_cross_entropy_triton.py.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.kernels.compare import kept_bytes
from src import masked_lm_loss
from src.masked_lm_loss import masked_lm_loss_in_place
from tests.model.test_kernels import DEVICE, assert_within_budget

D, V = 24, 97


def inputs_of(M, dtype=torch.float32, scale=1.0):
    g = torch.Generator().manual_seed(M)
    x, weight, bias = (torch.randn(*shape, generator=g) for shape in ((M, D), (V, D), (V,)))
    labels = torch.randint(0, V, (M,), generator=g)
    return [t.to(dtype).to(DEVICE).requires_grad_() for t in (x, weight * scale, bias)], labels.to(DEVICE)


def ours(x, weight, bias, labels):
    return masked_lm_loss_in_place(F.linear(x, weight, bias), labels, "torch")


def plain(x, weight, bias, labels):
    """loss_sum, in plain torch."""
    logits = F.linear(x, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, reduction="sum")


@pytest.fixture(params=[2**24, 3 * V])
def block(request, monkeypatch):
    """All rows in one block, and three rows per block."""
    monkeypatch.setattr(masked_lm_loss, "BLOCK_ELEMENTS", request.param)


@pytest.mark.parametrize("M", [1, 7, 33])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_and_gradients(M, dtype, block):
    tensors, labels = inputs_of(M, dtype)
    out = ours(*tensors, labels)
    want = plain(*tensors, labels)
    logits = F.linear(*tensors)
    torch.testing.assert_close(out["loss_sum"], want)
    torch.testing.assert_close(out["loss"], want / M)
    assert out["count"] == M and out["correct"] == (logits.argmax(1) == labels).sum()
    torch.testing.assert_close(torch.autograd.grad(out["loss"], tensors), torch.autograd.grad(want / M, tensors))
    with torch.no_grad():
        again = ours(*tensors, labels)
    for name, value in out.items():
        torch.testing.assert_close(again[name], value)


def test_rows_without_a_label_do_not_count(block):
    """Loss, gradients and counts are those without these rows; their own gradient is 0."""
    (x, weight, bias), labels = inputs_of(9)
    keep = torch.tensor([0, 2, 3, 8], device=DEVICE)
    ignored = torch.full_like(labels, -100)
    ignored[keep] = labels[keep]
    out = ours(x, weight, bias, ignored)
    want = ours(x[keep], weight, bias, labels[keep])
    for name in want:
        torch.testing.assert_close(out[name], want[name])
    assert out["count"] == 4
    got = torch.autograd.grad(out["loss"], (x, weight, bias))
    torch.testing.assert_close(got, torch.autograd.grad(want["loss"], (x, weight, bias)))
    assert not got[0][ignored < 0].any()


@pytest.mark.parametrize("M", [0, 5])
def test_without_labels_loss_and_gradients_are_zero(M):
    tensors, labels = inputs_of(M)
    out = ours(*tensors, torch.full_like(labels, -100))
    assert out["loss"] == 0 and out["count"] == 0 and out["correct"] == 0
    assert not any(grad.any() for grad in torch.autograd.grad(out["loss"], tensors))


@pytest.mark.parametrize(
    ("M", "scale", "dtype"), [(33, 20.0, None), (127, 1.0, torch.bfloat16), (127, 1.0, torch.float16)], ids=str
)
def test_errors_are_within_budget(M, scale, dtype):
    """Of loss and gradients, all fp32: with logits beyond +-80, and under autocast."""
    tensors, labels = inputs_of(M, scale=scale)
    assert dtype is not None or F.linear(*tensors).abs().max() > 80
    results = []
    for function in (lambda *t: ours(*t)["loss_sum"], plain):
        with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
            loss = function(*tensors, labels)
        results.append((loss, *torch.autograd.grad(loss, tensors)))
    assert {t.dtype for t in results[0]} == {torch.float32}
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    loss = plain(*doubles, labels)
    exact = (loss, *torch.autograd.grad(loss, doubles))
    for name, *values in zip(("loss", "dx", "dweight", "dbias"), *results, exact, strict=True):
        assert_within_budget(*values, name)


def test_only_the_logits_are_kept_and_their_gradient_overwrites_them():
    M = 33
    tensors, labels = inputs_of(M)
    out, kept = kept_bytes(lambda *args: ours(*args)["loss_sum"], *tensors, labels)
    assert kept == M * V * 4 + 2 * M * 4 + 8  # the logits, maxima, sums, and the count that the mean divides by
    logits = next(t for t in out.grad_fn.saved_tensors if t.shape == (M, V))
    (dbias,) = torch.autograd.grad(out, tensors[2], retain_graph=True)
    torch.testing.assert_close(logits.sum(0), dbias)
    with pytest.raises(RuntimeError, match="supports one backward"):  # never a wrong gradient
        torch.autograd.grad(out, tensors)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_logits_that_something_else_saved_are_not_overwritten_in_silence(kernels):
    """Such as a module behind the decoder, whose own backward reads them."""
    (x, weight, bias), labels = inputs_of(7)
    logits = F.linear(x, weight, bias).tanh()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(masked_lm_loss_in_place(logits, labels, kernels)["loss"], x)


def test_only_some_inputs_need_gradients():
    (x, weight, bias), labels = inputs_of(7)
    frozen = ours(x, weight.detach(), bias.detach(), labels)["loss"]
    want = ours(x, weight, bias, labels)["loss"]
    torch.testing.assert_close(torch.autograd.grad(frozen, x), torch.autograd.grad(want, x))


@pytest.mark.skipif(DEVICE == "cuda", reason="an assertion on the device, which ends the process")
def test_a_label_beyond_the_vocabulary_raises():
    tensors, labels = inputs_of(3)
    labels[1] = V
    with pytest.raises(RuntimeError, match="out of bounds"):
        ours(*tensors, labels)
