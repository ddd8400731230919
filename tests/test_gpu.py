"""What only a GPU can show; skipped where there is none. The kernels' own tests run on a GPU as they are."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.dynamic_module_utils import get_relative_imports

from src import bert_layers
from src.attention import resolve
from src.bert_layers import BertForMaskedLM, Layout
from src.bert_padding import tile_tables
from src.configuration_bert import MosaicBertConfig
from src.flash_attn_triton import TILE_ROWS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def microbatch(lengths, vocab_size=1024):
    """Ids, layout, masked positions and labels on the GPU, as the training loop sends them."""
    T = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    tables = {rows: table.cuda() for rows, table in tile_tables(cu_seqlens, TILE_ROWS).items()}
    ids = torch.randint(vocab_size, (T,), generator=torch.Generator().manual_seed(0)).cuda()
    masked_index = torch.arange(0, T, 3).cuda()
    return ids, Layout(cu_seqlens.cuda(), max(lengths), tables), masked_index, ids[masked_index]


def model_of(**options):
    torch.manual_seed(0)
    return BertForMaskedLM(
        MosaicBertConfig(
            vocab_size=1024,
            hidden_size=128,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=256,
            **options,
        )
    ).cuda()


@pytest.mark.parametrize("attention", ["triton", "flash_attn"])
def test_a_step_waits_for_nothing(attention):
    """Forward, loss and backward start their kernels and wait for none of them."""
    try:
        resolve(attention, device_type="cuda")
    except ValueError as reason:
        pytest.skip(str(reason))
    model, batch = model_of(attention=attention).train(), microbatch([100, 7, 128, 33])
    for mode in ("default", "error"):  # the first compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", torch.bfloat16):
                output = model.forward_unpadded(*batch)
            output.loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert output.loss.isfinite()


def test_a_training_step_gives_the_same_bits():
    """Kernels, dropout and the head: from one seed, one loss and one gradient."""
    results = []
    for _ in range(2):
        model = model_of().train()
        torch.manual_seed(1)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model.forward_unpadded(*microbatch([100, 7, 128, 33])).loss
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    assert torch.equal(results[0][0], results[1][0])
    # The word embeddings' gradient is PyTorch's own, which adds by atomics unless deterministic algorithms are on.
    for (name, _), a, b in zip(model.named_parameters(), results[0][1], results[1][1], strict=False):
        if "word_embeddings" not in name:
            assert torch.equal(a, b), name


def test_kernels_and_reference_train_alike():
    """Twenty steps in bf16 on one batch: the losses go down together."""
    curves = {}
    for name, options in {"kernels": {}, "plain": {"attention": "reference", "kernels": "torch"}}.items():
        model = model_of(hidden_dropout_prob=0.0, **options).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        batch, curve = microbatch([100, 7, 128, 33]), []
        for _ in range(20):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model.forward_unpadded(*batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves[name] = torch.tensor(curve)
    assert curves["kernels"][-1] < curves["kernels"][0] - 1
    torch.testing.assert_close(curves["kernels"], curves["plain"], rtol=0.02, atol=0.02)


USER = """
import sys
import torch
from transformers import AutoModelForMaskedLM
folder, file = sys.argv[1:]
ids, mask, want = torch.load(file)
model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval().cuda()
with torch.no_grad():
    got = model(ids.cuda(), mask.cuda()).logits.cpu()
torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-3, atol=1e-3)
kernels = sys.modules[type(model).__module__.replace("bert_layers", "kernels")]
assert kernels.launches and "src" not in sys.modules, kernels.launches
print("the same")
"""


def test_a_folder_with_the_source_runs_its_kernels(tmp_path):
    """In a process without this repo; the logits are those of the CPU."""
    model = model_of().eval().cpu()
    model.config.auto_map = {
        "AutoConfig": "configuration_bert.MosaicBertConfig",
        "AutoModelForMaskedLM": "bert_layers.BertForMaskedLM",
    }
    source = Path(bert_layers.__file__)
    model.save_pretrained(tmp_path / "model")
    for name in (source.stem, *get_relative_imports(source)):
        shutil.copy(source.with_name(f"{name}.py"), tmp_path / "model")
    mask = (torch.arange(33) < torch.tensor([33, 1, 7])[:, None]).long()
    ids = torch.randint(1024, mask.shape) * mask
    torch.save((ids, mask, model(ids, mask).logits.detach()), tmp_path / "want.pt")
    command = [sys.executable, "-c", USER, tmp_path / "model", tmp_path / "want.pt"]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "the same" in done.stdout, done.stderr
