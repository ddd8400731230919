"""What the kernels share, and whole models with them."""

import pytest
import torch

from src import fused_torch, kernels
from src.configuration_bert import BertConfig
from tests.test_bert_layers import batch_of, gradients, model_of, unpadded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(DEVICE == "cpu", reason="triton's interpreter truncates when it stores bf16"),
    ),
]


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory is NaN and lies between guards; the check runs at the end."""
    empty, made = torch.empty, []

    def poison(*shape, dtype=torch.float32, device="cpu"):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        size = int(torch.Size(shape).numel())
        memory = torch.full((size + 128,), 7.0, dtype=dtype, device=device)
        view = memory[64 : 64 + size].view(shape)
        view.fill_(float("nan"))
        made.append((memory, size))
        return view

    monkeypatch.setattr(torch, "empty", poison)
    yield made
    monkeypatch.setattr(torch, "empty", empty)
    assert made
    for memory, size in made:
        assert (memory[:64] == 7.0).all() and (memory[64 + size :] == 7.0).all()
        assert not memory.isnan().any(), "memory that nothing was written to"


def assert_within_budget(got, plain, exact, what):
    """At most twice the error of plain torch in the same dtype, and a rounding of the result."""
    error = (got.double() - exact).abs().max().item()
    budget = 2 * (plain.double() - exact).abs().max().item()
    rounding = torch.finfo(got.dtype).eps * exact.abs().max().item()
    assert error <= budget + rounding, f"{what}: error {error:.2e}, twice plain torch's {budget:.2e}"


def kept_bytes(function, *args):
    """Result and bytes that its backward keeps, storages once, arguments' not counted."""
    seen = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
    total = 0

    def pack(x):
        nonlocal total
        pointer = x.untyped_storage().data_ptr()
        total += 0 if pointer in seen else x.untyped_storage().nbytes()
        seen.add(pointer)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function(*args)
    return out, total


def test_kernels_that_are_not_there():
    with pytest.raises(ValueError, match="'cuda' is not there; choose one of auto, triton, torch"):
        kernels.resolve("cuda")
    with pytest.raises(ValueError, match="'fast' is not there"):
        model_of(kernels="fast")


def test_triton_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernels, "interpreted", lambda: False)
    with pytest.raises(ValueError, match="'triton' cannot run: no GPU is found; choose auto or torch"):
        model_of(kernels="triton")
    with pytest.raises(ValueError, match="need a tensor on a GPU, not on cpu"):
        kernels.rows_of(torch.ones(2, 3))
    monkeypatch.setattr(kernels, "triton", None)
    with pytest.raises(ValueError, match="the package triton is not installed"):
        kernels.resolve("triton")
    assert kernels.resolve("auto") == "auto" and not kernels.use_triton("auto", torch.ones(1))


def test_fp64_and_probabilities_that_are_none_are_refused():
    with pytest.raises(TypeError, match="take fp16, bf16 and fp32, not torch.float64; set kernels to torch"):
        kernels.rows_of(torch.ones(2, 3, dtype=torch.float64, device=DEVICE))
    for p in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="at least 0 and below 1"):
            kernels.dropout_threshold(p)


def test_auto_goes_by_the_device():
    assert not kernels.use_triton("auto", torch.ones(1)) and not kernels.use_triton("torch", torch.ones(1))
    assert kernels.use_triton("triton", torch.ones(1))
    assert BertConfig().kernels == "auto"


WHOLE = dict(attention="torch", dtype=torch.float32)


def test_whole_model_with_kernels_equals_the_one_without():
    """Loss and every gradient in training mode."""
    batch = {name: x.to(DEVICE) for name, x in batch_of().items()}
    results, counts = {}, {}
    for choice in ("torch", "triton"):
        model = model_of(kernels=choice, **WHOLE).to(DEVICE).train()
        kernels.launches.clear()
        loss = unpadded_on(model, batch)
        results[choice] = {"loss": loss.detach(), **gradients(model, loss)}
        counts[choice] = dict(kernels.launches)
    L = model.config.num_hidden_layers
    norms = 2 + 2 * L  # embeddings, head, two a layer
    assert counts["torch"] == {}
    assert counts["triton"] == {
        "layer_norm_forward": norms,
        "layer_norm_backward": norms,
        "geglu_forward": L,
        "geglu_backward": L,
    }
    for name, want in results["torch"].items():
        torch.testing.assert_close(
            results["triton"][name], want, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def unpadded_on(model, batch):
    return unpadded(model, batch) if DEVICE == "cpu" else model(**batch).loss


def test_checkpointing_draws_the_same_masks_again():
    batch, results = {name: x.to(DEVICE) for name, x in batch_of().items()}, []
    for checkpointing in (False, True):
        model = model_of(kernels="triton", hidden_dropout_prob=0.2, **WHOLE).to(DEVICE).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        results.append(gradients(model, unpadded_on(model, batch)))
    for name, want in results[0].items():
        assert torch.equal(results[1][name], want), name


def test_whole_model_under_autocast():
    """Stream in bf16, loss and gradients in fp32 and near those without kernels; the interpreter truncates bf16."""
    batch = {name: x.to(DEVICE) for name, x in batch_of().items()}
    losses = []
    for choice in ("torch", "triton"):
        model = model_of(kernels=choice, initializer_range=0.05, **WHOLE).to(DEVICE).train()
        seen = set()
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.register_forward_hook(lambda m, i, out, seen=seen: seen.add(out.dtype))
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = unpadded_on(model, batch)
        assert seen == {torch.bfloat16} and loss.dtype == torch.float32
        assert {g.dtype for g in gradients(model, loss).values()} == {torch.float32}
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0)


@pytest.mark.parametrize("choice", ["torch", "triton"])
def test_whole_model_compiles_without_a_break(choice):
    """LayerNorm, GEGLU, dropout and head; attention in plain torch reads its lengths, and is no part of it."""
    from src.bert_layers import BertGatedLinearUnitMLP
    from src.masked_lm_loss import masked_lm_head_loss

    torch.manual_seed(0)
    config = BertConfig(hidden_size=24, intermediate_size=40, hidden_dropout_prob=0.0, kernels=choice)
    mlp = BertGatedLinearUnitMLP(config).to(DEVICE)
    weight, bias = torch.randn(97, 24, device=DEVICE), torch.randn(97, device=DEVICE)

    def step(x, labels):
        return masked_lm_head_loss(mlp(x), weight, bias, labels)["loss"]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (5, 33, 64):
        x, labels = torch.randn(T, 24, device=DEVICE), torch.randint(-1, 97, (T,), device=DEVICE)
        want = gradients(mlp, step(x, labels))
        kernels.launches.clear()
        got = gradients(mlp, compiled(x, labels))
        assert bool(kernels.launches) == (choice == "triton")
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)


# Plain torch


def test_torch_dropout_keeps_its_share_and_scales_by_the_true_one():
    torch.manual_seed(0)
    n = 2**20
    for p in (0.1, 0.5, 0.9):
        x = torch.ones(n, requires_grad=True)
        out = fused_torch.dropout(x, p)
        kept = int(p * 2**16) / 2**16
        torch.testing.assert_close(out.max().item(), 1 / (1 - kept), rtol=1e-6, atol=0)
        assert set(out.unique().tolist()) == {0.0, out.max().item()}
        assert abs(out.mean() - 1) < 5 * (kept / (1 - kept) / n) ** 0.5  # five standard deviations
        (grad,) = torch.autograd.grad(out, x, torch.full_like(out, 3.0))
        torch.testing.assert_close(grad, 3 * out.detach())
    x = torch.randn(7, 3)
    assert fused_torch.dropout(x, 0.5, training=False) is x and fused_torch.dropout(x, 0.0) is x
    assert fused_torch.dropout(x, 1e-6) is x  # less than 2^-16


def test_torch_dropout_has_no_pattern():
    """Neighbours, and the four elements of one random word, are independent."""
    torch.manual_seed(1)
    keep = fused_torch.keep_mask(torch.empty(4 * 10**5), 2**15).float()
    for lag in (1, 2, 3, 4, 7):
        assert abs(torch.corrcoef(torch.stack([keep[lag:], keep[:-lag]]))[0, 1]) < 0.01
    assert all(abs(keep[i::4].mean() - 0.5) < 0.01 for i in range(4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_torch_geglu_equals_autograds(dtype):
    torch.manual_seed(0)
    x = torch.randn(33, 48, dtype=dtype)[:, :40].requires_grad_()
    out, kept = kept_bytes(fused_torch.geglu, x)
    gate, up = x.chunk(2, dim=-1)
    want = torch.nn.functional.gelu(gate) * up
    dout = torch.randn_like(out)
    tolerance = {} if dtype != torch.bfloat16 else dict(rtol=0.03, atol=0.03)
    torch.testing.assert_close(out, want, **tolerance)
    torch.testing.assert_close(torch.autograd.grad(out, x, dout)[0], torch.autograd.grad(want, x, dout)[0], **tolerance)
    assert kept == 0  # its argument alone


def test_torch_geglu_with_dropout(monkeypatch):
    """Same mask in forward and backward: equal to autograd's with the mask that was drawn."""
    x, recorded, keep_mask = torch.randn(33, 40, dtype=torch.float64, requires_grad=True), [], fused_torch.keep_mask
    monkeypatch.setattr(fused_torch, "keep_mask", lambda *args: recorded.append(keep_mask(*args)) or recorded[-1])
    out, kept = kept_bytes(fused_torch.geglu, x, 0.3)
    gate, up = x.chunk(2, dim=-1)
    want = torch.nn.functional.gelu(gate) * up * recorded[0] / (1 - int(0.3 * 2**16) / 2**16)
    dout = torch.randn_like(out)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(torch.autograd.grad(out, x, dout), torch.autograd.grad(want, x, dout))
    assert kept == 33 * 20  # the mask, a byte an element
    assert torch.autograd.gradcheck(lambda x: fused_torch.geglu(x), x)
