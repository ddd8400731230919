"""What the kernels share, whole models with them, and their counterparts in plain torch (torch_ops.py)."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.kernels.compare import kept_bytes, saved
from src import (
    attention,
    attention_tiles,
    cross_entropy_triton,
    flash_attn_triton,
    geglu_triton,
    layer_norm_triton,
    torch_ops,
    triton_common,
)
from src.bert_encoder import BertLayer
from src.bert_padding import Layout
from src.configuration_bert import MosaicBertConfig
from src.data.microbatches import split_unpadded
from tests.model.test_bert_layers import assert_same, batch_of, gradients, model_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            DEVICE == "cpu", reason="Triton's interpreter truncates where it should round to bf16"
        ),
    ),
]

P = 0.3
SCALE = 1 / (1 - int(P * 2**16) / 2**16)
"""Factor of the elements that dropout of P keeps."""


def key_of(seed=0):
    return torch.tensor([seed], dtype=torch.int64, device=DEVICE)


def run(function, tensors, dy):
    """Output, and the gradient of each tensor."""
    y = function(*tensors)
    return (y, *torch.autograd.grad(y, tensors, dy.to(y.dtype)))


def assert_within_budget(got, plain, exact, what):
    """The error against fp64 is at most twice that of plain torch in the same dtype, plus a rounding of the result."""
    error = (got.double() - exact).abs().max().item()
    budget = 2 * (plain.double() - exact).abs().max().item()
    rounding = torch.finfo(got.dtype).eps * exact.abs().max().item()
    assert error <= budget + rounding, f"{what}: error {error:.2e}, twice plain torch's {budget:.2e}"


def test_unknown_kernels_are_refused():
    with pytest.raises(ValueError, match="unknown kernels 'fast'; expected one of auto, triton, torch"):
        model_of(kernels="fast")


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(triton_common, "interpreted", lambda: False)
    with pytest.raises(ValueError, match="cannot run here: .* need a CUDA device, .*; set kernels to auto or torch"):
        model_of(kernels="triton")
    with pytest.raises(ValueError, match="need a CUDA device, and this is cpu; set kernels to auto or torch"):
        triton_common.rows_of(torch.ones(2, 3))
    with pytest.raises(ValueError, match="need a CUDA device, and this is cpu; set attention to auto"):
        attention.resolve("triton", device_type="cpu")
    monkeypatch.setattr(triton_common, "triton", None)
    for refused in (triton_common.resolve, lambda name: attention.resolve(name, device_type="cuda")):
        with pytest.raises(ValueError, match="triton is not installed"):
            refused("triton")
    assert triton_common.resolve("auto") == "auto" and not triton_common.use_triton("auto", torch.ones(1))


@pytest.mark.skipif(DEVICE == "cuda", reason="nothing is interpreted")
def test_numpy_too_new_for_the_interpreter_is_refused(monkeypatch):
    """With a message, not a traceback from a kernel. Fixed in Triton 3.7."""
    monkeypatch.setattr(triton_common.np, "__version__", "2.5.0")
    monkeypatch.setattr(triton_common.triton, "__version__", "3.6.0")
    message = "Triton 3.6.0 interprets no loop with numpy 2.5.0; it needs numpy < 2.5"
    with pytest.raises(ValueError, match=f"kernels 'triton' cannot run here: {message}; set kernels to auto or torch"):
        model_of(kernels="triton")
    with pytest.raises(ValueError, match=message):
        attention.resolve("triton", device_type="cpu")
    with pytest.raises(ValueError, match=f"{message}; set kernels to auto or torch"):
        triton_common.rows_of(torch.ones(2, 3))
    monkeypatch.setattr(triton_common.triton, "__version__", "3.7.0")
    assert triton_common.unavailable("cpu") is None
    monkeypatch.setattr(triton_common.triton, "__version__", "3.6.0")
    monkeypatch.setattr(triton_common.np, "__version__", "2.4.6")
    assert triton_common.unavailable("cpu") is None


def test_a_gpu_that_is_too_old_is_refused(monkeypatch):
    """By name; auto falls back to torch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_common, "_this_gpu", triton_common._this_gpu.__wrapped__)  # without its cache
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert triton_common.resolve("triton") == "triton" and attention.resolve("auto", device_type="cuda") == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ValueError, match=r"capability 8.0, and this GPU has 7.5; set kernels to auto or torch"):
        triton_common.resolve("triton")
    with pytest.raises(ValueError, match=r"need compute capability 8.0"):
        attention.resolve("triton", device_type="cuda")
    assert triton_common.resolve("auto") == "auto" and attention.resolve("auto", device_type="cuda") == "torch"


@pytest.mark.parametrize(
    ("architecture", "first", "last_without"),
    [
        (100, "3.3.0", "3.2.0"),
        (103, "3.6.0", "3.5.1"),
        (120, "3.3.1", "3.3.0"),
        (121, "3.6.0+git1234", "3.5.1.post1"),
        (130, "3.10.0", "3.9.0"),  # a card that no Triton was tried with
    ],
)
def test_a_gpu_newer_than_triton_is_refused(architecture, first, last_without, monkeypatch):
    """Until the first Triton that compiles for it. Ampere, Ada and Hopper run with every Triton."""
    monkeypatch.setattr(triton_common.triton, "__version__", last_without)
    name = f"{architecture // 10}.{architecture % 10}"
    verb = "may" if architecture == 130 else "does"
    reason = f"Triton {last_without} does not compile for compute capability {name}; {first.split('+')[0]} {verb}"
    assert triton_common.refused(architecture) == reason
    assert {triton_common.refused(older) for older in (80, 86, 89, 90)} == {None}
    monkeypatch.setattr(triton_common.triton, "__version__", first)
    assert triton_common.refused(architecture) is None


def test_fp64_and_impossible_dropout_are_refused():
    with pytest.raises(TypeError, match="expected fp16, bf16 or fp32, got torch.float64; set kernels to torch"):
        triton_common.rows_of(torch.ones(2, 3, dtype=torch.float64, device=DEVICE))
    for p in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="at least 0 and below 1"):
            triton_common.dropout_threshold(p)


def test_auto_depends_on_the_device():
    assert not triton_common.use_triton("auto", torch.ones(1)) and not triton_common.use_triton("torch", torch.ones(1))
    assert triton_common.use_triton("triton", torch.ones(1))
    assert MosaicBertConfig().kernels == "auto"


IN_TURN = {
    "reference": dict(attention="reference", kernels="torch"),
    "triton": dict(attention="triton", kernels="triton"),
}


def on_device(batch):
    return {name: x.to(DEVICE) for name, x in batch.items()}


def test_whole_model_with_kernels_equals_the_one_without():
    """Loss and every gradient in training mode."""
    results, counts = {}, {}
    for choice, options in IN_TURN.items():
        model = model_of(dtype=torch.float32, **options).to(DEVICE).train()
        triton_common.launches.clear()
        loss = model(**on_device(batch_of())).loss
        results[choice] = {"loss": loss.detach(), **gradients(model, loss)}
        counts[choice] = dict(triton_common.launches)
    L = model.config.num_hidden_layers
    norms = 2 + 2 * L  # embeddings, head, two per layer
    assert counts["reference"] == {}
    assert counts["triton"] == {
        **dict.fromkeys(("flash_attn_forward", "flash_attn_delta", "flash_attn_dkdv", "flash_attn_dq"), L),
        **dict.fromkeys(("layer_norm_forward", "layer_norm_backward"), norms),
        **dict.fromkeys(("geglu_forward", "geglu_backward"), L),
        **dict.fromkeys(("cross_entropy_forward", "cross_entropy_backward"), 1),
    }
    assert_same(results["triton"], results["reference"], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("part", ["attention.output.LayerNorm", "mlp"])
def test_a_layer_alone_draws_its_keys(part):
    """Such as for dropout at inference, where the encoder draws none."""
    model = model_of(dtype=torch.float32, hidden_dropout_prob=0.3, **IN_TURN["triton"]).to(DEVICE).eval()
    module = model.bert.encoder.layer[0].get_submodule(part)
    x = torch.randn(5, 24, device=DEVICE)
    args = (x, x, 0.3) if part != "mlp" else (x,)
    assert torch.equal(module(*args), module(*args))
    module.train()
    assert not torch.equal(module(*args), module(*args))


@pytest.mark.skipif(DEVICE == "cuda", reason="test_gpu.py asks the GPU itself")
def test_a_step_never_synchronizes(monkeypatch):
    """Forward, loss and backward read no tensor's value, and create no tensor whose size depends on one."""
    model = model_of(dtype=torch.float32, hidden_dropout_prob=0.1, **IN_TURN["triton"]).train()
    (micro,) = split_unpadded(batch_of(), 5, attention_tiles.tile_tables)
    layout = Layout.from_batch(micro)
    inputs = (micro["input_ids"], layout, micro["masked_index"], micro["labels"])
    model.forward_unpadded(*inputs)  # checks ALiBi's slopes, once
    syncs = Syncs(monkeypatch)
    with syncs:
        model.forward_unpadded(*inputs).loss.backward()
    assert syncs.seen == []
    with syncs:
        attention_tiles.tile_tables(layout)
        float(micro["input_ids"].sum())
        micro["input_ids"].tolist()
    assert {"repeat_interleave", "_local_scalar_dense", "tolist"} <= set(syncs.seen)


class Syncs(TorchDispatchMode):
    """Records by name what would synchronize a GPU, except within the interpreter."""

    OPS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "repeat_interleave", "unique")
    METHODS = ("tolist", "numpy", "cpu")  # no ops on a CPU

    def __init__(self, monkeypatch):
        super().__init__()
        self.seen, self.launching = [], False
        for name in self.METHODS:
            monkeypatch.setattr(torch.Tensor, name, self.recording(name, getattr(torch.Tensor, name)))
        for module in (flash_attn_triton, layer_norm_triton, geglu_triton, cross_entropy_triton):
            monkeypatch.setattr(module, "launch", self.interpreted)

    def record(self, name):
        if not self.launching:
            self.seen.append(name)

    def recording(self, name, method):
        return lambda *args, **kwargs: self.record(name) or method(*args, **kwargs)

    def interpreted(self, *args, **kwargs):
        self.launching = True
        triton_common.launch(*args, **kwargs)
        self.launching = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple))
        if name in self.OPS or (by_mask and any(x is not None and x.dtype == torch.bool for x in args[1])):
            self.record(name)
        return func(*args, **(kwargs or {}))


def test_memory_kept_for_the_backward_is_linear_in_tokens():
    """Attention, LayerNorm, gated unit and a whole layer, in bf16; plain torch also keeps the probabilities."""
    a, b = saved(8, DEVICE), saved(24, DEVICE)
    D, N, I = 768, 12, 3072  # noqa: E741
    per_token = {
        "attention": 2 * D + 4 * N,  # output and log-sum-exp; inputs (q, k, v) do not count
        "LayerNorm(residual + dropout(x))": 8,  # mean and 1/std
        "dropout(gelu(gate) * up)": 0,
        # qkv, attention, its projection, a norm, the packed product, the gated one, its projection; statistics
        "a whole layer": 2 * (3 * D + D + D + D + 2 * I + I + D) + 4 * N + 2 * 8,
    }
    for name, bytes_ in per_token.items():
        constant = a[name][0] - 8 * bytes_  # keys and the like
        assert 0 <= constant <= 64 and b[name][0] == 24 * bytes_ + constant, name
        assert b[name][1] > b[name][0], name  # plain torch's
    plain = [sizes["attention"][1] for sizes in (a, b)]
    assert plain[1] > 3.5 * plain[0]  # three times the tokens


@pytest.mark.parametrize("choice", IN_TURN)
def test_gradient_checkpointing_recomputes_layers_and_changes_nothing(choice, monkeypatch):
    """The recomputed layer draws the same dropout masks."""
    calls, results, forward = [], [], BertLayer.forward
    monkeypatch.setattr(BertLayer, "forward", lambda self, *args: calls.append(self) or forward(self, *args))
    for checkpointing in (False, True):
        model = model_of(hidden_dropout_prob=0.2, dtype=torch.float32, **IN_TURN[choice]).to(DEVICE).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        calls.clear()
        torch.manual_seed(5)
        results.append(gradients(model, model(**on_device(batch_of())).loss))
        assert len(calls) == (2 if checkpointing else 1) * model.config.num_hidden_layers
    assert_same(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("choice", IN_TURN)
def test_autocast_lowers_the_stream_but_not_loss_and_gradients(choice):
    """Norms' output, so the residual stream, in bf16; loss and gradients in fp32; the loss close to that in fp32."""
    model = model_of(initializer_range=0.05, dtype=torch.float32, **IN_TURN[choice]).to(DEVICE).train()
    batch, seen = on_device(batch_of()), set()
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(lambda m, i, out: seen.add(out.dtype))
    want = model(**batch).loss
    assert seen == {torch.float32}
    seen.clear()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = model(**batch).loss
    assert seen == {torch.bfloat16} and loss.dtype == torch.float32
    torch.testing.assert_close(loss, want, rtol=0.02, atol=0)
    assert {g.dtype for g in gradients(model, loss).values()} == {torch.float32}


@pytest.mark.filterwarnings("error::UserWarning")  # Dynamo's; not that of a file that an earlier test left open
def test_choice_of_kernels_is_a_constant_of_a_compiled_model(monkeypatch):
    """torch.compile neither guards on the caches of re and functools nor warns of them."""
    monkeypatch.setattr(triton_common, "_this_gpu", lambda: None if re.findall("[a-z]+", "gpu") else "")

    def f(x):
        chosen = attention.resolve("auto", 0.0, "cuda") == "triton" and triton_common.unavailable("cpu") is None
        return x + 1 if chosen else x - 1

    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for i in range(3):
        assert compiled(torch.zeros(2))[0] == (1 if triton_common.interpreted() else -1)
        re.compile(f"{i}[a-z]{{{i}}}")
    assert counter.frame_count == 1


def test_the_whole_model_is_one_graph_and_seldom_recompiled():
    """With all kernels and dynamic sizes; torch compiles apart 0 and 1 masked tokens, and a single tile.

    The first batch must not have 3 tiles: torch would take that size and the table's 3 columns for one variable.
    """
    model = model_of(dtype=torch.float32, **IN_TURN["triton"]).to(DEVICE).train()
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model.forward_unpadded, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for lengths, rate in (
        ([9, 3, 17, 5], 0.4),
        ([20, 8], 0.4),
        ([9, 1, 4], 0.0),
        ([9, 4], 0.05),
        ([30, 2], 0.3),
        ([7], 0.3),
    ):
        (micro,) = split_unpadded(batch_of(lengths, rate), len(lengths), attention_tiles.tile_tables)
        layout = Layout.from_batch(micro).to(DEVICE)
        inputs = (micro["input_ids"].to(DEVICE), layout, micro["masked_index"].to(DEVICE), micro["labels"].to(DEVICE))
        triton_common.launches.clear()
        loss = compiled(*inputs).loss
        assert len(triton_common.launches) == 3  # the forward kernels
        torch.testing.assert_close(loss, model.forward_unpadded(*inputs).loss)
        counts.append(micro["num_masked"])
    assert 1 in counts and counter.frame_count <= 4
    want = gradients(model, model.forward_unpadded(*inputs).loss)
    assert_same(gradients(model, compiled(*inputs).loss), want, rtol=1e-4, atol=1e-5)


def test_plain_torch_is_compiled_for_two_batches_and_never_again():
    """The first batch's sizes become constants, the second's variables. Attention is not compiled."""
    model = model_of(dtype=torch.float32, attention="torch", kernels="torch").train()
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model.forward_unpadded, backend=counter)
    counts = []
    for lengths in ([9, 3, 17, 5], [20, 8], [9, 4, 4], [30, 2], [7, 6, 5, 4, 3]):
        (micro,) = split_unpadded(batch_of(lengths, 0.4), len(lengths))
        inputs = (micro["input_ids"], Layout.from_batch(micro), micro["masked_index"], micro["labels"])
        want = gradients(model, model.forward_unpadded(*inputs).loss)
        assert_same(gradients(model, compiled(*inputs).loss), want, rtol=1e-4, atol=1e-5)
        counts.append(counter.frame_count)
    assert 0 < counts[0] < counts[1] == counts[-1]
    mlp, head = model.bert.encoder.layer[0].mlp, model.cls.predictions  # without attention: one graph
    step = torch.compile(lambda x: head(mlp(x)), fullgraph=True, backend="eager")
    x = torch.randn(5, 24)
    torch.testing.assert_close(step(x), head(mlp(x)))


@pytest.mark.parametrize("module", [flash_attn_triton, layer_norm_triton, geglu_triton], ids=lambda m: m.__name__)
def test_a_copy_of_the_source_has_its_own_ops(module, monkeypatch):
    """As an exported folder's, in one process with src. Of two ops with one name, the later would replace the other."""
    spec = importlib.util.spec_from_file_location(module.__name__.replace("src.", "src.exported_"), module.__file__)
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, copy)
    spec.loader.exec_module(copy)
    ours, theirs = (
        {repr(x) for x in vars(m).values() if isinstance(x, torch.library.CustomOpDef)} for m in (module, copy)
    )
    assert len(ours) == len(theirs) == 2 and not ours & theirs


def test_only_the_kernels_files_register_ops():
    kernels = {flash_attn_triton.__file__, layer_norm_triton.__file__, geglu_triton.__file__}
    found = {str(path) for path in Path(triton_common.__file__).parent.glob("*.py") if "custom_op(" in path.read_text()}
    assert found == kernels


# Plain torch


def test_torch_dropout_keeps_its_share_and_scales_by_it():
    torch.manual_seed(0)
    n = 2**20
    for p in (0.1, 0.5, 0.9):
        x = torch.ones(n, requires_grad=True)
        out = torch_ops.dropout(x, p)
        kept = int(p * 2**16) / 2**16
        torch.testing.assert_close(out.max().item(), 1 / (1 - kept), rtol=1e-6, atol=0)
        assert set(out.unique().tolist()) == {0.0, out.max().item()}
        assert abs(out.mean() - 1) < 5 * (kept / (1 - kept) / n) ** 0.5  # five standard deviations
        (grad,) = torch.autograd.grad(out, x, torch.full_like(out, 3.0))
        torch.testing.assert_close(grad, 3 * out.detach())
    x = torch.randn(7, 3)
    assert torch_ops.dropout(x, 0.5, training=False) is x and torch_ops.dropout(x, 0.0) is x
    assert torch_ops.dropout(x, 1e-6) is x  # less than 2^-16


def test_torch_dropout_has_no_pattern():
    """Adjacent elements, and the four of one random word, are independent."""
    torch.manual_seed(1)
    keep = torch_ops.keep_mask(torch.empty(4 * 10**5), 2**15).float()
    for lag in (1, 2, 3, 4, 7):
        assert abs(torch.corrcoef(torch.stack([keep[lag:], keep[:-lag]]))[0, 1]) < 0.01
    assert all(abs(keep[i::4].mean() - 0.5) < 0.01 for i in range(4))


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_torch_geglu_equals_autograds(dtype, p, monkeypatch):
    """Forward and backward use the mask that was drawn, and keep only that: one byte per element."""
    recorded, keep_mask = [], torch_ops.keep_mask
    monkeypatch.setattr(torch_ops, "keep_mask", lambda *args: recorded.append(keep_mask(*args)) or recorded[-1])
    torch.manual_seed(0)
    x = torch.randn(33, 48, dtype=dtype)[:, :40].requires_grad_()
    out, kept = kept_bytes(torch_ops.geglu, x, p)
    gate, up = x.chunk(2, dim=-1)
    want = torch.nn.functional.gelu(gate) * up * (recorded[0].to(dtype) * SCALE if p else 1)
    dout = torch.randn_like(out)
    tolerance = {} if dtype != torch.bfloat16 else dict(rtol=0.03, atol=0.03)
    torch.testing.assert_close(out, want, **tolerance)
    torch.testing.assert_close(torch.autograd.grad(out, x, dout)[0], torch.autograd.grad(want, x, dout)[0], **tolerance)
    assert kept == (33 * 20 if p else 0)
