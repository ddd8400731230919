"""Plans, runs and tables with tiny models, in this process; the last test starts processes."""

import dataclasses
import gzip
import itertools
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchmetrics
from composer import Trainer
from composer.core import Timestamp
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

import export_hf
import finetune
from src.bert_layers import BertForTokenClassification
from src.common import hub
from src.common.errors import ConfigError, TrainingError
from src.finetune import gpus, plan, run
from src.finetune.config import load
from src.finetune.kinds import KINDS, Encoded
from src.finetune.run import MODEL_FOLDER, RESULT_FILE, data_spec
from src.train.weights import load_pretrained
from tests.finetune.test_classifier import SHAPE, kind_of
from tests.finetune.test_glue import snapshot_in, write_task
from tests.finetune.test_labelled_data import write as write_rows

WORDS = "river city war music state water".split()
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TOKENS = {"kind": "tokens", "text": "words", "label": "tags"}


def answers(words):
    """In SQuAD's form: the first word that is about water; none if there is none."""
    wet = next((i for i, word in enumerate(words) if word in ("river", "water")), None)
    start = [] if wet is None else [len(" ".join([*words[:wet], ""]))]
    return {"text": [] if wet is None else [words[wet]], "answer_start": start}


def rows(number, seed=0):
    """Texts with a class, a number, and a tag per word, ... which all follow from the text."""
    chosen = random.Random(seed)
    texts = [[chosen.choice(WORDS) for _ in range(chosen.randint(2, 6))] for _ in range(number)]
    return [
        {
            "text": " ".join(words),
            "second": words[0],
            "label": "wet" if "river" in words or "water" in words else "dry",
            "topics": ["rain", "sea"] if "river" in words or "water" in words else [],
            "answers": answers(words),
            "choices": ["river", "war"] if len(words) % 2 else ["music", "river"],
            "right": "river",
            "number": words.count("river") - words.count("war"),
            "words": words,
            "tags": ["B-WET" if word in ("river", "water") else "O" for word in words],
        }
        for words in texts
    ]


@pytest.fixture
def tree(tmp_path, tokenizer_folder):
    """A config of one task on 30 rows."""
    train, held_out = (write_rows(tmp_path / f"{n}.jsonl", rows(30, i)) for i, n in enumerate(("train", "held-out")))
    data = {"train": train, "validation": held_out, "text": "text"}
    return {
        "run_name": "test",
        "folder": str(tmp_path / "out"),
        "pretrained": None,
        "model": {"name": "mosaic_bert", "model_config": {**SHAPE, **NO_DROPOUT}},
        "tokenizer_name": tokenizer_folder,
        "max_seq_len": 16,
        "precision": "fp32",
        "tasks": {"mine": {"lr": 3e-3, "batch_size": 8, "epochs": 1, "seeds": [1], "data": data}},
        "optimizer": {"name": "adamw"},
        "scheduler": {"name": "constant_with_warmup", "t_warmup": "1ba"},
    }


@pytest.fixture
def here(monkeypatch):
    """Runs happen in this process: the names of those that succeeded."""
    done = []

    class InThisProcess:
        def __init__(self, command, stdin, stdout, **options):
            assert command[:3] == [sys.executable, finetune.__file__, "--run"]
            self.returncode = 0
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=stdin))
            try:
                finetune.main(command[2:])
                done.append(Path(command[3]).name.rpartition("-")[0])
            except (TrainingError, ValueError) as error:
                self.returncode = 1
                stdout.write(str(error).encode())

        def poll(self):
            return self.returncode

    monkeypatch.delenv("LOCAL_RANK", raising=False)  # left by other tests' Trainers
    monkeypatch.setattr(gpus, "POLL_S", 0)
    monkeypatch.setattr(gpus, "Popen", InThisProcess)
    monkeypatch.setattr("finetune.die_with_parent", lambda: None)
    return done


@pytest.fixture
def config_of(tree, write):
    """The config with overrides."""
    return lambda *overrides: load(write(tree), overrides)


@pytest.fixture
def keys(config_of):
    return lambda *overrides: [spec.key for spec in plan.plan_runs(config_of(*overrides))]


@pytest.fixture
def spec_of(config_of):
    """The only run of a config; its folder exists."""

    def spec_of(*overrides):
        (spec,) = plan.plan_runs(config_of(*overrides))
        Path(spec.folder).mkdir(parents=True, exist_ok=True)
        return spec

    return spec_of


def result_of(spec):
    return json.loads((Path(spec.folder) / RESULT_FILE).read_text())


@pytest.fixture
def go(config_of, here):
    """Do the runs of the config, and return their results by name."""

    def go(*overrides):
        config = config_of(*overrides)
        finetune.finetune(config)
        return {spec.name: result_of(spec) for spec in plan.plan_runs(config) if plan.is_finished(spec)}

    return go


def losses_in(folder):
    """Losses of the one run in a folder."""
    (path,) = Path(folder).rglob("metrics.jsonl")
    lines = map(json.loads, path.read_text().splitlines())
    return [line["loss/train/total"] for line in lines if "loss/train/total" in line]


@pytest.fixture
def losses(tree, go, tmp_path):
    """Losses of a new run, in a new folder."""
    numbers = itertools.count()

    def losses(*overrides):
        tree["folder"] = str(tmp_path / f"new{next(numbers)}")
        go(*overrides)
        return losses_in(tree["folder"])

    return losses


LEARNING = {
    "classification": ("mosaic_bert", {}),
    "pairs": ("hf_bert", {"text_pair": "second", "metrics": ["accuracy", "f1", "macro_f1", "matthews"]}),
    "multilabel": (
        "mosaic_bert",
        {"kind": "multilabel", "label": "topics", "metrics": ["micro_f1", "subset_accuracy"]},
    ),
    "multiple_choice": (
        "mosaic_bert",
        {"kind": "multiple_choice", "choices": "choices", "label": "right"},
    ),
    "question_answering": (
        "mosaic_bert",
        {"kind": "question_answering", "text": "second", "text_pair": "text", "label": "answers", "unanswerable": True},
    ),
    "regression": ("mosaic_bert", {"kind": "regression", "label": "number"}),
    "tokens": ("mosaic_bert", {**TOKENS, "metrics": ["accuracy", "entity_f1"]}),
}


PREDICT_FAULTS = {
    "data.txt=x": "config.json: 1 fault\n  data.txt: unknown key; did you mean 'text'?",
    "batch_size=0": "batch_size: expected a positive number, got 0",
    "data.text=title": "no column 'title'",
    "precision=amp_bf16": "precision: amp_bf16 needs a GPU",
}


@pytest.mark.parametrize("what", LEARNING)
def test_each_kind_of_task_is_learnt(what, tree, go, tmp_path, capsys):
    """On the validation set, far better than chance. The test set is not part of the score.

    Early stopping watches other rows. A logger has the run by its name; the saved model predicts the same for rows
    without labels, in a compressed file.
    """
    model, options = LEARNING[what]
    tree["loggers"] = {"tensorboard": {"log_dir": str(tmp_path / "board")}}
    data = tree["tasks"]["mine"]["data"]
    data |= {**options, "test": write_rows(tmp_path / "test.jsonl", rows(9, 2))}
    data["train"] = write_rows(tmp_path / "more.jsonl", rows(200, 5))
    tree["model"]["name"] = model
    stopping = f"tasks.mine.early_stopping.watch={write_rows(tmp_path / 'watched.jsonl', rows(30, 9))}"
    result = go("tasks.mine={epochs: 4, batch_size: 16, lr: 0.01}", stopping)["mine-seed1"]
    assert result["score"] > 0.8
    metrics = result["metrics"]["validation"]
    assert list(metrics) == list(result["metrics"]["test"])
    assert result["score"] == pytest.approx(sum(metrics.values()) / len(metrics))
    assert result["rows"] == {"train": 200, "validation": 30, "test": 9, "early_stopping": 30}
    assert result["steps"] == 4 * 13 and result["best"]["set"] == "early_stopping"

    (file,) = Path(tree["folder"]).glob("*/predictions/validation.*")
    pairs = list(zip(file.read_text().splitlines(), rows(30, 1), strict=True))
    if what == "regression":
        assert sum((float(p) - row["number"]) ** 2 for p, row in pairs) / 30 < 0.5
    elif what == "multiple_choice":
        right = [row["choices"][int(p)] == "river" for p, row in pairs]
        assert sum(right) / len(right) == pytest.approx(metrics["accuracy"])
    elif what == "question_answering":
        right = [json.loads(p)["text"] == "".join(row["answers"]["text"]) for p, row in pairs]
        assert sum(right) / len(right) == pytest.approx(metrics["exact_match"])
    elif what == "multilabel":
        right = [json.loads(p) == row["topics"] for p, row in pairs]
        assert sum(right) / len(right) == pytest.approx(metrics["subset_accuracy"])
    else:
        tags = [(p.split(), row["tags"] if what == "tokens" else [row["label"]]) for p, row in pairs]
        right = [a == b for predicted, want in tags for a, b in zip(predicted, want, strict=True)]
        assert sum(right) / len(right) == pytest.approx(metrics["accuracy"])

    events = (tmp_path / "board" / "test-mine-seed1").glob("events.*")
    assert any(b"metrics/validation/" in path.read_bytes() for path in events)
    said = capsys.readouterr().err
    assert "train: 200 rows" in said and "validation: 30 rows" in said
    assert ("; wet " in said) == (what in ("classification", "pairs"))
    assert "encoded: " in said and "step 1 (1.9%)  loss " in said

    texts = [{name: row[name] for name in ("text", "second", "words", "choices")} for row in rows(30, 1)]
    unlabelled, folder = str(tmp_path / "new.jsonl.gz"), str(next(Path(tree["folder"]).glob("*/model")))
    Path(unlabelled).write_bytes(gzip.compress(Path(write_rows(tmp_path / "new.jsonl", texts)).read_bytes()))
    assert json.loads(Path(folder, "tokenizer_config.json").read_text())["model_max_length"] == 16
    size = 64 if what == "regression" else 7  # of others, the numbers differ by rounding
    finetune.main(["predict", folder, unlabelled, f"batch_size={size}", "--out", str(tmp_path / "new" / "out.txt")])
    assert (tmp_path / "new" / "out.txt").read_text() == file.read_text()
    for option, fault in PREDICT_FAULTS.items():
        with pytest.raises(ValueError) as error:
            finetune.main(["predict", folder, unlabelled, option])
        assert fault in str(error.value)
    if what in ("classification", "multilabel", "regression"):
        (tmp_path / "new.txt").write_text("".join(f"{row['text']}\n" for row in texts))
        capsys.readouterr()
        finetune.main(["predict", folder, str(tmp_path / "new.txt")])
        assert capsys.readouterr().out == file.read_text()
    if what in ("regression", "question_answering"):
        with pytest.raises(ConfigError, match=f"--scores: predictions of kind {what} have no probabilities"):
            finetune.main(["predict", folder, unlabelled, "--scores"])
        return
    capsys.readouterr()
    finetune.main(["predict", "--scores", folder, unlabelled])
    scored = list(map(json.loads, capsys.readouterr().out.splitlines()))
    if what == "multilabel":
        assert [line["prediction"] for line in scored] == list(map(json.loads, file.read_text().splitlines()))
        wanted = [[name for name, p in line["scores"].items() if p > 0.5] for line in scored]
        assert wanted == [line["prediction"] for line in scored]
        return
    assert [line["prediction"] for line in scored] == file.read_text().splitlines()
    for line in scored:
        parts = line["scores"] if what == "tokens" else [line["scores"]]
        assert [max(part, key=part.get) for part in parts] == line["prediction"].split()
        assert all(sum(part.values()) == pytest.approx(1, abs=1e-4) for part in parts)


def test_the_saved_model_gives_the_predictions(tree, go, tokenizer):
    tree["tasks"]["mine"]["data"] |= TOKENS
    go()
    (folder,) = Path(tree["folder"]).glob("mine-*")
    model = load_pretrained(folder / MODEL_FOLDER, BertForTokenClassification)
    row = rows(30, 1)[3]
    encoded = tokenizer(row["words"], is_split_into_words=True, return_tensors="pt")
    predicted = model(encoded["input_ids"], encoded["attention_mask"]).logits[0].argmax(-1).tolist()
    first = [i for i, word in enumerate(encoded.word_ids(0)) if word is not None and word != encoded.word_ids(0)[i - 1]]
    names = " ".join(model.config.id2label[predicted[i]] for i in first)
    assert (folder / "predictions" / "validation.txt").read_text().splitlines()[3] == names


def test_a_model_folder_is_complete_or_as_it_was(tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / MODEL_FOLDER
    (tmp_path / f"{MODEL_FOLDER}.partial").mkdir()  # of a run that was killed
    (tmp_path / f"{MODEL_FOLDER}.partial" / "old").touch()
    network = BertForSequenceClassification(BertConfig(vocab_size=64, **SHAPE))
    run.save_model(network, tokenizer, 16, folder)
    names = sorted(path.name for path in folder.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} < set(names) and "old" not in names

    def full(tokenizer, folder):
        raise OSError("no space left on device")

    monkeypatch.setattr(run, "save_tokenizer", full)
    with pytest.raises(OSError, match="no space left"):
        run.save_model(network, tokenizer, 16, folder)
    assert sorted(path.name for path in folder.iterdir()) == names


def test_the_order_of_rows_follows_seed_and_epoch(tokenizer):
    """A function of seed and epoch; each row once per epoch, the last batch smaller; evaluation in file order."""
    examples = [{"input_ids": torch.tensor([i + 1]).numpy(), "labels": i} for i in range(23)]

    def epochs(seed):
        loader = data_spec(kind_of("classification"), Encoded(examples), tokenizer, 5, seed).dataloader
        return [[batch["labels"].tolist() for batch in loader] for _ in range(2)]

    first, second = epochs(3)
    assert first != second and epochs(3) == [first, second] and epochs(4)[0] != first
    for epoch in (first, second):
        assert [len(batch) for batch in epoch] == [5, 5, 5, 5, 3]
        assert sorted(i for batch in epoch for i in batch) == list(range(23))
    assert sum(epochs(None)[0], []) == list(range(23))


def test_training_is_shuffled_by_the_seed_and_evaluation_is_not(tree, go, monkeypatch):
    seeds = []

    def recorded(kind, encoded, tokenizer, batch_size, seed):
        seeds.append((len(encoded.examples), seed))
        return data_spec(kind, encoded, tokenizer, batch_size, seed)

    monkeypatch.setattr(run, "data_spec", recorded)
    tree["tasks"]["mine"]["data"]["validation"] = 0.3
    sizes = go("tasks.mine.seeds=[7]")["mine-seed7"]["rows"]
    assert seeds == [(sizes["train"], 7), (sizes["validation"], None)] and sum(sizes.values()) == 30


@pytest.mark.parametrize("kind", ["classification", "regression", "tokens"])
def test_losses_and_weights_do_not_depend_on_the_microbatch(kind, tree, losses, spec_of):
    """Gradient accumulation: every row, or labelled word, has the same weight, with weights of classes, too.

    Nor does the result depend on evaluation batches.
    """
    options = {"regression": {"kind": kind, "label": "number"}, "tokens": TOKENS}
    tree["tasks"]["mine"]["data"] |= options.get(kind, {})
    tree["optimizer"]["eps"] = 1.0  # steps are proportional to the gradient, not to its sign, which may be rounding
    tree["tasks"]["mine"] |= {"lr": 0.1, **({} if kind == "regression" else {"class_weights": "balanced"})}
    (one, first), (two, second), (_, start) = (
        (losses(*given, *more), (result_of(spec := spec_of(*given, *more))["metrics"], weights_of(spec)))
        for given, more in (
            ([], []),
            (["device_train_microbatch_size=3", "eval_batch_size=7"], ["eval_interval=1ba"]),
            (["tasks.mine.lr=1e-9"], []),
        )
    )
    assert two == pytest.approx(one, rel=1e-5) and len(one) == 4
    assert second[0]["validation"] == pytest.approx(first[0]["validation"], rel=1e-4)
    for name, weight in first[1].items():
        torch.testing.assert_close(second[1][name], weight, rtol=1e-4, atol=1e-6)
    moved = max(float((weight - start[1][name]).abs().max()) for name, weight in first[1].items())
    assert moved > 1e-3


def weights_of(spec):
    """The saved weights of a run."""
    return load_file(Path(spec.folder) / MODEL_FOLDER / "model.safetensors")


def test_each_seed_has_its_own_head(tree, spec_of, monkeypatch):
    heads, build = [], run.build_model

    def recorded(*args):
        heads.append(build(*args).classifier.weight.clone())
        raise TrainingError("built")

    monkeypatch.setattr(run, "build_model", recorded)
    for seed in (1, 2, 1):
        with pytest.raises(TrainingError, match="built"):
            run.train_and_evaluate(spec_of(f"tasks.mine.seeds=[{seed}]"))
    assert torch.equal(heads[0], heads[2]) and not torch.equal(heads[0], heads[1])


def test_a_tasks_weight_decay_is_in_place_of_the_optimizers(tree, spec_of, monkeypatch):
    built, build = {}, run.build

    def recorded(path, table, component, **given):
        built[path] = build(path, table, component, **given)
        if path == "scheduler":
            raise TrainingError("built")
        return built[path]

    monkeypatch.setattr(run, "build", recorded)
    tree["optimizer"]["weight_decay"] = 0.25
    for task, want in (("null", 0.25), ("0", 0.0), ("0.5", 0.5)):
        with pytest.raises(TrainingError, match="built"):
            run.train_and_evaluate(spec_of(f"tasks.mine.weight_decay={task}"))
        assert max(group["weight_decay"] for group in built["optimizer"].param_groups) == want


def test_the_same_seed_gives_the_same_run(tree, losses):
    tree["model"]["model_config"]["hidden_dropout_prob"] = 0.1
    want = losses()
    assert losses("eval_interval=1ba") == want  # evaluation changes no random state of training
    assert losses("tasks.mine.seeds=[2]") != want


# Early stopping


def metrics_in(folder, label):
    """(step, pearson) of each evaluation of a set in the one run of a folder."""
    (path,) = Path(folder).rglob("metrics.jsonl")
    lines, name = map(json.loads, path.read_text().splitlines()), f"metrics/{label}/pearson"
    return [(line["batch"], line[name]) for line in lines if name in line]


@pytest.mark.parametrize("watch", ["0.3", "held-out.jsonl", "dev"])
def test_the_best_step_is_kept_by_rows_that_are_not_reported(watch, tree, go, tmp_path):
    """The reported values, the predictions and the saved model are those of the watched set's best step."""
    data = tree["tasks"]["mine"]["data"]
    data |= {"kind": "regression", "label": "number", "metrics": ["pearson"]}
    data["train"] = write_rows(tmp_path / "more.jsonl", rows(60, 5))
    data["validation"] = write_rows(tmp_path / "reported.jsonl", rows(40, 7))
    if watch == "dev":
        data["validation"] = {"dev": str(tmp_path / "held-out.jsonl"), "validation": data["validation"]}
    name = "dev" if watch == "dev" else "early_stopping"
    watch = str(tmp_path / watch) if "." in watch[1:] and watch != "0.3" else watch
    stopping = f"tasks.mine.early_stopping={{watch: {watch}, patience: 12ba}}"
    result = go(stopping, "tasks.mine={epochs: 20, lr: 0.03}", "eval_interval=2ba")["mine-seed1"]

    watched, reported = metrics_in(tree["folder"], name), dict(metrics_in(tree["folder"], "validation"))
    step, best = max(watched, key=lambda entry: (entry[1], -entry[0]))
    assert result["best"] == {"set": name, "step": step, "pearson": pytest.approx(best)}
    assert result["steps"] == step + 14 < 20 * 8, "the first evaluation after more than 12 steps without a better one"
    assert list(result["metrics"]) == ["validation"] and result["score"] == pytest.approx(reported[step])
    assert reported[step] != reported[result["steps"]], "else the last weights would do"
    assert result["rows"]["train"] + (result["rows"][name] if watch == "0.3" else 0) == 60

    (folder,) = Path(tree["folder"]).glob("mine-*")
    predicted = list(map(float, (folder / "predictions" / "validation.txt").read_text().split()))
    numbers = [row["number"] for row in rows(40, 7)]
    assert statistics.correlation(predicted, numbers) == pytest.approx(reported[step], abs=1e-4)


def test_a_metric_without_a_value_is_never_the_best():
    """The correlation of equal predictions is NaN. The first of equal values stays the best."""
    keeper, found = run.KeepBest(torch.nn.Linear(1, 1), "pearson", "dev", "2ba"), []
    for step, value in enumerate([math.nan, 0.1, math.nan, 0.3, 0.3], start=1):
        metric = torchmetrics.MeanMetric(nan_strategy="disable")
        metric.update(value)
        state = SimpleNamespace(
            dataloader_label="dev",
            dataloader=object(),
            eval_metrics={"dev": {"pearson": metric}},
            timestamp=Timestamp(batch=step),
            stop_training=lambda: found.append("end"),
        )
        keeper.network.weight.data.fill_(step)
        keeper.eval_end(state, None)
    assert keeper.restore() == {"set": "dev", "step": 4, "pearson": pytest.approx(0.3)} and found == []
    assert keeper.network.weight.item() == 4


def test_the_watched_share_is_no_part_of_another_set(tree, spec_of, tmp_path):
    """Nor has it a text of theirs; of each class one text at least is trained on."""
    texts = [{"text": f"text {i % 80}", "label": "rare" if i % 80 < 3 else "often"} for i in range(100)]
    options = "early_stopping.watch=0.2", "data.validation=0.1", f"data.train={write_rows(tmp_path / 'a.jsonl', texts)}"
    sets, classes = run.read_task(spec_of(*(f"tasks.mine.{option}" for option in options)))
    found = {name: {row.text for row in rows} for name, rows in sets.items()}
    assert classes == ["often", "rare"] and sum(map(len, sets.values())) == 100
    assert list(found) == ["train", "validation", "early_stopping"] and sum(map(len, found.values())) == 80
    assert len(found["validation"]) == 8 and len(found["early_stopping"]) in (14, 15)
    assert {row.label for row in sets["train"]} == {"often", "rare"}


def test_values_of_class_weights():
    """n / (classes x n of the class): each class has the same part in the loss, and the mean over the rows is 1."""
    labels, classes = Counter(a=6, b=3, c=1), ["c", "b", "a"]
    balanced = run.class_weights("balanced", labels, classes)
    assert balanced.tolist() == pytest.approx([10 / 3, 10 / 9, 10 / 18])
    assert run.class_weights("balanced", labels, [*classes, "d"])[:3].equal(balanced), "d has no row"
    assert run.class_weights({"a": 1, "b": 0.5, "c": 3}, labels, classes).tolist() == [3, 0.5, 1]
    assert run.class_weights({0: 2.0, 1: 1.0}, Counter({"0": 1, "1": 1}), ["0", "1"]).tolist() == [2, 1]
    assert run.class_weights(None, labels, classes) is None


# Plans


def test_a_runs_key_hashes_what_decides_its_result(tree, keys, tmp_path, tokenizer_folder):
    """Of files their contents, not their names."""
    tree["tasks"]["mine"]["seeds"] = [1, 2]
    want = keys()
    assert len(set(want)) == 2
    copy = shutil.copy(tmp_path / "train.jsonl", tmp_path / "copy.jsonl")
    other = shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    task = "lr=1e-3 batch_size=4 epochs=2 weight_decay=0.5 seeds=[3,4]"
    data = f"text=second text_pair=second validation=0.2 metrics=[f1] test={copy} train={tmp_path}/held-out.jsonl"
    run = "max_seq_len=15 device_train_microbatch_size=4 optimizer.eps=1e-7 scheduler.t_warmup=2ba"
    model = "attention=reference model_config.num_hidden_layers=1"
    changes = [f"tasks.mine.{x}" for x in task.split()] + [f"tasks.mine.data.{x}" for x in data.split()]
    for override in [*changes, *run.split(), *(f"model.{x}" for x in model.split())]:
        assert not set(keys(override)) & set(want), override
    stopping = keys("tasks.mine.early_stopping={watch: 0.2}")
    for override in ("tasks.mine.class_weights=balanced", "tasks.mine.early_stopping={watch: 0.3}"):
        assert not set(keys(override)) & {*want, *stopping}, override
    later = keys("tasks.mine.early_stopping={watch: 0.2}", "eval_interval=2ba")
    assert not {*later} & {*stopping}, "it decides which steps can be the best one"
    write_rows(tmp_path / "other.jsonl", rows(5, 3))
    watched = [keys(f"tasks.mine.early_stopping={{watch: {tmp_path}/{n}.jsonl}}") for n in ("train", "copy", "other")]
    assert watched[0] == watched[1] and watched[1] != watched[2]
    assert keys("loggers={tensorboard: {}}") == want
    equal = f"run_name=other eval_batch_size=3 eval_interval=2ba save_models=false folder={tmp_path}/elsewhere"
    for override in [*equal.split(), f"tasks.mine.data.train={copy}", f"tokenizer_name={other}"]:
        assert keys(override) == want, override
    for files in ("test=%s", "validation={near: %s}"):
        paths = (tmp_path / "train.jsonl", copy, tmp_path / "held-out.jsonl")
        train, same, held_out = (keys(f"tasks.mine.data.{files % path}") for path in paths)
        assert train == same and not {*train, *want} & {*held_out}, files

    options = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**options, "do_lower_case": False}))
    assert not set(keys(f"tokenizer_name={other}")) & set(want)
    with (tmp_path / "held-out.jsonl").open("a") as file:
        file.write(json.dumps(rows(1)[0]) + "\n")
    assert not set(keys()) & set(want)


def test_other_weights_are_another_run(tree, keys, trained, tmp_path):
    """By their contents, not their path."""
    del tree["model"]["model_config"]
    copy = shutil.copytree(trained, tmp_path / "copy", symlinks=True)
    want = keys(f"pretrained={trained}")
    assert keys(f"pretrained={trained}/latest-rank0.pt") == keys(f"pretrained={copy}") == want
    (copy / "latest-rank0.pt").unlink()
    (copy / "latest-rank0.pt").symlink_to("ep0-ba2-rank0.pt")
    assert keys(f"pretrained={copy}") != want


def test_finished_runs_are_skipped(tree, go, here, capsys):
    go("tasks.mine.seeds=[1,2]", "save_models=false")
    assert here == ["mine-seed1", "mine-seed2"]
    table = Path(tree["folder"], "table.md").read_text()
    go("tasks.mine.seeds=[1,2]", "save_models=false")
    assert len(here) == 2 and Path(tree["folder"], "table.md").read_text() == table
    assert "2 of 2 runs are finished already" in capsys.readouterr().err
    go("tasks.mine.seeds=[1,2,3]", "save_models=false")
    assert here[2:] == ["mine-seed3"]
    go("tasks.mine.seeds=[2]")  # now with its model
    assert here[3:] == ["mine-seed2"]


def test_values_from_the_environment_are_used_and_not_written(tree, go, here, keys, monkeypatch, tmp_path, capsys):
    """Also by a task that starts from another. Run keys are those of the values."""
    tree["tasks"]["late"] = {**tree["tasks"]["mine"], "starts_from": "mine"}
    want = keys()
    hidden = {
        "folder": "s3kr1t-0ut",
        "tokenizer_name": tree["tokenizer_name"],
        "run_name": "s3kr1t-n4me",
        "scheduler.name": "constant_with_warmup",
        "model.name": "mosaic_bert",
        "tasks.mine.data.train": shutil.copy(tmp_path / "train.jsonl", tmp_path / "s3kr1t.jsonl"),
    }
    monkeypatch.chdir(tmp_path)
    for name, value in hidden.items():
        monkeypatch.setenv(name.replace(".", "_"), str(value))
    options = [f"{name}=${{oc.env:{name.replace('.', '_')}}}" for name in hidden]
    assert keys(*options) == want
    results = go(*options)
    assert here == ["mine-seed1", "late-seed1"] and [result["key"] for result in results.values()] == want
    written = [*Path("s3kr1t-0ut").glob("*/run.yaml"), *Path("s3kr1t-0ut").glob("table.*")]
    assert len(written) == 2 + 3
    for path in written:
        assert "s3kr1t" not in path.read_text(), path
    assert '"name": "${oc.env:model_name} (' in Path("s3kr1t-0ut/table.json").read_text()
    (late,) = Path("s3kr1t-0ut").glob("late-*/run.yaml")
    assert "encoder: ${config.folder}/mine-seed1-" in late.read_text()


def test_paths_of_glue_are_not_written_if_their_folder_is_from_the_environment(tree, config_of, tmp_path, monkeypatch):
    write_task(tmp_path / "s3kr1t", "rte")
    monkeypatch.setenv("MY_GLUE", f"{tmp_path}/s3kr1t")
    tree["tasks"] = {"rte": {"lr": 1e-3, "batch_size": 8, "epochs": 1, "seeds": [1]}}
    (spec,) = plan.plan_runs(config_of("glue_folder=${oc.env:MY_GLUE}"))
    assert "s3kr1t" in spec.data.train and "s3kr1t" not in str(spec.described())


def test_a_failed_run_is_reported_and_runs_that_start_from_it_are_skipped(tree, write, here, capsys):
    task = tree["tasks"].pop("mine")
    tree["tasks"] = {
        "bad": {**task, "lr": 1e30, "seeds": [1, 2]},
        "child": {**task, "starts_from": "bad"},
        "good": {**task, "seeds": [1, 2]},
    }
    with pytest.raises(SystemExit) as end:
        finetune.main([write(tree)])
    assert end.value.code == 1 and here == ["good-seed1", "good-seed2"]
    out = capsys.readouterr().out
    for line in ("bad-seed1: the loss is", "bad-seed2: ", "child-seed1: skipped: bad-seed1"):
        assert f"FAILED {line}" in out
    assert "finetune runs=2 failed=3 average=" in out.splitlines()[-1]
    held = json.loads(Path(tree["folder"], "table.json").read_text())
    assert list(held["failed"]) == ["bad-seed1", "child-seed1", "bad-seed2"] and list(held["tasks"]) == ["good"]
    assert held["tasks"]["good"]["score"]["n"] == 2 and held["tasks"]["good"]["score"]["interval"]
    for name in ("table.txt", "table.md"):
        assert "FAILED bad-seed1" in Path(tree["folder"], name).read_text()


def test_a_task_starts_from_the_encoder_of_another(tree, go, here, config_of):
    """Of its first seed, with a new head; that model is saved although save_models is false."""
    shared = tree["tasks"].pop("mine")
    number = {**shared["data"], "kind": "regression", "label": "number"}
    tree["tasks"] = {
        "late": {**shared, "data": number, "starts_from": "first", "lr": 1e-12},
        "first": {**shared, "seeds": [5, 6]},
    }
    go("save_models=false", "only=[late]")
    assert here == ["first-seed5", "first-seed6", "late-seed1"]
    specs = {spec.name: spec for spec in plan.plan_runs(config_of("save_models=false"))}
    saved = [name for name, spec in specs.items() if (Path(spec.folder) / MODEL_FOLDER).exists()]
    assert saved == ["first-seed5"] and specs["late-seed1"].encoder == f"{specs['first-seed5'].folder}/{MODEL_FOLDER}"

    result = run.train_and_evaluate(dataclasses.replace(specs["late-seed1"], save_model=True))
    first, late = (
        load_pretrained(Path(specs[name].folder) / MODEL_FOLDER, KINDS["regression"].heads["mosaic_bert"])
        for name in ("first-seed5", "late-seed1")
    )
    torch.testing.assert_close(dict(late.bert.state_dict()), dict(first.bert.state_dict()), rtol=0, atol=1e-6)
    assert late.classifier.weight.shape == (1, 24) and result["steps"] == 4

    tree["tasks"]["first"]["lr"] = 1e-3  # another start is another run
    assert plan.plan_runs(config_of())[-1].key != specs["late-seed1"].key


def test_finetune_glue_yaml(tree, tmp_path, here):
    """Shrunk, on files as on the hub: MNLI's two validation sets, and a task that starts from it."""
    for task in ("rte", "mnli", "stsb"):
        write_task(tmp_path / "glue", task)
    small = [f"tasks.{task}={{batch_size: 4, epochs: 1, seeds: [1]}}" for task in ("rte", "mnli", "stsb")]
    model = [f"model.model_config.{name}={value}" for name, value in SHAPE.items()]
    where = [f"folder={tree['folder']}", f"glue_folder={tmp_path}/glue", f"tokenizer_name={tree['tokenizer_name']}"]
    options = ["pretrained=null", "precision=fp32", *small, *model, *where]
    config = load("yamls/finetune_glue.yaml", [*options, "only=[rte,stsb]"])
    assert finetune.finetune(config) == 0
    assert here == ["mnli-seed1", "rte-seed1", "stsb-seed1"]
    held = json.loads(Path(tree["folder"], "table.json").read_text())["tasks"]
    assert {task: list(found["metrics"]) for task, found in held.items()} == {
        "mnli": ["accuracy (matched)", "accuracy (mismatched)"],
        "rte": ["accuracy"],
        "stsb": ["pearson", "spearman"],
    }
    table = Path(tree["folder"], "table.txt").read_text()
    assert "3 tasks" in table and "mnli     score" in table
    alone = plan.plan_runs(dataclasses.replace(config, only=["mnli"]))
    assert [spec.key for spec in alone] == [plan.plan_runs(config)[0].key]
    model = json.loads(next(Path(tree["folder"]).glob("mnli-*/model/config.json")).read_text())
    assert list(model["id2label"].values()) == ["entailment", "neutral", "contradiction"]


def test_finetune_own_yaml(tree, trained, here):
    """Shrunk, from a checkpoint of main.py: its shape and its tokenizer; a tenth of the rows held out."""
    train = f"tasks.mine.data.train={tree['tasks']['mine']['data']['train']}"
    options = [f"pretrained={trained}", train, "tasks.mine={seeds: [1], epochs: 1}", f"folder={tree['folder']}"]
    config = load("yamls/finetune_own.yaml", options)
    assert finetune.finetune(config) == 0
    (spec,) = plan.plan_runs(config)
    model = json.loads((Path(spec.folder) / MODEL_FOLDER / "config.json").read_text())
    assert (model["hidden_size"], model["id2label"]) == (24, {"0": "dry", "1": "wet"})
    assert (Path(spec.folder) / MODEL_FOLDER / "tokenizer.json").exists()
    rows = result_of(spec)["rows"]
    assert sum(rows.values()) == 30 and 0 < rows["validation"] < 10


def test_a_model_of_the_hub_comes_from_its_cache(tree, config_of, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    tree |= {"model": {"name": "hf_bert"}, "pretrained": "somebody/bert"}
    with pytest.raises(ConfigError, match="pretrained: no such file or folder, and somebody/bert: not cached"):
        plan.plan_runs(config_of())
    folder = snapshot_in(tmp_path / "cache", "models--somebody--bert")
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **SHAPE)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del tree["tokenizer_name"]
    (spec,) = plan.plan_runs(config_of())
    assert spec.config.pretrained == str(folder)
    with pytest.raises(ConfigError, match="pretrained: ./none: no such file or folder"):
        plan.plan_runs(config_of("pretrained=./none"))


def test_a_run_reads_the_files_of_the_hub_that_its_key_was_made_of(tree, spec_of, tmp_path, monkeypatch):
    """Its process does not ask the hub again, where the dataset may be another one by then."""
    place = "hf:owner/texts:train"
    monkeypatch.setattr(hub, "FOUND", {place: [tree["tasks"]["mine"]["data"]["train"]]})
    spec = spec_of(f"tasks.mine.data.train={place}", "tasks.mine.early_stopping.watch=0.2")
    monkeypatch.setattr(hub, "FOUND", {place: ["changed.jsonl"]})
    assert sum(run.train_and_evaluate(spec)["rows"].values()) == 30 + 30


# Failures


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("precision=amp_bf16", "precision: amp_bf16 needs a GPU, and none is found; precision=fp32 runs here"),
        ("tasks.mine.data.text=txt", "no column 'txt'; did you mean 'text'"),
        ("tasks.mine.data.label=number", "tasks.mine: validation: class"),
        ("tasks.mine.data.train=nowhere.csv", "nowhere.csv: no such file"),
        ("loggers.tensorbord={}", "loggers: unknown 'tensorbord'"),
        ("loggers.tensorboard={log_dirr: x}", "loggers.tensorboard: unexpected 'log_dirr'"),
        ("tasks.mine.early_stopping={watch: nowhere.csv}", "nowhere.csv: no such file"),
        (
            "tasks.mine.early_stopping={watch: copy.jsonl}",
            "tasks.mine: early_stopping.watch: copy.jsonl holds a file of v",
        ),
        (
            "tasks.mine.class_weights={wet: 2}",
            "tasks.mine: class_weights: expected a weight for each of dry, wet; got wet",
        ),
        ("optimizer.beta=1", "optimizer.adamw: unexpected 'beta'"),
        ("optimizer.lr=1", "optimizer.adamw: unexpected 'lr'"),
        ("scheduler.name=linear", "scheduler: unknown 'linear'"),
        ("model.atention=x", "model.mosaic_bert: unexpected 'atention'"),
        ("model.model_config.num_attention_heads=5", "is not a multiple of num_attention_heads 5"),
        ("tokenizer_name=null", "tokenizer_name: missing"),
    ],
)
def test_faults_are_reported_before_anything_runs(override, fault, tree, write, here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy("held-out.jsonl", "copy.jsonl")
    if "label" in override:
        write_rows(tmp_path / "held-out.jsonl", [{**rows(1)[0], "number": 77}])
    with pytest.raises(ValueError) as error:
        finetune.main([write(tree), override])
    assert fault in str(error.value) and not here and not list(Path(tree["folder"]).glob("mine-*"))


@pytest.mark.parametrize(
    ("schedule", "fault"),
    [
        ("{name: warmup_stable_decay, t_warmup: 50ba, t_decay: 90ba}", None),
        ("{name: warmup_stable_decay, t_warmup: 1ep, t_decay: 1ep}", None),
        ("{name: warmup_stable_decay, t_warmup: 50ba, t_decay: 150ba}", "at most the run's length (192ba)"),
        ("{name: warmup_stable_decay, t_warmup: 24ep, t_decay: 25ep}", "at most the run's length (192ba)"),
        ("{name: linear_decay_with_warmup, t_warmup: 1ba, t_max: 150ba}", "must be greater than or equal"),
        ("{name: linear_decay_with_warmup, t_warmup: 150ba, t_max: 192ba}", None),
    ],
)
def test_a_schedule_is_checked_against_the_runs_own_steps(schedule, fault, config_of):
    """48 epochs of 30 rows in batches of 8."""
    specs = plan.plan_runs(config_of("tasks.mine.epochs=48", f"scheduler={schedule}"))
    if fault is None:
        return plan.check_runs(specs)
    with pytest.raises(ConfigError) as error:
        plan.check_runs(specs)
    assert fault in str(error.value) and str(error.value).startswith("tasks.mine: scheduler")


def test_out_of_memory_says_what_to_lower(spec_of, monkeypatch):
    def full(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(Trainer, "fit", full)
    with pytest.raises(TrainingError, match="out of memory .CUDA out of memory. Tried to allocate 2 GiB.. Lower dev"):
        run.train_and_evaluate(spec_of())


def test_a_metric_that_is_not_finite_fails_the_run(tree, spec_of, monkeypatch):
    """The correlation of equal numbers."""
    tree["tasks"]["mine"]["data"] |= {"kind": "regression", "label": "number"}
    monkeypatch.setattr(KINDS["regression"], "predictions", lambda self, outputs: torch.zeros(len(outputs["logits"])))
    with pytest.raises(TrainingError, match="pearson on validation is not finite: the model predicts the same"):
        run.train_and_evaluate(spec_of())
    assert not plan.is_finished(spec_of())


def test_usage(monkeypatch, capsys, tree, write):
    with pytest.raises(SystemExit) as end:
        finetune.main([])
    assert end.value.code == 2 and "finetune_own.yaml" in capsys.readouterr().out
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match="start it with python, without a launcher"):
        finetune.main([write(tree)])


def test_messages_of_runs_show_no_value_of_the_environment(tree, here, write, capsys, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "s3kr1t")
    options = ["model.attention=${oc.env:MY_SECRET}"]
    with pytest.raises(ConfigError) as error:
        finetune.main([write(tree), *options])
    assert "'${oc.env:MY_SECRET}'" in str(error.value) and "s3kr1t" not in str(error.value)

    def fail(spec):
        raise TrainingError(f"{spec.config.run_name} failed")

    monkeypatch.setattr("finetune.train_and_evaluate", fail)
    with pytest.raises(SystemExit):
        finetune.main([write(tree), "run_name=x-${oc.env:MY_SECRET}"])
    shown = capsys.readouterr()
    assert "x-${oc.env:MY_SECRET} failed" in shown.out and "s3kr1t" not in shown.out + shown.err
    monkeypatch.setenv("MY_SECRET", f"{tree['folder']}/s3kr1t")  # the reason ends with the log's path
    with pytest.raises(SystemExit):
        finetune.main([write(tree), "folder=${oc.env:MY_SECRET}"])
    assert "failed: test failed (${oc.env:MY_SECRET}/mine-seed1-" in capsys.readouterr().err
    for table in Path(tree["folder"], "s3kr1t").glob("table.*"):
        assert "s3kr1t" not in table.read_text() and "test failed (${oc.env:MY_SECRET}/mine-" in table.read_text()


@pytest.mark.slow
def test_an_export_predicts_as_the_run(tree, go, tmp_path):
    """By the command line, for rows without labels; and its tokenizer cuts at the run's length."""
    tree["tasks"]["mine"]["data"] |= LEARNING["question_answering"][1]
    go()
    (folder,) = Path(tree["folder"]).glob("mine-*")
    export_hf.main([str(folder / MODEL_FOLDER), str(tmp_path / "exported")])
    assert json.loads((tmp_path / "exported" / "tokenizer_config.json").read_text())["model_max_length"] == 16
    texts = [{name: row[name] for name in ("text", "second")} for row in rows(30, 1)]
    new = write_rows(tmp_path / "new.jsonl", texts)
    command = [sys.executable, "finetune.py", "predict", str(tmp_path / "exported"), new]
    done = subprocess.run(command, capture_output=True, text=True)
    (file,) = (folder / "predictions").iterdir()
    assert done.stdout == file.read_text() and done.stderr.startswith(f"{new}: 30 rows\n"), done.stderr
    assert "You are using" not in done.stderr


@pytest.mark.slow
def test_processes(tree, write, monkeypatch):
    """A failed run, a finished run, another process in the same folder, an interruption."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)  # left by other tests' Trainers
    tree["tasks"]["bad"] = {**tree["tasks"]["mine"], "lr": 1e30}
    command = [sys.executable, "finetune.py", write(tree)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "mine-seed1: done" in done.stderr and "bad-seed1: failed: finetune.py: the loss is" in done.stderr
    assert done.stdout.splitlines()[-1].startswith("finetune runs=1 failed=1 average=")

    process = subprocess.Popen([*command, "tasks.mine.epochs=100000", "only=[mine]"], stderr=subprocess.PIPE, text=True)
    while not list(Path(tree["folder"]).glob("mine-seed1-*/metrics.jsonl"))[1:]:
        assert process.poll() is None
        time.sleep(0.2)
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 1 and "another process is writing" in second.stderr
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(30) == 1
    assert process.stderr is not None and "interrupted; finished runs are kept" in process.stderr.read()
    pattern = f"{finetune.__file__} --run {tree['folder']}"
    assert subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True).stdout == ""
