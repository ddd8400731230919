"""Benchmarks run, and compare the same with the same; what they print on a busy machine means nothing here."""

import json
import os
import re
import subprocess
import sys
from functools import partial

import pytest
import torch

from benchmarks import step
from benchmarks.ablations import ABLATIONS
from benchmarks.arms import ARMS, HFStrong, MosaicBert, Shape, check, make_batch, runnable, step_flops
from src.hf_bert import HFBert
from src.mosaic_bert import MosaicBert as ComposerMosaicBert

SHAPE = Shape(layers=2, hidden=48, heads=3, width=96, vocabulary=211, length=64)
NUMBER = r"-?\d+(\.\d+)?"


@pytest.fixture(scope="module")
def batch():
    return make_batch(torch.tensor([5, 64, 1, 33, 64, 17, 2]), SHAPE.vocabulary, 0.3)


EVERY = {name: ARMS[name] for name in runnable("cpu")} | {f"ablation {name}": arm for name, arm in ABLATIONS.items()}


def test_each_arm_computes_what_its_weights_mean(batch):
    wrong = {}
    for name, arm in EVERY.items():
        try:
            check(arm, SHAPE, "cpu", torch.float32, batch)
        except ValueError as error:
            wrong[name] = str(error)
    assert not wrong


def test_each_arm_keeps_to_the_budget_of_bf16(batch):
    for name in ("mosaic_bert", "mosaic_bert_padded", "hf_strong", "modernbert"):
        check(ARMS[name], SHAPE, "cpu", torch.bfloat16, batch)


def test_an_arm_that_computes_something_else_is_refused(batch, monkeypatch):
    """One token in the wrong sequence."""
    parts = MosaicBert.parts

    def moved(self, batch):
        (part,) = parts(self, batch)
        part["layout"].cu_seqlens[1] -= 1  # a token of the longest sequence goes to the next
        return [part]

    monkeypatch.setattr(MosaicBert, "parts", moved)
    with pytest.raises(ValueError, match="loss and gradients are off"):
        check(MosaicBert, SHAPE, "cpu", torch.float32, batch)


def test_work_is_counted_as_the_models_themselves_say(batch):
    for name, composer in (("mosaic_bert", ComposerMosaicBert), ("hf_bert", HFBert)):
        arm = ARMS[name](SHAPE)
        model = composer(arm.model.config)
        assert step_flops(arm, batch) == model.flops_per_batch(batch)


def test_groups_hold_each_sequence_once_with_less_padding(batch):
    parts = HFStrong(SHAPE).parts(batch)
    assert len(parts) == 4
    assert sum(len(part["input_ids"]) for part in parts) == len(batch["input_ids"])
    assert sum(int(part["attention_mask"].sum()) for part in parts) == int(batch["attention_mask"].sum())
    assert sum(len(part["masked_labels"]) for part in parts) == int((batch["labels"] >= 0).sum())
    assert sum(part["input_ids"].numel() for part in parts) < 0.6 * batch["input_ids"].numel()


def test_modernbert_has_the_parameters_of_ours():
    def parameters(name, shape):
        with torch.device("meta"):
            return sum(p.numel() for p in ARMS[name](shape, "meta").model.parameters())

    for shape in (Shape(), Shape(layers=6, hidden=256, heads=8, width=1024, vocabulary=4096)):
        ours = parameters("mosaic_bert", shape)
        for name in ("modernbert", "modernbert_same_shape"):
            assert parameters(name, shape) == pytest.approx(ours, rel=0.02)


def test_arms_of_a_family_train_the_same_weights(batch):
    names = ["mosaic_bert", "mosaic_bert_padded", "hf_bert", "hf_strong"]
    trained = step.build(names, SHAPE, "cpu", torch.float32)
    before = trained["mosaic_bert_padded"].arm.model.cls.predictions.decoder.weight.clone()
    trained["mosaic_bert"].step(batch)
    after = trained["mosaic_bert_padded"].arm.model.bert.embeddings.word_embeddings.weight
    assert not torch.equal(before, after)
    assert trained["hf_bert"].optimizer is trained["hf_strong"].optimizer
    assert {id(p) for p in trained["hf_strong"].arm.model.parameters()} == {
        id(p) for group in trained["hf_bert"].optimizer.param_groups for p in group["params"]
    }


def test_the_step_benchmark_ends_with_its_line_and_keeps_its_results(tmp_path, capsys):
    step.main(["--toy", "--arms", "hf_bert", "hf_strong", "modernbert", "--out", str(tmp_path)])
    assert re.fullmatch(
        f"step overhead_share={NUMBER} vs_hf_128={NUMBER} flop_ratio_128={NUMBER} vs_hf_128_full={NUMBER} "
        f"flop_ratio_128_full={NUMBER} vs_strong={NUMBER} vs_modernbert={NUMBER} device=cpu layers=2",
        capsys.readouterr().out.splitlines()[-1],
    )
    step.main(["--toy", "--arms", "hf_bert", "--fill", "c4", "--out", str(tmp_path)])
    cells = {cell["fill"]: cell for cell in json.loads((tmp_path / "step-cpu.json").read_text())}
    assert list(cells["c4"]["arms"]) == ["mosaic_bert", "hf_bert"]  # measured again
    assert list(cells["1.0"]["arms"]) == ["mosaic_bert", "hf_bert", "hf_strong", "modernbert"]
    assert cells["c4"]["real_share"] < 0.95 and cells["1.0"]["real_share"] == 1.0
    assert "| hf_strong |" in (tmp_path / "step-cpu.md").read_text()


def test_no_time_for_an_arm_that_is_wrong(batch, monkeypatch, capsys):
    monkeypatch.setitem(ARMS, "hf_strong", partial(HFStrong))
    monkeypatch.setattr(HFStrong, "loss_sum", lambda self, part: 1.01 * super(HFStrong, self).loss_sum(part))
    step.main(["--toy", "--arms", "hf_strong", "--fill", "c4"])
    printed = capsys.readouterr().out
    assert "hf_strong: no time is taken" in printed and "vs_strong" not in printed


def test_peak_memory_is_what_making_and_two_steps_took_at_most():
    class Allocates:
        def step(self, batch):
            self.kept = torch.ones(2**25)  # 128 MiB, the second time beside the first
            assert self.kept.sum() == 2**25

    assert step.peak_bytes_here(Allocates, {}) == pytest.approx(2 * 2**27, abs=2**24)  # the kernel counts in batches


@pytest.mark.slow
def test_memory_of_a_step_is_at_least_that_of_its_tensors():
    """In a process of its own, as the benchmark measures it: weights, gradients, two moments, logits."""
    command = [sys.executable, "-m", "benchmarks.step", "--peak_memory", "hf_bert", "--lengths", "512", "--fill", "1.0"]
    done = subprocess.run([*command, "--layers", "1", "--tokens", "512"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parameters = sum(p.numel() for p in ARMS["hf_bert"](Shape(layers=1)).model.parameters())
    least = 4 * (4 * parameters + 512 * Shape().vocabulary)
    assert least < int(done.stdout) < 2 * least


def test_the_benchmark_of_kernels_runs():
    """All cases and peers that a CPU has, at toy size, through the interpreter: each is checked before it is timed."""
    command = [sys.executable, "-m", "benchmarks.kernels", "--toy"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("kernels device=cpu checked=10 failed=0 ")
    for name in ("attention_S64_vs_flex", "layer_norm_T200_vs_torch", "geglu_T200_vs_torch", "head_M60_vs_torch"):
        assert f" {name}=" in last


@pytest.mark.slow  # half a minute: it converts, loads and starts in processes of their own, as users do
def test_the_data_benchmark_ends_with_its_line(tmp_path):
    out = tmp_path / "data.txt"
    command = [sys.executable, "-m", "benchmarks.data", "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    number = r"\d+(\.\d+)?"
    assert re.fullmatch(
        f"data loader_tokens_per_s={number} loader_vs_plain={number} text_loader_vs_plain={number} "
        f"convert_docs_per_s={number} bytes_per_token={number}",
        done.stdout.splitlines()[-1],
    )
    assert out.read_text() == done.stdout
    assert "start at 100,000 samples" in done.stdout
