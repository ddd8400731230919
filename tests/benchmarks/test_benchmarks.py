"""Variants compute what their weights mean; benchmarks run and end with their lines, at toy sizes."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks import publish
from benchmarks.gpu import parts as gpu_parts
from benchmarks.kernels import compare, tune
from benchmarks.learning.ablations import ABLATIONS
from benchmarks.report import in_new_process
from benchmarks.speed import forms, roofline, scaling, step
from benchmarks.variants import VARIANTS, HFStrong, MosaicBert, Shape, check, make_batch, step_flops
from src import attention_tiles, flash_attn_triton
from src.hf_bert import HFBert
from src.mosaic_bert import MosaicBert as ComposerMosaicBert
from src.triton_common import launches

SHAPE = Shape(layers=2, hidden=48, heads=3, width=96, vocabulary=211, length=64)
NUMBER = r"-?\d+(\.\d+)?"


@pytest.fixture(scope="module")
def batch():
    return make_batch(torch.tensor([64, 33, 1, 64, 17, 5, 2]), SHAPE.vocabulary, 0.3)


EVERY = {name: variant for name, variant in (VARIANTS | ABLATIONS).items() if name != "mosaic_bert_compiled"}
CASES = [(name, torch.float32) for name in EVERY]
CASES += [(name, torch.bfloat16) for name in ("mosaic_bert", "mosaic_bert_padded", "hf_strong", "modernbert")]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_variant_computes_what_its_weights_mean(name, dtype, batch):
    check(EVERY[name], SHAPE, "cpu", dtype, batch)


def test_kernels_compute_what_the_weights_mean(batch):
    few = {name: x[-3:, :17] for name, x in batch.items()}  # for Triton's interpreter
    check(partial(MosaicBert, attention="triton", kernels="triton"), SHAPE, "cpu", torch.float32, few)


@pytest.mark.parametrize("lengths", [[5, 0, 1, 16, 3], [16, 16], [40, 1, 7], [33]], ids=str)
def test_the_block_mask_of_documents_is_that_of_the_dense_mask(lengths):
    """Partial blocks, full ones, and their order."""
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    T = len(document)
    mask = create_block_mask(lambda b, h, i, j: document[i] == document[j], None, None, T, T, "cpu", BLOCK_SIZE=8)
    got = compare.document_mask(torch.tensor(lengths), size=8)
    assert got.seq_lengths == mask.seq_lengths
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(got, name), getattr(mask, name)), name
    for name in ("kv", "full_kv"):
        counts = getattr(mask, f"{name}_num_blocks")[0, 0]
        for row, count in enumerate(counts):
            one, other = (getattr(each, f"{name}_indices")[0, 0, row, :count] for each in (got, mask))
            assert torch.equal(one, other), (name, row)


def test_the_flops_of_a_microbatch_are_those_that_torch_counts(batch):
    lengths, masked = batch["attention_mask"].sum(1), int((batch["labels"] >= 0).sum())
    assert gpu_parts.flops(SHAPE, lengths, masked) == step_flops(MosaicBert(SHAPE, "cpu", torch.float32), batch)


@pytest.mark.slow  # it compiles
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler on a CPU")
def test_compiled_variant_computes_what_its_weights_mean(batch):
    check(VARIANTS["mosaic_bert_compiled"], SHAPE, "cpu", torch.float32, batch)


def test_check_refuses_a_token_in_the_wrong_sequence(batch, monkeypatch):
    parts = MosaicBert.parts

    def moved(self, batch):
        (part,) = parts(self, batch)
        part["layout"].cu_seqlens[1] -= 1  # a token of the longest sequence goes to the next
        return [part]

    monkeypatch.setattr(MosaicBert, "parts", moved)
    with pytest.raises(ValueError, match="loss and gradients are off"):
        check(MosaicBert, SHAPE, "cpu", torch.float32, batch)


def test_flops_are_those_of_the_models(batch):
    for name, composer in (("mosaic_bert", ComposerMosaicBert), ("hf_bert", HFBert)):
        variant = VARIANTS[name](SHAPE)
        assert step_flops(variant, batch) == composer(variant.model.config).flops_per_batch(batch)


def test_roofline_counts_the_products_of_the_model(batch):
    """Attention recomputes the scores, once in one program, and the gradient of the probabilities too in two."""
    variant, lengths = VARIANTS["mosaic_bert"](SHAPE), batch["attention_mask"].sum(1)
    assert roofline.parameters(SHAPE)[1] == parameters("mosaic_bert", SHAPE)
    M, score = int((batch["labels"] >= 0).sum()), SHAPE.layers * 2 * SHAPE.hidden * int(lengths.square().sum())
    for one_tile, again in ((64, 1), (63, 3)):
        found = roofline.parts(SHAPE, lengths, M, roofline.Kernels(one_tile=one_tile))
        assert sum(part.flops for part in found) == step_flops(variant, batch) + again * score


def test_roofline_counts_bytes():
    """One layer of width 2, gated unit of 3, 5 words; sequences of 2 and 1, 1 token masked; 2 microbatches."""
    shape = Shape(layers=1, hidden=2, heads=1, width=3, vocabulary=5)
    kernels = roofline.Kernels(logit_bytes=8, one_tile=1)
    found = roofline.parts(shape, torch.tensor([2, 1]), 1, kernels, microbatches=2)
    weights = (2 * 6, 2 * 2, 2 * 6, 3 * 2, 2 * 2, 2 * 5)
    values = (3 * (2 + 6), 2 + 2, 2 + 6, 3 + 2, 2 + 2, 2 + 5)  # in and out; all but the first of the masked token only
    assert {part.name: part.bytes for part in found if part.group not in ("LayerNorm", "GeGLU", "other")} == {
        **dict(zip(("Wqkv", "out", "GLU", "wo", "transform", "decoder"), map(sized, weights, values), strict=True)),
        **{name: tensors * 3 * 2 * 2 for name, tensors in (("forward", 4), ("dk/dv", 6), ("dq", 5), ("delta", 2))},
        "AdamW": 28 * parameters("mosaic_bert", shape),
    }
    others = {(part.group, part.name): part.bytes for part in found if part.group in ("LayerNorm", "GeGLU", "other")}
    assert others == {
        ("LayerNorm", "forward"): 2 * 3 * 2 * 2 + 3 * 2 * (4 + 2) + 2 * (2 + 2),
        ("LayerNorm", "backward"): (5 + 4) * 2 * 2 + 3 * 2 * (2 + 4 + 4) + 2 * (2 + 2 + 2),
        ("GeGLU", "forward"): 2 * (6 + 3),
        ("GeGLU", "backward"): 2 * (3 + 6 + 6),
        ("other", "loss"): 8 * 5,
        ("other", "embeddings"): 3 * 2 * (16 + 8 + 10) + 2 * 5 * 2 * (4 + 12),
        ("other", "bias gradients"): 2 * (3 * 6 + 2 + 2 + 2),
        ("other", "sums"): 2 * 6 * 2 + 3 * 2 * 4 + 2 * 2 * (2 + 2 + 2 + 2),
        ("other", "weights"): 48 * (6 + 2 * 6 + 12),  # cast once
    }


def sized(weights, values):
    """Bytes of three products in bf16; the weights once per microbatch."""
    return 3 * 2 * (values + 2 * weights)


def test_hf_strong_computes_each_sequence_once_with_less_padding(batch):
    parts = HFStrong(SHAPE).parts(batch)
    assert len(parts) == 4
    assert sum(len(part["input_ids"]) for part in parts) == len(batch["input_ids"])
    assert sum(int(part["attention_mask"].sum()) for part in parts) == int(batch["attention_mask"].sum())
    assert sum(len(part["masked_labels"]) for part in parts) == int((batch["labels"] >= 0).sum())
    assert sum(part["input_ids"].numel() for part in parts) < 0.6 * batch["input_ids"].numel()


def parameters(name, shape):
    with torch.device("meta"):
        return sum(p.numel() for p in VARIANTS[name](shape, "meta").model.parameters())


def test_modernbert_has_the_parameters_of_ours():
    for shape in (Shape(), Shape(layers=6, hidden=256, heads=8, width=1024, vocabulary=4096)):
        ours = parameters("mosaic_bert", shape)
        for name in ("modernbert", "modernbert_same_shape"):
            assert parameters(name, shape) == pytest.approx(ours, rel=0.02)


def test_variants_of_a_family_share_weights_and_optimizer(batch):
    names = ["mosaic_bert", "mosaic_bert_padded", "hf_bert", "hf_strong"]
    trained = step.build(names, SHAPE, "cpu", torch.float32)
    before = trained["mosaic_bert_padded"].variant.model.cls.predictions.decoder.weight.clone()
    trained["mosaic_bert"].step(batch)
    after = trained["mosaic_bert_padded"].variant.model.bert.embeddings.word_embeddings.weight
    assert not torch.equal(before, after)
    assert trained["hf_bert"].optimizer is trained["hf_strong"].optimizer
    assert {id(p) for p in trained["hf_strong"].variant.model.parameters()} == {
        id(p) for group in trained["hf_bert"].optimizer.param_groups for p in group["params"]
    }


def test_step_ends_with_its_line_and_keeps_results(tmp_path, capsys):
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


def test_step_does_not_time_a_wrong_variant(batch, monkeypatch, capsys):
    monkeypatch.setitem(VARIANTS, "hf_strong", partial(HFStrong))
    monkeypatch.setattr(HFStrong, "loss_sum", lambda self, part: 1.01 * super(HFStrong, self).loss_sum(part))
    step.main(["--toy", "--arms", "hf_strong", "--fill", "c4"])
    printed = capsys.readouterr().out
    assert "hf_strong: not timed" in printed and "vs_strong" not in printed


def test_peak_memory_of_making_and_two_steps():
    class Allocates:
        def step(self, batch):
            self.kept = torch.ones(2**25)  # 128 MiB; the second comes while the first is held
            assert self.kept.sum() == 2**25

    assert step.peak_bytes_here(Allocates, {}) == pytest.approx(2 * 2**27, abs=2**24)  # the kernel counts in batches


@pytest.mark.slow
def test_memory_of_a_step_is_at_least_that_of_its_tensors():
    """In a process of its own, as the benchmark measures it: weights, gradients, two moments, logits."""
    shape = Shape(layers=1)
    peak = in_new_process(step.peak_bytes_cpu, "hf_bert", shape, 512, "1.0", 512, 0.3)
    least = 4 * (4 * parameters("hf_bert", shape) + 512 * shape.vocabulary)
    assert least < peak < 2 * least


def test_scaling_ends_with_its_line(tmp_path, capsys):
    scaling.main(["--toy", "--parts", "length", "sizes", "--out", str(tmp_path)])
    line = f"scaling time_per_token={NUMBER} hf_time_per_token={NUMBER} parameters_large={NUMBER}"
    assert re.fullmatch(line, capsys.readouterr().out.splitlines()[-1])
    scaling.main(["--toy", "--parts", "gpus", "--out", str(tmp_path)])
    assert set(json.loads((tmp_path / "scaling-cpu.json").read_text())) == {"length", "gpus", "sizes"}


def test_all_reduce_overlaps_with_long_backward_passes():
    rows = {(row["link"], row["gpus"]): row for row in scaling.gpus(137_000_000, 400_000)}
    fast, slow = scaling.LINKS
    assert rows[fast, 8]["bytes_per_gpu"] == 2 * 7 / 8 * 4 * 137_000_000
    assert rows[fast, 8]["reduce_ms"] == pytest.approx(2.131, rel=1e-3)
    assert rows[fast, 8]["efficiency"] > 0.99 > rows[fast, 512]["efficiency"] > rows[slow, 512]["efficiency"]


def test_large_has_its_published_size():
    shape = scaling.shape_of("mosaic_bert_large")
    assert (shape.layers, shape.hidden, shape.heads, shape.width) == (24, 1024, 16, 4096)
    with torch.device("meta"):
        model = VARIANTS["mosaic_bert"](shape, "meta").model
    assert sum(p.numel() for p in model.bert.parameters()) == pytest.approx(434e6, rel=1e-3)


@pytest.mark.slow  # half a minute: it converts, loads and starts in processes of their own, as users do
def test_loader_ends_with_its_line(tmp_path):
    out = tmp_path / "data.txt"
    command = [sys.executable, "-m", "benchmarks.speed.loader", "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = "loader_tokens_per_s", "loader_vs_plain", "text_loader_vs_plain", "convert_docs_per_s", "bytes_per_token"
    assert re.fullmatch(f"data {' '.join(f'{name}={NUMBER}' for name in names)}", done.stdout.splitlines()[-1])
    assert out.read_text() == done.stdout
    assert "start at 100,000 samples" in done.stdout


@pytest.mark.slow  # it converts each of 14 forms
def test_forms_end_with_their_line(tmp_path, capsys):
    forms.main(["--quick", "--out", str(tmp_path / "forms.txt")])
    printed = (tmp_path / "forms.txt").read_text()
    assert capsys.readouterr().out == printed
    *lines, last = printed.splitlines()[1:]
    assert [re.match("form name=(.*) read_docs_per_s=[1-9]", line)[1] for line in lines] == list(publish.FORMS)
    assert re.fullmatch(r"forms memory_mb=\d+ imports_mb=\d+ text_mb=1", last)


SMALL = attention_tiles.Tile(32, 16, 4, 3)


@pytest.mark.parametrize("rows", [16, 32], ids=["too short", "long enough"])
def test_tune_of_a_whole_sequence(rows, monkeypatch, capsys):
    """Tuned where it holds the longest sequence, here 32; otherwise kept, as the line replaces the whole entry."""
    present = attention_tiles.Tiles(SMALL, SMALL, SMALL, attention_tiles.Tile(rows, 16, 4, 3))
    monkeypatch.setattr(tune.attention_tiles, "tiles_for", lambda *_: present)
    monkeypatch.setattr(tune, "times", lambda inputs, kernel, tiles, rounds: {tile: tile.stages for tile in tiles})
    assert tune.main(["--toy"]) == 0
    printed, best = capsys.readouterr().out, "Tile(16, 16, 4, 1)"
    whole = "Tile(16, 16, 4, 3)" if rows == 16 else "Tile(32, 16, 4, 1)"
    assert f"Tiles({best}, {best}, {best}, {whole})," in printed
    assert ("whole Tile(rows=16, cols=16, warps=4, stages=1): WRONG" in printed) == (rows == 32)


def test_the_split_backward_is_compared_where_one_tile_holds_a_sequence(monkeypatch):
    tiles = attention_tiles.Tiles(SMALL, SMALL, SMALL, attention_tiles.Tile(64, 16, 4, 1))
    for module in (compare, flash_attn_triton):
        monkeypatch.setattr(module, "tiles_for", lambda *_: tiles)
    case = compare.attention_case(64, 64, 2, 16, torch.float32, "cpu")
    results, ran = [], []
    for run in (case.ours, case.baselines["split backward"]):
        before = launches.copy()
        results.append(compare.results_of(run, case.inputs))
        ran.append({name.removeprefix("flash_attn_") for name in launches - before})
    assert ran == [{"forward", "whole"}, {"forward", "delta", "dkdv", "dq"}]
    assert max(compare.errors(*results)) < 1e-5
    assert "split backward" not in compare.attention_case(128, 128, 2, 16, torch.float32, "cpu").baselines
