"""What only a GPU can show; skipped elsewhere. The kernels' own tests run on a GPU as they are.

Batches reach the device as in training: split on the CPU, tile tables included, pinned by the loader, then each
microbatch copied as one buffer without synchronizing. One microbatch has more than 3,072 tokens: from there on
PyTorch's embedding computes its gradient in another way.
"""

import os
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from src.attention import alibi_slopes, attention, resolve
from src.attention_tiles import tile_tables
from src.bert_layers import BertForMaskedLM
from src.bert_padding import Layout, unpad_layout
from src.configuration_bert import MosaicBertConfig
from src.data.microbatches import SplittingCollator, split_unpadded
from tests.model.test_bert_layers import batch_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = "cuda"
V = 1024
LENGTHS = [512, 65, 511, 257, 500, 1, 512, 129, 512, 512, 100, 7, 128, 33]
"""Of a batch; the first ten sequences are a microbatch of 3,511 tokens, the rest one of 268."""


def microbatches(size=10):
    """On the CPU, as training splits them."""
    return split_unpadded(batch_of(LENGTHS, 0.3, V), size, tile_tables)


def padded(samples):
    (batch,) = samples
    return batch


def model_of(attention="triton", kernels="triton", **options):
    torch.manual_seed(0)
    shape = dict(hidden_size=128, num_hidden_layers=3, num_attention_heads=2, intermediate_size=256)
    config = MosaicBertConfig(vocab_size=V, attention=attention, kernels=kernels, **shape, **options)
    return BertForMaskedLM(config).to(DEVICE).train()


def loss_of(model, part, dtype=torch.bfloat16):
    """() mean over a microbatch on the device, under autocast; without autocast for fp32."""
    layout = Layout.from_batch(part)
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        return model(part["input_ids"], labels=part["labels"], layout=layout, masked_index=part["masked_index"]).loss


def step(model, optimizer, parts, dtype=torch.bfloat16):
    """A training step on microbatches on the host; returns the loss of the batch, ()."""
    masked, losses = sum(part["num_masked"] for part in parts), []
    for part in parts:
        loss = loss_of(model, part.to(DEVICE), dtype) * (part["num_masked"] / masked)
        loss.backward()
        losses.append(loss.detach())
    optimizer.step()
    optimizer.zero_grad()
    return torch.stack(losses).sum()


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


@pytest.fixture
def deterministic():
    """PyTorch's deterministic algorithms, above all for the embedding's gradient."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("pinned", "num_workers"), [(False, 0), (True, 0), (True, 1)])
@pytest.mark.parametrize("attention", ["triton", "flash_attn", "flash_attn_4"])
def test_a_step_never_synchronizes(attention, pinned, num_workers):
    """Copies, forward, loss, backward and optimizer are all asynchronous."""
    try:
        resolve(attention, device_type=DEVICE)
    except ValueError as reason:
        pytest.skip(str(reason))
    model, collate = model_of(attention), SplittingCollator(padded, partial(split_unpadded, tables_of=tile_tables), 10)
    samples: Any = [batch_of(LENGTHS, 0.3, V)]
    loader = DataLoader(samples, collate_fn=collate, num_workers=num_workers, pin_memory=pinned)
    (parts,) = loader
    assert [part["num_tokens"] for part in parts] == [3511, 268]
    assert parts.packed.is_pinned() == pinned and all(part.packed.is_pinned() == pinned for part in parts)
    optimizer = adamw(model)
    for mode in ("default", "error"):  # the first step compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            loss = step(model, optimizer, parts)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_errors_are_at_most_twice_those_of_plain_torch(dtype):
    """Of each parameter's gradient, in a whole model; against fp64 for fp32, against fp32 for the others."""
    sharp = dict(hidden_dropout_prob=0.0, initializer_range=0.13)  # with 0.02, attention is nearly uniform
    plain = dict(attention="reference", kernels="torch", **sharp)
    (part,) = microbatches(len(LENGTHS))
    assert part["num_tokens"] > 3072
    part, scale = part.to(DEVICE), 2.0**10  # as a gradient scaler: small gradients underflow in fp16

    def results(model, dtype):
        (scale * loss_of(model, part, dtype)).backward()
        return {name: p.grad.double() / scale for name, p in model.named_parameters()}

    exact = model_of(**plain).double() if dtype == torch.float32 else model_of(**plain)
    want = results(exact, torch.float32)
    ours, theirs = (results(model, dtype) for model in (model_of(**sharp), model_of(**plain)))
    for name, x in want.items():
        error, budget = (((got[name] - x).norm() / x.norm()).item() for got in (ours, theirs))
        assert error <= 2 * budget + torch.finfo(dtype).eps, f"{name}: {error:.2e}, plain torch {budget:.2e}"


def test_a_training_step_gives_the_same_bits():
    """Kernels, dropout and head: one seed gives one loss and one gradient."""
    results = []
    for _ in range(2):
        model = model_of()
        torch.manual_seed(1)
        loss = loss_of(model, microbatches()[1].to(DEVICE))
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        # PyTorch adds up the word embeddings' gradient by atomics unless deterministic algorithms are on.
        assert "word_embeddings" in name or torch.equal(grad, results[1][1][name]), name


def test_a_resumed_run_has_the_same_bits(deterministic, tmp_path):
    """Two steps, a checkpoint and two more equal four: losses, weights and moments, with dropout."""
    parts, file = microbatches(), tmp_path / "checkpoint.pt"
    model = model_of()
    optimizer = adamw(model)
    losses = []
    for i in range(4):
        if i == 2:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**saved, "random": (torch.get_rng_state(), torch.cuda.get_rng_state())}, file)
        losses.append(step(model, optimizer, parts))

    again = model_of()
    torch.manual_seed(12345)
    fresh = adamw(again)
    saved = torch.load(file, map_location="cpu", weights_only=True)
    again.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["random"][0])
    torch.cuda.set_rng_state(saved["random"][1])
    resumed = [step(again, fresh, parts) for _ in range(2)]
    assert torch.equal(torch.stack(resumed), torch.stack(losses[2:])) and not torch.equal(losses[2], losses[3])
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[p][moment], fresh.state[q][moment]), (name, moment)


def test_kernels_and_reference_train_alike():
    """Twenty steps in bf16 on one batch give close losses, which fall."""
    curves = {}
    for name, options in {"kernels": {}, "plain": {"attention": "reference", "kernels": "torch"}}.items():
        model = model_of(hidden_dropout_prob=0.0, **options)
        optimizer, parts = adamw(model), [microbatches()[1]]
        curves[name] = torch.stack([step(model, optimizer, parts) for _ in range(20)])
    assert curves["kernels"][-1] < curves["kernels"][0] - 1
    torch.testing.assert_close(curves["kernels"], curves["plain"], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_attention_torch_runs_sequences_of_many_tiles(dropout_p):
    """Tiles of 170 rows start unaligned to the 16 bytes that torch's memory-efficient kernel loads at once."""
    L, N, H = 2048, 12, 16
    layout = unpad_layout(torch.tensor([L], device=DEVICE))
    qkv, grad = (torch.randn(L, *shape, device=DEVICE) for shape in ((3, N, H), (N, H)))
    results = []
    for impl in ("torch", "reference"):
        x = qkv.detach().requires_grad_()
        out = attention(*x.unbind(1), layout, alibi_slopes(N, DEVICE), dropout_p, impl)
        results.append((out, *torch.autograd.grad(out, x, grad)))
    if dropout_p == 0:
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    else:
        assert all(x.isfinite().all() for x in results[0])


USER = """
import sys
import torch
from transformers import AutoModelForMaskedLM
folder, file, device = sys.argv[1:]
ids, mask, want = torch.load(file)
model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval().to(device)
with torch.no_grad():
    got = model(ids.to(device), mask.to(device)).logits.cpu()
torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-3, atol=1e-3)
kernels = sys.modules[type(model).__module__.replace("bert_layers", "triton_common")]
assert kernels.launches and "src" not in sys.modules, kernels.launches
print("the same")
"""


def test_an_exported_folder_runs_its_kernels(tmp_path):
    """In a process without this repo, and gives the CPU's logits."""
    model = model_of("auto", "auto").eval().cpu()
    model.save_pretrained(tmp_path / "model")
    mask = (torch.arange(33) < torch.tensor([33, 1, 7])[:, None]).long()
    ids = torch.randint(V, mask.shape) * mask
    torch.save((ids, mask, model(ids, mask).logits.detach()), tmp_path / "want.pt")
    command = [sys.executable, "-c", USER, tmp_path / "model", tmp_path / "want.pt", DEVICE]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "the same" in done.stdout, done.stderr


def test_a_pinned_microbatch_is_copied_while_the_cpu_goes_on():
    """Behind a busy GPU: the copy is queued, not done, when ``to`` returns, and then gives the bytes."""
    (part,) = microbatches(len(LENGTHS)).pin_memory()
    stream = torch.cuda.current_stream()
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)  # cycles: about half a second
    moved = part.to(DEVICE)
    assert not stream.query()
    assert torch.equal(moved.packed.cpu(), part.packed)
