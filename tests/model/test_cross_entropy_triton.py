"""The fused cross entropy against that of masked_lm_loss.py in plain torch, and fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from src import cross_entropy_triton, triton_common
from src.masked_lm_loss import masked_lm_loss_in_place
from tests.model.test_kernels import DEVICE, DTYPES, assert_within_budget

INF, NAN = float("inf"), float("nan")


def inputs_of(M, V, dtype=torch.float32, scale=3.0):
    """Logits (M, V) and labels (M,), every third of them negative."""
    g = torch.Generator().manual_seed(M * V)
    logits, labels = torch.randn(M, V, generator=g) * scale, torch.randint(V, (M,), generator=g)
    labels[1::3] = torch.tensor([-100, -1]).repeat(M)[: len(labels[1::3])]
    return logits.to(dtype).to(DEVICE), labels.to(DEVICE)


def run(logits, labels, kernels="triton", scale=0.5):
    """The outputs, and the gradient of ``scale * loss_sum``; overwrites the logits."""
    logits = logits.detach().requires_grad_()
    out = masked_lm_loss_in_place(logits, labels, kernels)
    (grad,) = torch.autograd.grad(out["loss_sum"], logits, out["loss_sum"].new_tensor(scale))
    assert grad.data_ptr() == logits.data_ptr() and grad.dtype == logits.dtype
    return out, grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("M", "V", "stride"),
    [(0, 7, 7), (1, 7, 7), (127, 1, 1), (33, 97, 112), (7, 1000, 1001), (3, 2048, 2048), (4, 30522, 30522)]
    + [(4, 30528, 30544)],
)
def test_loss_and_gradient(M, V, stride, dtype, poisoned):
    """Also of strided rows; what lies between them stays."""
    logits, labels = inputs_of(M, V, dtype)
    memory = torch.full((M, stride), NAN, dtype=dtype, device=DEVICE)
    memory[:, :V] = logits
    triton_common.launches.clear()
    out, grad = run(memory[:, :V], labels)
    assert triton_common.launches == ({"cross_entropy_forward": 1, "cross_entropy_backward": 1} if M else {})
    rough, rough_grad = run(logits.clone(), labels, "torch")
    exact = logits.double().requires_grad_()
    loss = F.cross_entropy(exact, labels.where(labels >= 0, -100), reduction="sum")
    assert out["loss_sum"].dtype == torch.float32 and memory[:, V:].isnan().all()
    for name in ("correct", "count"):
        assert torch.equal(out[name], rough[name]) and out[name].dtype == torch.int64
    if M:
        assert_within_budget(out["loss_sum"], rough["loss_sum"], loss, "loss")
        assert_within_budget(grad, rough_grad, torch.autograd.grad(0.5 * loss, exact)[0], "gradient")
    assert not grad[labels < 0].any()


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_the_highest_logits_are_counted_as_torch_does(scale):
    """Labels at the highest logit, at the second of two equal ones, and elsewhere, in the first and the last block."""
    V = 2 * cross_entropy_triton.BLOCK + 5
    logits, labels = inputs_of(8, V, scale=0.1)
    labels[:] = torch.tensor([3, 3, V - 1, V - 1, 9, V - 2, 0, 0])
    for row, columns in enumerate([[3], [2, 3], [V - 1], [3, V - 1], [9, V - 1], [V - 2, V - 1], [], [0, V // 2]]):
        logits[row, columns] = scale
    logits[6, 1:] = -INF  # a loss of 0
    out, grad = run(logits.clone(), labels)
    want, want_grad = run(logits, labels, "torch")
    assert out["correct"] == want["correct"] == 6
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(grad, want_grad)


def test_logits_of_a_thousand():
    """Maximum and sum are kept apart: loss and gradient are as exact as near 0."""
    logits, labels = inputs_of(7, 97)
    logits = (logits * 64).round() / 64  # exact after the shifts, too
    labels[labels < 0] = 5
    want, want_grad = run(logits.clone(), labels)
    for shift in (1000.0, -1000.0):
        out, grad = run(logits + shift, labels)
        assert torch.equal(out["loss_sum"], want["loss_sum"]) and torch.equal(grad, want_grad)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("values", [{4: NAN}, {4: INF}, {2: -INF}, {4: -INF}, dict.fromkeys(range(9), -INF)], ids=str)
def test_infinite_and_undefined_logits(values):
    """As plain torch: NaN where it is NaN, also if the label 2 is at -inf; other rows are as without."""
    logits, labels = inputs_of(3, 9)
    labels[:] = 2
    for column, value in values.items():
        logits[1, column] = value
    out, grad = run(logits.clone(), labels)
    want, want_grad = run(logits, labels, "torch")
    torch.testing.assert_close(out["loss_sum"], want["loss_sum"], equal_nan=True)
    torch.testing.assert_close(grad, want_grad, equal_nan=True)
    assert out["loss_sum"].isfinite() == (values == {4: -INF}) and grad[::2].isfinite().all()


def test_a_row_without_a_label_may_be_undefined():
    logits, labels = inputs_of(3, 9)
    logits[1] = NAN
    out, grad = run(logits, labels)
    assert labels[1] < 0 and out["count"] == 2 and out["loss_sum"].isfinite() and not grad[1].any()


def test_a_label_beyond_the_vocabulary_makes_the_loss_undefined():
    """And its row of the gradient; the kernel cannot raise. It reads no logit of another row."""
    for label in (9, 2**40):
        logits, labels = inputs_of(3, 9)
        labels[0] = label
        out, grad = run(logits, labels)
        assert out["loss_sum"].isnan() and out["correct"] <= 1
        assert grad[0].isnan().all() and grad[1:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_again(dtype):
    logits, labels = inputs_of(33, 1000, dtype)
    (first, first_grad), (second, second_grad) = (run(logits.clone(), labels) for _ in range(2))
    assert torch.equal(first["loss_sum"], second["loss_sum"]) and torch.equal(first_grad, second_grad)


def test_columns_that_are_not_contiguous_are_copied():
    logits, labels = inputs_of(5, 9)
    strided = logits.t().contiguous().t().requires_grad_()
    out = masked_lm_loss_in_place(strided, labels.int(), "triton")
    (grad,) = torch.autograd.grad(out["loss_sum"], strided)
    torch.testing.assert_close(grad, run(logits, labels, "torch", 1.0)[1])


def test_wrong_dtypes_and_shapes_are_refused():
    logits, labels = inputs_of(5, 9)
    with pytest.raises(TypeError, match="expected fp16, bf16 or fp32, got torch.float64; set kernels to torch"):
        masked_lm_loss_in_place(logits.double(), labels, "triton")
    for kernels in ("triton", "torch"):
        with pytest.raises(ValueError, match=r"labels: expected one for each row, \(5,\), got \(4,\)"):
            masked_lm_loss_in_place(logits, labels[:4], kernels)


class Operations(TorchDispatchMode):
    """Counts operations that launch on a GPU: all but views and new memory, and those of the interpreter."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        monkeypatch.setattr(cross_entropy_triton, "launch", lambda *args, **kwargs: None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func.overloadpacket.__name__ in ("empty", "detach", "unbind", "select")
        self.count += not (made or func.is_view)
        return func(*args, **(kwargs or {}))


def test_few_launches_around_the_kernels(monkeypatch):
    """Two sums, the mean's clamp and quotient; in the backward its quotient."""
    logits, labels = inputs_of(5, 9)
    logits.requires_grad_()
    dloss = torch.ones((), device=DEVICE)
    with Operations(monkeypatch) as forward:
        loss = masked_lm_loss_in_place(logits, labels, "triton")["loss"]
    with Operations(monkeypatch) as backward:
        torch.autograd.grad(loss, logits, dloss)
    assert (forward.count, backward.count) == (4, 1)
