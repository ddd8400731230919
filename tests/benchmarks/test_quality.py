"""quality.py: no text is both trained on and evaluated; the pages match the results."""

import json
import re

import numpy as np
import pytest
import torch

from benchmarks import publish, texts
from benchmarks.learning import pretraining, quality
from src.data.tokenizer import load_tokenizer
from src.masked_lm_loss import IGNORED

NUMBER = r"-?\d+\.\d+"


@pytest.fixture(scope="module")
def rows():
    return {task: quality.labelled(task) for task in quality.TASKS}


def test_no_evaluated_row_is_trained_on(rows):
    parts = {part: {*quality.unlabelled(part)} for part in ("train", "validation", "test")}
    assert not parts["train"] & (parts["validation"] | parts["test"]) and not parts["validation"] & parts["test"]
    topics = {row.text for row in rows["topics"]}
    assert topics <= set.union(*parts.values())
    assert not {row.text for row in rows["sentences"]} & set.union(*parts.values())
    shares = [sum(texts.part_of(text) == part for text in topics) / len(topics) for part in parts]
    assert shares == pytest.approx([0.75, 0.10, 0.15], abs=0.02)


def test_tasks_have_their_rows_and_labels(rows, tmp_path):
    assert len({row.label for row in rows["topics"]}) == 11 and len(rows["topics"]) > 9000
    assert {row.label for row in rows["sentences"]} == {"0", "1"} and len(rows["sentences"]) == 8530
    quality.write_tasks(tmp_path, quality.TOY)
    lines = {path.stem: path.read_text().splitlines() for path in tmp_path.iterdir()}
    assert set(lines) == {f"{task}-{part}" for task in quality.TASKS for part in ("train", "validation", "test")}
    assert all(line[0] == "text,label" for line in lines.values())


def test_interval_draws_rows_and_seeds():
    """Of a model that is right wherever the other one is, and in a tenth of the rest."""
    rng = np.random.default_rng(1)
    b = rng.random((3, 5, 1000)) < 0.5
    a = b | (rng.random(b.shape) < 0.1)
    low, high = quality.interval(a, b).values()
    assert 0 < low < (a.mean() - b.mean()) < high < 0.1
    assert quality.interval(b, b) == {"low": 0.0, "high": 0.0}
    by_seed = np.zeros((3, 5, 1000), bool)
    by_seed[0] = True  # all of the difference comes from one pretraining seed
    low, high = quality.interval(by_seed, np.zeros_like(by_seed)).values()
    assert (low, high) == pytest.approx((0.0, 1.0))


@pytest.fixture(scope="module")
def text(tokenizer_folder):
    return pretraining.Text(load_tokenizer(str(tokenizer_folder)), ["a text"], ["another one"], quality.TOY)


def test_same_tokens_are_masked_at_every_length(text):
    ids = np.random.default_rng(0).integers(5, 200, 240).tolist()
    whole = quality.masked_review(text, 0, ids)
    assert 10 < int((whole["labels"] >= 0).sum()) < 60
    for room in (30, 60, 120, 240):
        batch = quality.cut(whole, text, room)
        assert batch["input_ids"].shape == (240 // room, room + 2)
        for name, x in batch.items():
            torch.testing.assert_close(x[:, 1:-1].reshape(1, -1), whole[name], rtol=0, atol=0)
        assert (batch["input_ids"][:, 0] == text.tokenizer.cls_token_id).all()
        assert (batch["input_ids"][:, -1] == text.tokenizer.sep_token_id).all()
        assert (batch["labels"][:, [0, -1]] == IGNORED).all() and batch["attention_mask"].all()


def test_loss_at_a_length_is_that_of_the_model(text):
    """It depends on the length, with weights that use their context."""
    torch.manual_seed(0)
    variant = pretraining.make_variant(text, pretraining.RECIPES["ours"])
    variant.model.eval()
    with torch.no_grad():
        for p in variant.model.parameters():
            p.mul_(50 if p.dim() == 2 else 1)
    review = quality.masked_review(text, 0, np.random.default_rng(0).integers(5, 200, 240).tolist())
    short, long = (variant.evaluate(quality.cut(review, text, room)) for room in (30, 240))
    batch = quality.cut(review, text, 240)
    logits = variant.model(batch["input_ids"], batch["attention_mask"]).logits[0]
    want = torch.nn.functional.cross_entropy(logits, batch["labels"][0], reduction="sum").item()
    assert long == pytest.approx(want, rel=1e-5) and abs(short - long) > 1e-3 * long


@pytest.mark.slow  # a minute: 36 fine-tunings
def test_quality_resumes_and_ends_with_its_line(tmp_path, capsys, monkeypatch):
    argv = ["--toy", "--folder", str(tmp_path / "runs"), "--out", str(tmp_path / "report")]
    with pytest.raises(SystemExit, match="the hours are spent"):
        quality.main([*argv, "--hours", "0"])
    quality.main(argv)
    fields = " ".join(
        f"{task}_vs_{baseline}{end}={NUMBER}"
        for task in quality.TASKS
        for baseline in ("hf", "untrained")
        for end in ("", "_low", "_high")
    )
    losses = " ".join(f"{name}={NUMBER}" for name in ("loss_1x", "loss_2x", "loss_4x", "loss_8x", "hf_loss_1x"))
    assert re.fullmatch(f"quality {fields} {losses}", capsys.readouterr().out.splitlines()[-1])
    report = json.loads((tmp_path / "report" / "quality-cpu.json").read_text())
    assert np.array(report["tasks"]["topics"]["arms"]["ours"]["test"]).shape == (2, 2)
    assert list(report["extrapolation"]["losses"]["ours"]) == ["32", "62", "122", "242"]
    assert report["extrapolation"]["reviews"] > 0 and set(report["extrapolation"]["differences"]) == {"2x", "4x", "8x"}

    def again(*args, **options):
        raise AssertionError("finished work is repeated")

    monkeypatch.setattr(quality, "finetune_once", again)
    monkeypatch.setattr(pretraining, "curve", again)
    quality.main(argv)
    with pytest.raises(SystemExit, match="holds runs with other settings"):
        quality.main(argv[1:])


def test_pages_match_the_results(monkeypatch, tmp_path):
    """The committed pages are; --check finds a figure that was changed by hand."""
    publish.main(["--check"])
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- measured: step -->\n<!-- end -->\nafter\n")
    publish.main([])
    publish.main(["--check"])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    page.write_text(text.replace("<!-- end", "by hand\n<!-- end"))
    with pytest.raises(SystemExit, match="README.md differs from"):
        publish.main(["--check"])
    page.write_text(text.replace("measured: step", "measured: steps"))
    with pytest.raises(SystemExit, match="unknown block 'steps'"):
        publish.main([])
    page.write_text(text.replace("measured: step", "measured: scaling gpus"))
    with pytest.raises(SystemExit, match="expected block 'scaling gpus' to be 'calculated', got 'measured'"):
        publish.main([])
