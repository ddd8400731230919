"""quality.py: no text is both trained on and evaluated; the pages match the results."""

import json
import re
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import publish, texts
from benchmarks.learning import pretraining, quality, time_to_loss
from src.data.tokenizer import load_tokenizer
from src.masked_lm_loss import IGNORED

NUMBER = r"-?\d+\.\d+"


RATED = "1\t2.5\tGreat, simply great {i}.\n2\t-1.25\tIt broke\ton the way {i}.\n"


@pytest.fixture(scope="module")
def vader(tmp_path_factory):
    """A file in the form of vaderSentiment's sdist."""
    folder = tmp_path_factory.mktemp("vader")
    inner, outer = folder / "hutto_ICWSM_2014.tar.gz", folder / "vaderSentiment-3.3.2.tar.gz"
    with tarfile.open(inner, "w:gz") as archive:
        for kind in ("tweets", "nytEditorialSnippets", "amazonReviewSnippets", "movieReviewSnippets"):
            path = folder / "rows.txt"
            path.write_bytes("".join(RATED.format(i=f"{kind} caf\xe9 {i}") for i in range(60)).encode("cp1252"))
            archive.add(path, f"hutto_ICWSM_2014/{kind}_GroundTruth.txt")
    with tarfile.open(outer, "w:gz") as archive:
        archive.add(inner, f"vaderSentiment-3.3.2/additional_resources/{inner.name}")
    return outer


@pytest.fixture(scope="module")
def rows(vader):
    return {task: quality.labelled(task, vader) for task in quality.TASKS}


def test_no_evaluated_row_is_trained_on(rows, tokenizer_folder, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(time_to_loss, "Text", lambda _, __, train, held_out, *___: given.update(t=train, v=held_out))
    shutil.copytree(tokenizer_folder, tmp_path / "text-1000" / "tokenizer")
    time_to_loss.reviews_and_leads(tmp_path, replace(time_to_loss.TOY, documents=None))
    trained, held_out = set(given["t"]), set(given["v"])
    assert len(trained) > 25_000 and len(held_out) > 3_000 and not trained & held_out
    for row in [*rows["topics"], *rows["sentences"], *rows["ratings"]]:
        assert row.text not in trained or texts.part_of(row.text) == "train"
    assert not {row.text for row in rows["sentences"]} & trained
    shares = [
        sum(texts.part_of(row.text) == part for row in rows["topics"]) for part in ("train", "validation", "test")
    ]
    assert np.array(shares) / sum(shares) == pytest.approx([0.75, 0.10, 0.15], abs=0.02)


def test_tasks_have_their_rows_and_labels(rows, tmp_path, vader):
    assert len({row.label for row in rows["topics"]}) == 11 and len(rows["topics"]) > 9000
    assert {row.label for row in rows["sentences"]} == {"0", "1"} and len(rows["sentences"]) == 8530
    assert {row.label for row in rows["ratings"]} == {"2.5", "-1.25"} and len(rows["ratings"]) == 360
    assert any(row.text == "It broke\ton the way tweets café 3." for row in rows["ratings"])
    quality.write_tasks(tmp_path, replace(quality.TOY, rows=(16, 48)), vader)
    lines = {path.stem: path.read_text().splitlines() for path in tmp_path.iterdir()}
    assert set(lines) == {f"{task}-{part}" for task in quality.TASKS for part in ("16", "48", "validation", "test")}
    for task in quality.TASKS:
        few, more = lines[f"{task}-16"], lines[f"{task}-48"]
        assert few[0] == "text,label" and more[: len(few)] == few
    assert quality.read_labels(tmp_path, "ratings").dtype == float


def test_scores_weigh_rows():
    rng = np.random.default_rng(0)
    labels, predicted = rng.normal(size=50), rng.normal(size=(2, 3, 50))
    counts = rng.integers(0, 3, 50)
    got = quality.scores(predicted, labels, counts / counts.sum())
    for p, f in np.ndindex(2, 3):
        repeated = np.repeat(predicted[p, f], counts), np.repeat(labels, counts)
        assert got[p, f] == pytest.approx(np.corrcoef(*repeated)[0, 1])
    classes = rng.integers(0, 3, 50).astype(str)
    got = quality.scores(classes[None, None], classes, counts / counts.sum())
    assert got == pytest.approx(1.0)


def test_interval_draws_rows_and_seeds():
    """Of a model that is right wherever the other one is, and in a tenth of the rest."""
    rng = np.random.default_rng(1)
    labels = np.full(1000, "1")
    b = rng.random((3, 5, 1000)) < 0.5
    a = b | (rng.random(b.shape) < 0.1)
    mean, low, high = quality.compared(a.astype(int).astype(str), b.astype(int).astype(str), labels).values()
    assert 0 < low < mean < high < 0.1 and mean == pytest.approx(a.mean() - b.mean())
    same = quality.compared(b.astype(int).astype(str), b.astype(int).astype(str), labels)
    assert same == {"mean": 0.0, "low": 0.0, "high": 0.0}
    by_seed = np.full((3, 5, 1000), "0")
    by_seed[0] = "1"  # all of the difference comes from one pretraining seed
    mean, low, high = quality.compared(by_seed, np.full_like(by_seed, "0"), labels).values()
    assert (mean, low, high) == pytest.approx((1 / 3, 0.0, 1.0))
    assert quality.compared(by_seed, None, labels)["mean"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("tried", "best"),
    [
        ({1: 0.5, 2: 0.6, 4: 0.7}, 4),
        ({1: 0.7, 2: 0.7, 4: 0.7}, 2),  # a model that learns nothing
        ({1: 0.7, 2: 0.6}, 1),
    ],
)
def test_of_equal_learning_rates_one_between_others_is_chosen(tried, best):
    assert quality.best_of(tried) == best


@pytest.fixture(scope="module")
def text(tokenizer_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return pretraining.Text(
        folder, load_tokenizer(str(tokenizer_folder)), ["a text"], ["another one"], time_to_loss.TOY
    )


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


@pytest.mark.slow  # half a minute: 90 short fine-tunings
def test_quality_resumes_and_ends_with_its_line(tmp_path, capsys, monkeypatch, vader):
    shutil.copy(vader, tmp_path)
    argv = ["--toy", "--folder", str(tmp_path), "--out", str(tmp_path / "report")]
    with pytest.raises(SystemExit, match="first run python -m benchmarks.learning.time_to_loss models --only fast hf_"):
        quality.main(argv)
    time_to_loss.main(["models", "--only", "fast", "hf_bert", *argv])
    with pytest.raises(SystemExit, match="the hours are spent"):
        quality.main([*argv, "--hours", "0"])
    quality.main(argv)
    fields = [f"{task}_vs_{name}={NUMBER}" for task in quality.TASKS for name in ("hf_bert", "untrained")]
    line = f"quality {' '.join(fields)} neighbours={NUMBER} loss_8x={NUMBER}"
    assert re.fullmatch(line, capsys.readouterr().out.splitlines()[-1])
    report = json.loads((tmp_path / "report" / "quality-cpu.json").read_text())
    assert len(report["measured"]) == 3 * 3 and all(len(row["tried"]) >= 3 for row in report["measured"])
    assert set(report["neighbours"]["shares"]) == {"word pieces", "fast", "hf_bert", "untrained"}
    assert list(report["extrapolation"]["losses"]["fast"]) == ["32", "62", "122", "242"]
    assert report["extrapolation"]["reviews"] > 0 and set(report["extrapolation"]["differences"]) == {"2x", "4x", "8x"}
    assert (tmp_path / "report" / "quality-cpu.png").stat().st_size > 10_000

    def again(*args, **options):
        raise AssertionError("finished work is repeated")

    monkeypatch.setattr(quality, "finetune_once", again)
    monkeypatch.setattr(pretraining, "curve", again)
    quality.main(argv)


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
