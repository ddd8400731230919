"""What pretraining is worth: accuracy after fine-tuning on few rows, neighbours of sentences, loss on longer texts.

    python -m benchmarks.learning.time_to_loss models --only fast hf_bert    # pretrains
    python -m benchmarks.learning.quality [--hours 2] [--out FOLDER]
    python -m benchmarks.learning.quality --toy      # half a minute, after time_to_loss models --toy: only that it runs

Models: fast (mosaic_bert_fast.yaml), hf_bert of the same training time, and untrained, fast with fresh weights; as many
of each as time_to_loss.py trains seeds. No text of a validation or test set is pretrained on, and no sentence of Rotten
Tomatoes.

Tasks (each text belongs to train, validation or test by its hash, ``texts.part_of``):

    topics      the topic of a Wikipedia lead, one of 11: accuracy
    sentences   whether a sentence of a film review is positive (Rotten Tomatoes): accuracy
    ratings     how positive 20 people found a tweet, or a sentence of the New York Times or of Amazon's reviews, from
                -4 to 4 (Hutto and Gilbert, 2014; sdist of vaderSentiment): Pearson's correlation

Each is fine-tuned by finetune.py's own code, on ROWS rows and as many epochs as EPOCHS says. The learning rate of each
model, task and number of rows is the best by the validation set: RATES, and then beyond them until the best has a worse
one on both sides, one run of each pretrained model per rate. Then each pretrained model is fine-tuned with several
seeds, and the test set is scored once. A difference is that of scores on the same test rows, averaged over all runs.
Its 95% interval is a bootstrap over pretraining seeds, fine-tuning seeds and test rows, drawn alike for both models.

Neighbours: for each lead of topics' test set, the nearest among the leads of its train set (cosine of mean-pooled last
states); the share that has its topic. Without training: word pieces weighted by tf-idf.

Above the training length: the loss of the pretrained models on IMDb's reviews of the validation part with at least
8 x 126 tokens. The first 8 x 126 tokens of each are cut into consecutive samples of 126, 252, 504 and 1008, with [CLS]
and [SEP] around each. The same tokens are masked (15%) at every length; only the visible context differs. Hugging
Face's BERT has no positions above the training length. The 95% interval of a difference is a bootstrap over reviews.

Finished runs are kept in ``--folder`` and not repeated; commands that share it do different runs. Last line, at 300
rows:

    quality topics_vs_untrained=… topics_vs_hf_bert=… sentences_vs_untrained=… … neighbours=… loss_8x=…
"""

import argparse
import csv
import dataclasses
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from benchmarks import report
from benchmarks.learning import pretraining, time_to_loss
from benchmarks.learning.pretraining import Deadline, Plan, Text, locked
from benchmarks.texts import UNCATEGORIZED, Labelled, film_reviews, part_of, rated_sentences, wikipedia_topics
from benchmarks.variants import Batch
from src.data.cutting import TextEncoder, encode_prefix
from src.data.masking import MaskingCollator
from src.finetune import plan as finetuning
from src.finetune.config import FinetuneConfig, LabelledData, TaskConfig
from src.finetune.run import PREDICTIONS_FOLDER, RESULT_FILE
from src.finetune.run import train_and_evaluate as finetune_once
from src.masked_lm_loss import IGNORED
from src.train.schema import Component

MODELS = {"fast": "mosaic_bert", "hf_bert": "hf_bert", "untrained": "mosaic_bert"}
"""Their names in finetune.py."""
TASKS = {"topics": "accuracy", "sentences": "accuracy", "ratings": "pearson"}
TIMES = (1, 2, 4, 8)
"""Lengths of ``extrapolate``, as multiples of the training length."""
MOST_RATES = 8
"""Learning rates that a search tries at most."""
Cell = tuple[str, int, str]
"""Task, rows, model."""


@dataclass(frozen=True)
class Settings:
    rows: tuple[int, ...] = (100, 300, 1000)
    """To fine-tune on; fewer rows are the first of more."""
    epochs: tuple[int, ...] = (20, 10, 6)
    """By number of rows."""
    seeds: int = 4
    """Of fine-tuning."""
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    """Where the search begins."""
    held_out_rows: tuple[int, int] = (500, 1500)
    """Most rows to validate on, and to test on."""
    batch: int = 16
    length: int = 64
    """Longer texts are cut."""
    device: str = "cpu"


TOY = Settings((24,), (1,), 2, (1e-3, 4e-3), (32, 32), length=32)


def labelled(task: str, vader: Path) -> list[Labelled]:
    """All rows of a task, shuffled by a fixed seed."""
    read = {
        "topics": wikipedia_topics,
        "sentences": lambda: film_reviews("rotten_tomatoes"),
        "ratings": lambda: rated_sentences(vader),
    }
    kept = [row for row in read[task]() if row.label != UNCATEGORIZED and row.text.strip()]
    random.Random(17).shuffle(kept)
    return kept


def sdist_of_vader(folder: Path) -> Path:
    """The sdist of vaderSentiment in the folder; downloaded if it is not there."""
    path = folder / "vaderSentiment-3.3.2.tar.gz"
    if not path.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "vaderSentiment==3.3.2", "--dest", str(folder)], check=True)
    return path


def write_tasks(folder: Path, settings: Settings, vader: Path) -> None:
    """Write ``TASK-validation.csv``, ``TASK-test.csv`` and ``TASK-ROWS.csv`` with the columns text and label."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        rows = labelled(task, vader)
        sets = {str(n): ("train", n) for n in settings.rows}
        sets |= {part: (part, n) for part, n in zip(("validation", "test"), settings.held_out_rows, strict=True)}
        for name, (part, limit) in sets.items():
            with (folder / f"{task}-{name}.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(Labelled._fields)
                writer.writerows([row for row in rows if part_of(row.text) == part][:limit])


def read_labels(folder: Path, task: str, part: str = "test") -> NDArray[Any]:
    """Labels of a task's rows, (rows,): classes, or numbers."""
    with (folder / f"{task}-{part}.csv").open(newline="") as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    return np.array(labels, float) if TASKS[task] == "pearson" else np.array(labels)


def finetuned(
    models: Path, folder: Path, settings: Settings, cell: Cell, seed: int, rate: float, seeds: list[int], test: bool
) -> Iterator[tuple[float, list[str]]]:
    """Validation score and test predictions of each fine-tuning seed; ``test`` False: without the test set."""
    task, rows, name = cell
    files = folder / "tasks"
    train, validation, tested = (str(files / f"{task}-{part}.csv") for part in (rows, "validation", "test"))
    metric = TASKS[task]
    labels = [read_labels(files, task, part) for part in (str(max(settings.rows)), "validation", "test")]
    data = LabelledData(
        train=train,
        validation=validation,
        test=tested if test else None,
        text="text",
        kind="regression" if metric == "pearson" else "classification",
        # Few rows may lack a class.
        labels=None if metric == "pearson" else sorted({*np.concatenate(labels).tolist()}),
        metrics=[metric],
    )
    epochs = settings.epochs[settings.rows.index(rows)]
    config = FinetuneConfig(
        run_name="quality",
        folder=str(folder / "finetuning"),
        model=Component(MODELS[name], {}),
        pretrained=str(pretraining.model_folder(models, name, seed)),
        tasks={task: TaskConfig(lr=rate, batch_size=settings.batch, epochs=epochs, seeds=seeds, data=data)},
        optimizer=Component("adamw", {"betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.1}),
        scheduler=Component("linear_decay_with_warmup", {"t_warmup": "0.06dur", "alpha_f": 0.0}),
        max_seq_len=settings.length,
        precision="fp32" if settings.device == "cpu" else "amp_bf16",
        eval_interval="1dur",
        save_models=False,
    )
    for spec in finetuning.plan_runs(config):
        if not finetuning.is_finished(spec):
            Path(spec.folder).mkdir(parents=True, exist_ok=True)
            finetune_once(spec)
        predictions = Path(spec.folder) / PREDICTIONS_FOLDER / "test.txt"
        result = json.loads((Path(spec.folder) / RESULT_FILE).read_text())
        yield result["score"], predictions.read_text().splitlines() if test else []


def best_of(tried: dict[float, float]) -> float:
    """The learning rate of the highest score; of equal ones, one between others."""
    return max(tried, key=lambda rate: (tried[rate], min(tried) < rate < max(tried)))


def finetune_cell(
    models: Path, folder: Path, settings: Settings, cell: Cell, count: int, deadline: Deadline
) -> dict[str, Any]:
    """Learning rate, validation scores by rate, and test predictions of a cell, (models, seeds, rows) as texts.

    Args:
        count: of pretrained models.
    """
    tried: dict[float, float] = {}
    run = partial(finetuned, models, folder, settings, cell)

    def score(rate: float) -> None:
        deadline.need(1)
        runs = [next(run(seed, rate, [0], test=False)) for seed in range(1, count + 1)]
        mean = statistics.fmean(validation for validation, _ in runs)
        tried[rate] = -1.0 if math.isnan(mean) else mean  # equal predictions have no correlation

    for rate in settings.rates:
        score(rate)
    while (best := best_of(tried)) in (min(tried), max(tried)) and len(tried) < MOST_RATES:
        score(best / 2 if best == min(tried) else best * 2)
    seeds, predicted = [*range(1, settings.seeds + 1)], []
    for seed in range(1, count + 1):
        deadline.need(2)
        predicted.append([each for _, each in run(seed, best, seeds, test=True)])
    return {"rate": best, "tried": dict(sorted(tried.items())), "predicted": predicted}


def finetune_all(
    models: Path, folder: Path, settings: Settings, count: int, deadline: Deadline
) -> dict[Cell, dict[str, Any]]:
    """All cells; a finished one is kept in the folder."""
    cells = {
        cell: folder / "cells" / "{}-{}-{}.json".format(*cell)
        for cell in itertools.product(TASKS, settings.rows, MODELS)
    }
    while left := [cell for cell, path in cells.items() if not path.exists()]:
        for cell in left:
            with locked(cells[cell], wait=False) as mine:
                if mine and not cells[cell].exists():
                    found = finetune_cell(models, folder, settings, cell, count, deadline)
                    report.write_json(cells[cell], found | {"machine": report.machine(settings.device)})
                    print(f"{' '.join(map(str, cell))}: learning rate {found['rate']:g}", flush=True)
                    break
        else:
            time.sleep(1)
    return {cell: json.loads(path.read_text()) for cell, path in cells.items()}


def scores(predicted: NDArray[Any], labels: NDArray[Any], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Accuracy of classes, or Pearson's correlation of numbers, of each run: (P, F).

    Args:
        predicted: (P, F, rows).
        weights: of the rows, with a sum of 1.
    """
    if labels.dtype.kind != "f":
        return (predicted == labels) @ weights
    x, y = predicted - (predicted @ weights)[..., None], labels - labels @ weights
    return (x * y) @ weights / np.sqrt((x * x) @ weights * ((y * y) @ weights))


def compared(a: NDArray[Any], b: NDArray[Any] | None, labels: NDArray[Any]) -> dict[str, float]:
    """Mean score of ``a``, or of ``a`` minus ``b``, (P, F, rows) each, and its 95% interval.

    Drawn with replacement, alike for both: P pretraining seeds, for each of them F fine-tuning seeds, and rows.
    """
    P, F, rows = a.shape

    def difference(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return scores(a, labels, weights) - (0 if b is None else scores(b, labels, weights))

    def draw(rng: np.random.Generator) -> float:
        seeds = rng.integers(P, size=(P, 1)), rng.integers(F, size=(P, F))
        weights = np.bincount(rng.integers(rows, size=rows), minlength=rows) / rows
        return difference(weights)[seeds].mean()

    return {"mean": float(difference(np.full(rows, 1 / rows)).mean()), **pretraining.bootstrap(draw, 1000)}


@torch.no_grad()
def sentence_vectors(models: Path, text: Text, name: str, seed: int, texts: list[str]) -> NDArray[np.float32]:
    """Mean-pooled last states of texts, (texts, D), of length 1."""
    variant = pretraining.make_variant(text, time_to_loss.MODELS["hf_bert" if name == "hf_bert" else "fast"])
    model = type(variant.model).from_pretrained(pretraining.model_folder(models, name, seed)).eval()
    vectors = []
    for at in range(0, len(texts), 64):
        samples = encoded(text, texts[at : at + 64])
        ids = pad_sequence([torch.tensor(sample) for sample in samples], batch_first=True)  # (B, S)
        mask = pad_sequence([torch.ones(len(sample)) for sample in samples], batch_first=True)
        states = model.bert(ids, mask.long()).last_hidden_state  # (B, S, D)
        mean = (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        vectors.append(F.normalize(mean, dim=-1).numpy())
    return np.concatenate(vectors)


def word_piece_vectors(text: Text, texts: list[str]) -> NDArray[np.float32]:
    """Word pieces of texts weighted by tf-idf, (texts, V), of length 1."""
    counts = np.zeros((len(texts), len(text.tokenizer)), np.float32)
    for row, sample in enumerate(encoded(text, texts)):
        np.add.at(counts[row], sample[1:-1], 1)
    weighted = np.log1p(counts) * np.log(len(texts) / (1 + (counts > 0).sum(axis=0)))
    return weighted / np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-9)


def encoded(text: Text, texts: list[str]) -> list[list[int]]:
    """The beginning of each text, with [CLS] and [SEP]."""
    encoder, room = TextEncoder.of(text.tokenizer), text.setup.shape.length - 2
    first, last = int(text.tokenizer.cls_token_id), int(text.tokenizer.sep_token_id)  # pyright: ignore
    return [[first, *encode_prefix(encoder, each, room), last] for each in texts]


def neighbours(models: Path, text: Text, setup: pretraining.Setup) -> dict[str, Any]:
    """Share of test leads whose nearest train lead has their topic, by model and seed; and three of them to read."""
    limit = setup.documents
    rows = labelled("topics", Path())
    known = [row for row in rows if part_of(row.text) == "train"][:limit]
    asked = [row for row in rows if part_of(row.text) == "test"][:limit]
    texts = [row.text for row in [*known, *asked]]
    topics = np.array([row.label for row in known]), np.array([row.label for row in asked])

    def nearest(vectors: NDArray[np.float32]) -> NDArray[np.int64]:
        return (vectors[len(known) :] @ vectors[: len(known)].T).argmax(axis=1)

    found = {"word pieces": [nearest(word_piece_vectors(text, texts))]}
    for name in MODELS:
        seeds = range(1, setup.seeds + 1)
        found[name] = [nearest(sentence_vectors(models, text, name, seed, texts)) for seed in seeds]
    shares = {name: [float((topics[0][at] == topics[1]).mean()) for at in each] for name, each in found.items()}
    examples = [
        {"text": asked[i].text[:70]} | {name: known[found[name][0][i]].text[:70] for name in found} for i in range(3)
    ]
    return {"shares": shares, "examples": examples, "known": len(known), "asked": len(asked)}


def masked_review(text: Text, number: int, ids: list[int]) -> Batch:
    """The review as one sequence, (1, content), masked by its number."""
    masks = MaskingCollator(text.tokenizer, 0.15, seed=0)
    batch = masks([{"input_ids": np.array(ids, np.uint16), "sample_id": number, "epoch": 0}])
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}


def cut(batch: Batch, text: Text, room: int) -> Batch:
    """Consecutive samples of ``room`` tokens with unmasked [CLS] and [SEP] around each: (n, room + 2)."""
    ends: dict[str, Any] = {"input_ids": (text.tokenizer.cls_token_id, text.tokenizer.sep_token_id)}
    ends |= {"attention_mask": (1, 1), "labels": (IGNORED, IGNORED)}
    rows = {name: F.pad(x.view(-1, room), (1, 1)) for name, x in batch.items()}
    for name, (first, last) in ends.items():
        rows[name][:, 0], rows[name][:, -1] = first, last
    return rows


def change(difference: NDArray[np.float64], masked: NDArray[np.int64]) -> dict[str, float]:
    """Mean and 95% interval of a difference per masked token; ``difference`` and ``masked`` are sums, (reviews,)."""

    def draw(rng: np.random.Generator) -> float:
        picked = rng.integers(len(masked), size=len(masked))
        return difference[picked].sum() / masked[picked].sum()

    return {"mean": float(difference.sum() / masked.sum()), **pretraining.bootstrap(draw)}


def extrapolate(models: Path, text: Text, setup: pretraining.Setup) -> dict[str, Any]:
    """Losses of the seeds by model and length, and differences of ours to the training length."""
    trained = setup.shape.length
    lengths = [times * (trained - 2) + 2 for times in TIMES]
    content = lengths[-1] - 2
    texts = [review.text for review in film_reviews("imdb") if part_of(review.text) == "validation"][: setup.documents]
    encoder = TextEncoder.of(text.tokenizer)
    encoded = [encode_prefix(encoder, review, content) for review in texts]
    reviews = [masked_review(text, i, ids) for i, ids in enumerate(ids for ids in encoded if len(ids) == content)]
    masked = np.array([int((review["labels"] >= 0).sum()) for review in reviews])
    sums: dict[str, dict[int, NDArray[np.float64]]] = {}  # (seeds, reviews) by model and length
    for name, some in (("fast", lengths), ("hf_bert", [trained])):
        variant, by_seed = pretraining.make_variant(text, time_to_loss.MODELS[name]), []
        for seed in range(1, setup.seeds + 1):
            path = pretraining.model_folder(models, name, seed)
            variant.model.load_state_dict(type(variant.model).from_pretrained(path).state_dict())
            variant.model.eval()
            by_seed.append([[variant.evaluate(cut(each, text, length - 2)) for each in reviews] for length in some])
        sums[name] = dict(zip(some, np.array(by_seed).transpose(1, 0, 2), strict=True))
    means = {name: {n: (x.sum(axis=1) / masked.sum()).tolist() for n, x in by.items()} for name, by in sums.items()}
    ours = {length: each.mean(axis=0) for length, each in sums["fast"].items()}
    differences = {
        f"{n}x": change(ours[s] - ours[trained], masked) for n, s in zip(TIMES, lengths, strict=True) if n > 1
    }
    return {"losses": means, "differences": differences, "reviews": len(reviews), "masked": int(masked.sum())}


def report_all(
    args: argparse.Namespace, argv: list[str], settings: Settings, plan: Plan, text: Text, cells: dict[Cell, Any]
) -> str:
    """Write JSON, Markdown and picture; returns the last line."""
    setup = plan.setup
    measured: list[dict[str, Any]] = []
    for task, metric in TASKS.items():
        labels = read_labels(args.folder / "quality" / "tasks", task)
        for rows in settings.rows:
            kind = float if metric == "pearson" else str
            predicted = {name: np.array(cells[task, rows, name]["predicted"], kind) for name in MODELS}
            for name, each in predicted.items():
                row = {"task": task, "rows": rows, "name": name, "metric": metric, "tested": len(labels)}
                row |= {"rate": cells[task, rows, name]["rate"], "tried": cells[task, rows, name]["tried"]}
                row |= compared(each, None, labels)
                if name != "fast":
                    row["difference"] = compared(predicted["fast"], each, labels)
                measured.append(row)
    near, above = neighbours(plan.folder, text, setup), extrapolate(plan.folder, text, setup)
    pretrained = {name: plan.curves(name) for name in ("fast", "hf_bert")}
    for row in measured:
        row["differs"] = (
            "{mean:+.3f} ({low:+.3f} to {high:+.3f})".format(**row["difference"]) if "difference" in row else ""
        )
    lines = [
        f"Pretraining: {setup.minutes:g} minutes of training per model by its clock, {setup.seeds} seeds, on "
        f"{text.tokens() / 1e6:.2f} million tokens. {setup.shape.layers} layers of {setup.shape.hidden}.",
        pretraining.table_of_runs(setup, pretrained, plan.recipes),
        f"Fine-tuning, {setup.seeds} x {settings.seeds} runs per line, epochs by rows: "
        f"{dict(zip(settings.rows, settings.epochs, strict=True))}. Score on test rows, and fast minus it:",
        report.table(
            "task | rows | model | learning rate | test rows | score (95%) | fast - it (95%)",
            "{task}, {metric} | {rows} | {name} | {rate:g} | {tested:,} | {mean:.3f} ({low:.3f} to {high:.3f}) "
            "| {differs}",
            measured,
        ),
        f"The interval draws from {setup.seeds} pretraining seeds only, so it is too narrow.",
        f"![score over rows](quality-{setup.device}.png)",
        f"Nearest of {near['known']:,} leads with the topic of the asked one ({near['asked']:,} asked), mean of seeds:",
        report.table(
            "vectors | share (range of seeds)",
            "{name} | {mean:.3f} ({low:.3f} to {high:.3f})",
            [
                {"name": name, "mean": statistics.fmean(each), "low": min(each), "high": max(each)}
                for name, each in near["shares"].items()
            ],
        ),
        report.table(
            " | ".join(["asked", *near["shares"]]),
            " | ".join(["{text}", *(f"{{{name}}}" for name in near["shares"])]),
            near["examples"],
        ),
        f"Above the training length: {above['reviews']} reviews, {above['masked']:,} masked tokens at each length; "
        f"hf_bert, whose positions end there: {statistics.mean(*above['losses']['hf_bert'].values()):.4f}.",
        report.table(
            "times | tokens | fast, mean (range of seeds) | difference to 1x (95% interval)",
            "{times}x | {tokens} | {mean:.4f} ({low:.4f} to {high:.4f}) "
            "| {change[mean]:+.4f} ({change[low]:+.4f} to {change[high]:+.4f})",
            [
                {"times": n, "tokens": length, "mean": statistics.mean(each), "low": min(each), "high": max(each)}
                | {"change": above["differences"].get(f"{n}x", {})}
                for n, (length, each) in zip(TIMES, above["losses"]["fast"].items(), strict=True)
            ],
        ),
    ]
    draw(args.out / f"quality-{setup.device}.png", measured)
    record = {"settings": dataclasses.asdict(settings), "setup": dataclasses.asdict(setup), "measured": measured}
    record |= {"pretraining": pretrained, "neighbours": near, "extrapolation": above}
    pretraining.publish(args, argv, "quality", "quality", "What pretraining is worth", lines, record)
    middle = settings.rows[len(settings.rows) // 2]
    fields = [
        f"{row['task']}_vs_{row['name']}={row['difference']['mean']:.4f}"
        for row in measured
        if row["rows"] == middle and "difference" in row
    ]
    fields += [f"neighbours={statistics.fmean(near['shares']['fast']):.4f}"]
    return " ".join(["quality", *fields, f"loss_8x={statistics.mean([*above['losses']['fast'].values()][-1]):.4f}"])


def draw(path: Path, measured: list[dict[str, Any]]) -> None:
    """Score over rows, a panel for each task: means as lines, 95% intervals as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    for panel, task in zip(figure.subplots(1, len(TASKS)), TASKS, strict=True):
        for name in MODELS:
            each = [row for row in measured if row["task"] == task and row["name"] == name]
            x, y = [row["rows"] for row in each], np.array([row["mean"] for row in each])
            bars = [y - [row["low"] for row in each], [row["high"] for row in each] - y]
            panel.errorbar(x, y, yerr=bars, label=name, marker="o", capsize=3)
        panel.set(xscale="log", xlabel="rows to fine-tune on", ylabel=f"{TASKS[task]} on test rows", title=task)
        panel.set_xticks(x, [f"{rows:,}" for rows in x], minor=False)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> None:
    """Do what is left, and report."""
    parser = pretraining.options(__doc__, "runs/learning")
    args = parser.parse_args(argv)
    settings, deadline = replace(TOY if args.toy else Settings(), device=args.device), Deadline(args.hours)
    setup = replace(time_to_loss.TOY if args.toy else time_to_loss.MODELS_SETUP, device=args.device)
    print(f"# {report.described(report.machine(args.device))}", flush=True)
    text = time_to_loss.reviews_and_leads(args.folder, setup)
    plan = Plan(args.folder / "models", setup, time_to_loss.MODELS)
    missing = [name for name in ("fast", "hf_bert") if len(plan.curves(name)) < setup.seeds]
    if missing:
        sys.exit(
            f"{args.folder} holds no finished {' and '.join(missing)}; first run python -m benchmarks.learning."
            f"time_to_loss models --only {' '.join(missing)} --folder {args.folder}{' --toy' * args.toy}"
        )
    folder = args.folder / "quality"
    pretraining.keep_settings(folder, settings)
    with locked(folder / "tasks", wait=True):  # another command may read what exists
        for seed in range(1, setup.seeds + 1):
            torch.manual_seed(seed)
            if not pretraining.model_folder(plan.folder, "untrained", seed).exists():
                fresh = pretraining.make_variant(text, time_to_loss.MODELS["fast"])
                pretraining.save_model(plan.folder, "untrained", seed, fresh, text)
        if not (folder / "tasks").exists():
            write_tasks(folder / "tasks.new", settings, sdist_of_vader(args.folder))
            (folder / "tasks.new").rename(folder / "tasks")
    cells = finetune_all(plan.folder, folder, settings, setup.seeds, deadline)
    print(report_all(args, argv, settings, plan, text, cells))


if __name__ == "__main__":
    main(sys.argv[1:])
