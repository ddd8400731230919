"""The comparison of recipes: its batches, searches and times; a toy run of it."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch

from benchmarks.learning import pretraining, time_to_loss
from benchmarks.learning.ablations import OPTIMIZERS, VARIANTS
from benchmarks.learning.pretraining import Course, Phase, Plan, Recipe, Text
from benchmarks.variants import make_batch
from src.data.tokenizer import load_tokenizer

NUMBER = r"(-?\d+(\.\d+)?|inf)"


def curve(losses, step_seconds=1.0, rate=1e-3):
    points = [{"clock": 10 * i * step_seconds, "tokens": 1000 * i, "loss": loss} for i, loss in enumerate(losses)]
    return {"points": points, "rate": rate}


def test_time_to_a_loss_is_interpolated_on_the_smoothed_mean():
    line = [curve([9.0, 8.0, 7.0, 6.0, 5.0], 2.0)]  # smoothing leaves a line as it is
    assert time_to_loss.time_to(line, 6.5) == pytest.approx(2.0 * 25)
    assert time_to_loss.time_to(line, 9.5) == 0.0 and time_to_loss.time_to(line, 4.9) == np.inf
    two = [curve([9.0, 8.0, 7.0, 6.0, 5.0]), curve([11.0, 10.0, 9.0, 8.0, 7.0])]
    assert time_to_loss.time_to(two, 8.0) == pytest.approx(20)
    bumpy = [curve([9.0, 6.0, 9.0, 6.0, 5.0])]
    assert time_to_loss.mean_curve(bumpy)[1].tolist() == pytest.approx([9.0, 8.0, 7.0, 20 / 3, 5.0])


def test_ratio_interval_and_worth():
    """Ours falls twice as fast for a step and needs half the time for one."""
    baseline = [curve([10.0, 9.0 + d, 8.0 + d, 7.0 + d, 6.0 + d], 2.0) for d in (-0.2, 0.0, 0.2)]
    ours = [curve([10.0, 8.0, 6.0, 4.0, 2.0])] * 3
    assert time_to_loss.ratio(ours, baseline) == pytest.approx(0.25)
    low, high = time_to_loss.interval(time_to_loss.ratio, ours, baseline).values()
    assert 0.22 < low < 0.25 < high < 0.28
    certain = time_to_loss.interval(time_to_loss.ratio, ours, baseline[1:2] * 3)
    assert certain == pytest.approx({"low": 0.25, "high": 0.25})
    assert time_to_loss.common_loss(ours, baseline) == pytest.approx(6.0)
    assert time_to_loss.worth(ours, baseline) == pytest.approx(4.0)
    assert time_to_loss.worth(ours, [curve([10.0, 8.0, 6.0, 4.0, 2.0], 1.5)]) == pytest.approx(1.5)
    low, high = time_to_loss.interval(time_to_loss.worth, ours, baseline).values()
    assert 3.5 < low < 4.0 < high < 4.5
    apart, together = (time_to_loss.interval(time_to_loss.worth, baseline, baseline, pair) for pair in (False, True))
    assert apart["low"] < 1.0 < apart["high"] and together == {"low": 1.0, "high": 1.0}


def test_ratio_of_whole_runs():
    """Runs of 1, 2, 4 and 8 times 10 s that end at 8, 7, 6, 5, and a baseline of 100 s."""
    runs = [[curve([10.0, 8.5 - i, 8.0 - i], 0.5 * 2**i)] * 3 for i in range(4)]
    assert time_to_loss.ratio_of_runs(runs, [curve([10.0, 7.0], 10.0)]) == pytest.approx(0.2)
    assert time_to_loss.ratio_of_runs(runs, [curve([10.0, 6.5], 10.0)]) == pytest.approx(0.2 * 2**0.5)
    assert time_to_loss.ratio_of_runs(runs, [curve([10.0, 9.0], 10.0)]) == pytest.approx(0.1)  # an upper bound
    assert time_to_loss.ratio_of_runs(runs, [curve([10.0, 4.9], 10.0)]) == np.inf
    baseline = [curve([10.0, 7.0 + d], 10.0) for d in (-0.5, 0.0, 0.5)]
    low, high = time_to_loss.interval_of_runs(runs, baseline).values()
    assert 0.14 < low < 0.2 < high < 0.29


def test_a_course_gives_each_phase_its_share_of_the_time():
    course = Course(Recipe(phases=(Phase(0.25, 32), Phase(0.75))), [0.5, 2.0], 800)
    assert course.steps == 400 + 300 and [phase.length for phase in course.phases] == [32] * 400 + [None] * 300
    assert course.ends[400] == 200 and course.ends[-1] == 800
    assert course.nearest(0.25) == 400 and course.nearest(1.0) == 700 and course.nearest(0.0) == 0
    assert course.position(400) == 175  # a quarter of the run
    plain = Course(Recipe(), [0.3], 300)
    assert [plain.position(step) for step in range(1001)] == [*range(1001)]


def test_the_learning_rate_follows_the_clock():
    """A quarter of the steps takes most of the time."""
    recipe = Recipe(phases=(Phase(0.5), Phase(0.5)), dropout=0.0, last=0.0)
    course = Course(recipe, [3.0, 1.0], 600)
    model = VARIANTS["mosaic_bert"](dataclasses.replace(time_to_loss.TOY.shape, vocabulary=64, dropout=0.0))
    training, rates = pretraining.Training(model, recipe, 1.0, course), []
    for _ in range(course.steps):
        rates.append(training.optimizer.param_groups[0]["lr"])
        training.optimizer.step()
        training.schedule.step()
    assert course.steps == 400 and rates[101] == pytest.approx(0.5 / 0.94, abs=0.01)  # of 100 + 300 steps


@pytest.fixture(scope="module")
def text(tokenizer_folder, tmp_path_factory):
    tokenizer = load_tokenizer(str(tokenizer_folder))
    documents = [" ".join(f"word{i * j % 97}" for j in range(1, 4 + 11 * i % 90)) for i in range(1, 40)]
    return Text(tmp_path_factory.mktemp("text"), tokenizer, documents, documents[::7], time_to_loss.TOY)


def originals(batch):
    return torch.where(batch["labels"] >= 0, batch["labels"], batch["input_ids"])


def test_phases_hold_the_tokens_of_whole_samples(text):
    """Short pieces of the same samples, in the same order, masked as samples of their own."""
    whole = [*text.batches(3, Course(Recipe(), [1.0], 6), (0.3, 0.3))]
    short = [*text.batches(3, Course(Recipe(phases=(Phase(0.5, 16), Phase(0.5))), [1.0, 1.0], 6), (0.3, 0.3))]
    special = text.tokenizer.all_special_ids
    for a, b in zip(whole, short, strict=True):
        words = [[i for i in originals(batch).flatten().tolist() if i not in special] for batch in (a, b)]
        assert words[0] == words[1] and len(words[0]) > 50
    lengths = [int(batch["attention_mask"].sum(dim=1).max()) for batch in short]
    assert max(lengths[:3]) <= 16 < max(lengths[3:])
    first = [*short[0]["input_ids"][short[0]["attention_mask"] > 0].tolist()]
    assert first.count(text.tokenizer.cls_token_id) >= len(short[0]["input_ids"]) - 1  # one may be a random word
    masked = sum(int((batch["labels"] >= 0).sum()) for batch in short)
    assert masked == pytest.approx(0.3 * sum(int(batch["attention_mask"].sum()) for batch in short), rel=0.25)


def test_small_batches_pass_over_the_text_in_the_same_order(text):
    course = Course(Recipe(phases=(Phase(0.5, batch=0.25), Phase(0.5))), [1.0, 1.0], 20)
    batches = [*text.batches(3, course, (0.3, 0.3))]
    assert [len(batch["input_ids"]) for batch in batches] == [2] * 10 + [8] * 10
    order = np.random.default_rng(3).permutation(len(text.train))
    for row, i in enumerate(order[:20]):
        ids = text.train[i]["input_ids"]
        assert originals(batches[row // 2])[row % 2][: len(ids)].tolist() == ids.tolist()


def test_recipes_share_validation_tokens_and_order(text):
    masked = sum(int((batch["labels"] >= 0).sum()) for batch in text.evaluation)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in text.evaluation)
    assert masked / tokens == pytest.approx(0.15, abs=0.05)
    per_epoch = len(text.train) // 8
    course = Course(Recipe(), [1.0], 2 * per_epoch + 3)
    both = [[*text.batches(3, course, masking)] for masking in ((0.15, 0.15), (0.3, 0.1))]
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(originals(a), originals(b), rtol=0, atol=0)
    epochs = [torch.cat([b["labels"].flatten() for b in both[0][i : i + per_epoch]]) for i in (0, per_epoch)]
    assert len(epochs[0]) != len(epochs[1]) or not torch.equal(*epochs)  # another order and other masks


def test_held_out_text_is_not_trained_on(tokenizer_folder, tmp_path):
    shutil.copytree(tokenizer_folder, tmp_path / "text-1000" / "tokenizer")
    text = time_to_loss.reviews_and_leads(tmp_path, dataclasses.replace(time_to_loss.TOY, documents=300))
    validation = {sample["input_ids"].tobytes() for sample in text.validation}
    assert len(validation) > 100 and not validation & {sample["input_ids"].tobytes() for sample in text.train}


def plan_of(folder, losses):
    """A plan in whose folder a search found these losses by learning rate."""
    plan = Plan(folder, time_to_loss.TOY, {"ours": Recipe()})
    for rate, loss in losses.items():
        path = plan.path("ours", 0, rate)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"rate": rate, "points": [{"loss": loss}]}))
    return plan


@pytest.mark.parametrize(
    ("losses", "next_rates"),
    [
        ({}, [1e-3, 4e-3]),
        ({1e-3: 5.0}, [4e-3]),
        ({1e-3: 5.0, 4e-3: 4.0}, [8e-3]),
        ({1e-3: 4.0, 4e-3: 5.0}, [5e-4]),
        ({1e-3: 5.0, 4e-3: 4.0, 8e-3: 6.0}, []),
        ({1e-3: 5.0, 4e-3: 4.0, 8e-3: float("nan")}, []),
        ({1e-3: float("nan"), 4e-3: float("nan")}, [5e-4]),
    ],
)
def test_a_search_goes_on_until_its_best_is_inside(losses, next_rates, tmp_path):
    plan = plan_of(tmp_path, losses)
    assert plan.to_search("ours") == next_rates
    assert plan.left()[: len(next_rates)] == [("ours", 0, rate) for rate in next_rates]


def test_a_shorter_run_takes_the_rate_of_the_whole_one(tmp_path):
    plan = plan_of(tmp_path, {1e-3: 5.0, 4e-3: 4.0, 8e-3: 6.0})
    plan.recipes = {"ours": Recipe(), "half": Recipe(time=0.5, rate_of="ours")}
    assert plan.losses("half") == plan.losses("ours") and plan.to_search("half") == []
    assert plan.left() == [(name, seed, None) for name in ("ours", "half") for seed in (1, 2)]


def test_one_command_does_a_run_of_a_shared_folder(tmp_path):
    with pretraining.locked(tmp_path / "run.json", wait=False) as first:
        with pretraining.locked(tmp_path / "run.json", wait=False) as second:
            assert first and not second
    with pretraining.locked(tmp_path / "run.json", wait=False) as third:
        assert third


def test_recipes_of_the_same_work_are_timed_once(text, tmp_path, monkeypatch):
    recipes = {"ours": Recipe(dropout=0.0), "stable": Recipe(dropout=0.0, t_decay="0.3dur")}
    recipes |= {"short": Recipe(dropout=0.0, phases=(Phase(0.5, 16), Phase(0.5)))}
    seconds = pretraining.time_steps(tmp_path / "steps.json", text, recipes, 2)
    assert seconds["stable"] == seconds["ours"] and len(seconds["short"]) == 2
    monkeypatch.setattr(pretraining, "check", None)  # nothing is timed again
    assert pretraining.time_steps(tmp_path / "steps.json", text, recipes, 2) == seconds


@pytest.mark.parametrize("name", ["soap", "adamw_embeddings"])
def test_optimizers_of_the_comparison_learn(name):
    torch.manual_seed(0)
    variant = VARIANTS["mosaic_bert"](dataclasses.replace(time_to_loss.TOY.shape, vocabulary=64, dropout=0.0))
    optimizer, batch = OPTIMIZERS[name](variant.model, 1e-2), make_batch(torch.tensor([32, 20, 7]), 64, 0.3)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len([*variant.model.parameters()])
    losses = []
    for _ in range(15):
        losses.append(variant.backward(batch).item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.5
    if name == "adamw_embeddings":
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == [1e-2, 3e-2] and len(optimizer.param_groups[1]["params"]) == 2


def test_z_loss_is_added_in_training_only():
    shape = dataclasses.replace(time_to_loss.TOY.shape, vocabulary=64, dropout=0.0)
    plain, with_z = VARIANTS["mosaic_bert"](shape), VARIANTS["z_loss"](shape)
    with_z.model.load_state_dict(plain.model.state_dict())
    batch = make_batch(torch.tensor([32, 20, 7]), 64, 0.3)
    z = plain.model(batch["input_ids"], batch["attention_mask"], return_logits=True).logits.logsumexp(-1)
    want = 1e-4 * z[batch["labels"] >= 0].square().mean()
    torch.testing.assert_close(with_z.backward(batch) - plain.backward(batch), want.detach(), rtol=1e-2, atol=1e-6)
    for variant in (plain, with_z):
        variant.model.eval()
    assert plain.evaluate(batch) == with_z.evaluate(batch)


@pytest.mark.slow  # a quarter of a minute of training
def test_time_to_loss_resumes_and_ends_with_its_line(tmp_path, tokenizer_folder, capsys):
    """It repeats no finished run, refuses other settings, and compares changes with ours."""
    shutil.copytree(tokenizer_folder, tmp_path / "text-1000" / "tokenizer")
    argv = ["--toy", "--folder", str(tmp_path), "--out", str(tmp_path / "report")]

    def run(setting, *options):
        time_to_loss.main([setting, *argv, *options])
        return capsys.readouterr().out.splitlines()

    assert run("changes", "--only", "muon", "--hours", "0")[-1] == "changes runs_left=8"
    assert re.fullmatch(f"changes muon={NUMBER}", run("changes", "--only", "muon")[-1])
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "changes" / "curves").glob("*.json")}
    printed = run("changes", "--only", "muon", "short_first", "no_glu")
    assert re.fullmatch(f"changes muon={NUMBER} short_first={NUMBER} no_glu={NUMBER}", printed[-1])
    assert any(text.startswith("| no_glu |") for text in printed)
    assert all(path.stat().st_mtime_ns == then for path, then in written.items())
    report = json.loads((tmp_path / "report" / "time_to_loss_changes-cpu.json").read_text())
    assert set(report["curves"]) == set(report["searched"]) == {"ours", "muon", "short_first", "no_glu"}
    assert set(report["found"]) == {"muon", "short_first", "no_glu"}
    assert (tmp_path / "report" / "time_to_loss_changes-cpu.png").stat().st_size > 10_000
    assert run("models", "--only", "fast", "--hours", "0")[-1] == "models runs_left=8"
    line = f"models ours={NUMBER} hf_bert={NUMBER}"
    assert re.fullmatch(line, run("models", "--only", *time_to_loss.FAMILY, "hf_bert")[-1])
    lengths = [
        json.loads((tmp_path / f"models/curves/{n}-seed1.json").read_text())["steps"] for n in ("fast", "fast_half")
    ]
    assert lengths[0] > lengths[1]
    assert (tmp_path / "models" / "saved" / "fast-seed2" / "config.json").exists()
    with pytest.raises(SystemExit, match="holds runs with other settings"):
        time_to_loss.main(["changes", *argv[1:]])
