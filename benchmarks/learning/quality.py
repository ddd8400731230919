"""Accuracy after fine-tuning, and loss above the training length: MosaicBERT, Hugging Face's BERT, fresh weights.

    python -m benchmarks.learning.quality [--minutes 6] [--hours 2] [--out FOLDER]
    python -m benchmarks.learning.quality --toy      # a minute: only that all of it runs

Text: Wikipedia lead paragraphs and IMDb's film reviews, cut into consecutive samples of 128 tokens, by a tokenizer of
8,192 word pieces trained on them. Tasks, each with 1,000 rows to fine-tune on: ``topics``, the topic of a paragraph,
one of 11; ``sentences``, whether a sentence of a film review is positive (Rotten Tomatoes).

Each text belongs to train (75%), validation (10%) or test (15%) by its hash (``texts.part_of``). Only the train part is
pretrained on, and no sentence of Rotten Tomatoes. Learning rates are chosen on the validation set; the test set is
scored once, by the final runs.

ours and hf_bert have the same widths and training time, in steps fixed before (benchmarks/learning/pretraining.py), at
the better of PRETRAINING_RATES after a quarter of the time; untrained is ours with fresh weights. Several pretrained
models of each are fine-tuned with several seeds, by finetune.py's own code, at the best of RATES by validation accuracy
of one run, for each model and task. A difference is that of accuracies on the same test rows, averaged over all runs.
Its 95% interval is a bootstrap over pretraining seeds, fine-tuning seeds and test rows, drawn alike for both models.
Finished runs are kept in ``--folder`` and not repeated.

Above the training length: the loss of the pretrained models on IMDb's reviews of the test part with at least 8 x 126
tokens. The first 8 x 126 tokens of each are cut into consecutive samples of 126, 252, 504 and 1008, with [CLS] and
[SEP] around each. The same tokens are masked (15%) at every length; only the visible context differs. Hugging Face's
BERT has no positions above the training length. The 95% interval of a difference is a bootstrap over reviews.

Last line (loss_2x: at twice the training length):

    quality topics_vs_hf=… topics_vs_hf_low=… topics_vs_hf_high=… topics_vs_untrained=… … sentences_vs_hf=… …
    loss_1x=… loss_2x=… loss_4x=… loss_8x=… hf_loss_1x=…
"""

import argparse
import csv
import dataclasses
import itertools
import json
import random
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from benchmarks import report
from benchmarks.learning import pretraining
from benchmarks.learning.pretraining import RECIPES, Deadline, Plan, Setup, Text
from benchmarks.texts import UNCATEGORIZED, Labelled, film_reviews, make_tokenizer, part_of, wikipedia_topics
from benchmarks.variants import Batch, Shape, Variant
from src.common.files import replace_folder
from src.data.cutting import TextEncoder, encode_prefix
from src.data.masking import MaskingCollator
from src.data.tokenizer import load_tokenizer, save_tokenizer
from src.finetune import plan as finetuning
from src.finetune.config import FinetuneConfig, LabelledData, TaskConfig
from src.finetune.run import PREDICTIONS_FOLDER, RESULT_FILE
from src.finetune.run import train_and_evaluate as finetune_once
from src.masked_lm_loss import IGNORED
from src.train.schema import Component

MODELS = {"ours": "mosaic_bert", "hf_bert": "hf_bert", "untrained": "mosaic_bert"}
"""Their names in finetune.py."""
TASKS = ("topics", "sentences")
PRETRAINING_RATES = (1e-3, 3e-3)
RATES = (3e-4, 1e-3, 3e-3)
TIMES = (1, 2, 4, 8)
"""Lengths of ``extrapolate``, as multiples of the training length."""


@dataclass(frozen=True)
class Settings(Setup):
    finetuning_seeds: int = 5
    rows: int = 1000
    """To fine-tune on, of each task."""
    held_out_rows: int | None = None
    """Most rows to validate on, and to test on. None: all."""
    epochs: int = 3
    rates: tuple[float, ...] = RATES


SETTINGS = Settings(16, 8192, Shape(4, 128, 8, 384, 0, length=128), 6, 3, PRETRAINING_RATES)
TOY = Settings(8, 1000, Shape(1, 16, 2, 32, 0, length=32), 0.005, 2, (1e-3, 2e-3), documents=64)
TOY = replace(TOY, finetuning_seeds=2, rows=48, held_out_rows=32, epochs=1, rates=(1e-3, 3e-3))


def labelled(task: str) -> list[Labelled]:
    """All rows of a task, shuffled by a fixed seed."""
    rows = film_reviews("rotten_tomatoes") if task == "sentences" else wikipedia_topics()
    kept = [row for row in rows if row.label != UNCATEGORIZED and row.text.strip()]
    random.Random(17).shuffle(kept)
    return kept


def unlabelled(part: str) -> Iterator[str]:
    """Paragraphs and reviews of train, validation or test."""
    for rows in (wikipedia_topics(), film_reviews("imdb")):
        yield from (row.text for row in rows if part_of(row.text) == part)


def write_tasks(folder: Path, settings: Settings) -> None:
    """Write ``TASK-PART.csv`` with the columns text and label."""
    for task in TASKS:
        rows = labelled(task)
        for part in ("train", "validation", "test"):
            limit = settings.rows if part == "train" else settings.held_out_rows
            with (folder / f"{task}-{part}.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(Labelled._fields)
                writer.writerows([row for row in rows if part_of(row.text) == part][:limit])


def read_text(folder: Path, settings: Settings) -> Text:
    """The text to pretrain on; makes the tokenizer and the tasks' files in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tasks(folder, settings)
    train = [*unlabelled("train")]
    tokenizer = load_tokenizer(make_tokenizer(folder, train, settings.vocabulary))
    random.Random(17).shuffle(train)
    return Text(tokenizer, train, [*unlabelled("validation")][::4], settings, "chunk")  # a quarter is enough


def model_folder(folder: Path, name: str, seed: int) -> Path:
    return folder / "models" / f"{name}-seed{seed}"


def pretrain(folder: Path, text: Text, settings: Settings, rounds: int, deadline: Deadline) -> Plan:
    """Train the models that are missing."""
    plan = Plan(folder, settings, {name: RECIPES[name] for name in ("ours", "hf_bert")}, MODELS)

    def save(name: str, seed: int, variant: Variant) -> None:
        path = model_folder(folder, name, seed)
        new = path.with_name(path.name + ".new")
        variant.model.save_pretrained(new)
        save_tokenizer(text.tokenizer, new)
        replace_folder(new, path)

    plan.run(text, rounds, deadline, save)
    for seed in range(1, settings.seeds + 1):
        torch.manual_seed(seed)
        save("untrained", seed, pretraining.make_variant(text, RECIPES["ours"]))
    return plan


def finetuned(
    folder: Path, settings: Settings, name: str, seed: int, task: str, rate: float, seeds: list[int], test: bool
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Result and test predictions of each fine-tuning seed; ``test`` False: without the test set."""
    train, validation, tested = (str(folder / f"{task}-{part}.csv") for part in ("train", "validation", "test"))
    data = LabelledData(train=train, validation=validation, test=tested if test else None, text="text")
    config = FinetuneConfig(
        run_name="quality",
        folder=str(folder / "finetuning"),
        model=Component(MODELS[name], {}),
        pretrained=str(model_folder(folder, name, seed)),
        tasks={task: TaskConfig(lr=rate, batch_size=32, epochs=settings.epochs, seeds=seeds, data=data)},
        optimizer=Component("adamw", {"betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.1}),
        scheduler=Component("linear_decay_with_warmup", {"t_warmup": "0.06dur", "alpha_f": 0.0}),
        max_seq_len=min(64, settings.shape.length),
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
        yield result, predictions.read_text().splitlines() if test else []


def finetune_all(folder: Path, settings: Settings, deadline: Deadline) -> dict[str, dict[str, dict[str, Any]]]:
    """By task and model: learning rate, validation accuracies, and ``right``, (P, F, rows) bool, for the test rows."""
    found: dict[str, dict[str, dict[str, Any]]] = {task: {} for task in TASKS}
    for task, name in itertools.product(TASKS, MODELS):
        with (folder / f"{task}-test.csv").open(newline="") as file:
            labels = [row["label"] for row in csv.DictReader(file)]
        tried = {}  # validation accuracy of the first pretrained model, with a seed that is used nowhere else
        for rate in settings.rates:
            deadline.need(1.5)
            ((result, _),) = finetuned(folder, settings, name, 1, task, rate, [0], test=False)
            tried[rate] = result["score"]
        rate = max(tried, key=tried.__getitem__)
        right, validation, seeds = [], [], [*range(1, settings.finetuning_seeds + 1)]
        for seed in range(1, settings.seeds + 1):
            deadline.need(1.5 * len(seeds))
            runs = [*finetuned(folder, settings, name, seed, task, rate, seeds, test=True)]
            right.append([[p == label for p, label in zip(ps, labels, strict=True)] for _, ps in runs])
            validation += [result["score"] for result, _ in runs]
        found[task][name] = {"rate": rate, "validation": validation, "right": np.array(right)}
        print(f"{task} {name}: learning rate {rate:g}, test accuracy {np.mean(right):.4f}", flush=True)
    return found


def interval(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> dict[str, float]:
    """95% interval of the mean of ``a`` minus that of ``b``, (P, F, rows) each.

    Drawn with replacement, alike for both: P pretraining seeds, for each of them F fine-tuning seeds, and rows.
    """
    difference = a.astype(np.float64) - b
    P, F, rows = difference.shape

    def draw(rng: np.random.Generator) -> float:
        seeds = rng.integers(P, size=(P, 1)), rng.integers(F, size=(P, F))
        weights = np.bincount(rng.integers(rows, size=rows), minlength=rows) / rows
        return difference[seeds].mean(axis=(0, 1)) @ weights

    return pretraining.bootstrap(draw)


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


def extrapolate(folder: Path, text: Text, settings: Settings) -> dict[str, Any]:
    """Losses of the seeds by model and length, and differences of ours to the training length."""
    trained = settings.shape.length
    lengths = [times * (trained - 2) + 2 for times in TIMES]
    content = lengths[-1] - 2
    texts = [review.text for review in film_reviews("imdb") if part_of(review.text) == "test"][: settings.documents]
    encoder = TextEncoder.of(text.tokenizer)
    encoded = [encode_prefix(encoder, review, content) for review in texts]
    reviews = [masked_review(text, i, ids) for i, ids in enumerate(ids for ids in encoded if len(ids) == content)]
    masked = np.array([int((review["labels"] >= 0).sum()) for review in reviews])
    sums: dict[str, dict[int, NDArray[np.float64]]] = {}  # (seeds, reviews) by model and length
    for name, some in (("ours", lengths), ("hf_bert", [trained])):
        variant, by_seed = pretraining.make_variant(text, RECIPES[name]), []
        for seed in range(1, settings.seeds + 1):
            weights = type(variant.model).from_pretrained(model_folder(folder, name, seed)).state_dict()
            variant.model.load_state_dict(weights)
            variant.model.eval()
            by_seed.append([[variant.evaluate(cut(each, text, length - 2)) for each in reviews] for length in some])
        sums[name] = dict(zip(some, np.array(by_seed).transpose(1, 0, 2), strict=True))
    means = {name: {n: (x.sum(axis=1) / masked.sum()).tolist() for n, x in by.items()} for name, by in sums.items()}
    ours = {length: each.mean(axis=0) for length, each in sums["ours"].items()}
    differences = {
        f"{n}x": change(ours[s] - ours[trained], masked) for n, s in zip(TIMES, lengths, strict=True) if n > 1
    }
    return {"losses": means, "differences": differences, "reviews": len(reviews), "masked": int(masked.sum())}


def report_all(
    args: argparse.Namespace, argv: list[str], plan: Plan, settings: Settings, text: Text, found: dict, above: dict
) -> str:
    """Write JSON and Markdown; returns the last line."""
    results, accuracies, differences, fields = {}, [], [], []
    for task, models in found.items():
        results[task] = {"arms": {}, "differences": {}}
        ours = models["ours"]["right"]
        for name, model in models.items():
            each = model["right"].mean(axis=2)  # (P, F)
            arm = {"rate": model["rate"], "validation": model["validation"], "test": each.tolist()}
            results[task]["arms"][name] = arm
            row = {"task": task, "name": name, "mean": each.mean(), "low": each.min(), "high": each.max()}
            row |= {"chosen_by": np.mean(model["validation"]), "rows": ours.shape[2]}
            accuracies.append(arm | row)
            if name != "ours":
                difference = {"mean": float(ours.mean() - model["right"].mean()), **interval(ours, model["right"])}
                results[task]["differences"][name] = difference
                differences.append({"task": task, "name": name, **difference})
                key = f"{task}_vs_{name.removesuffix('_bert')}"
                fields += ["{0}={mean:.4f} {0}_low={low:.4f} {0}_high={high:.4f}".format(key, **difference)]
    (hf,) = above["losses"]["hf_bert"].values()
    rows = [
        {"times": n, "tokens": length, "mean": statistics.mean(each), "low": min(each), "high": max(each)}
        | {"change": above["differences"].get(f"{n}x", {})}
        for n, (length, each) in zip(TIMES, above["losses"]["ours"].items(), strict=True)
    ]
    fields += [*(f"loss_{row['times']}x={row['mean']:.4f}" for row in rows), f"hf_loss_1x={statistics.mean(hf):.4f}"]
    pretrained, unigram_loss = {name: plan.curves(name) for name in plan.recipes}, text.unigram_loss()
    lines = [
        f"Pretraining: {settings.minutes:g} minutes of training per model, {settings.seeds} seeds. Unigram baseline: "
        f"{unigram_loss:.4f}.",
        pretraining.table_of_runs(settings, pretrained),
        f"Fine-tuning on {settings.rows:,} rows per task, {settings.epochs} epochs, "
        f"{settings.seeds} x {settings.finetuning_seeds} runs; accuracy on test rows:",
        report.table(
            "task: model | learning rate | validation | test, mean (range of runs) | rows",
            "{task}: {name} | {rate:g} | {chosen_by:.4f} | {mean:.4f} ({low:.4f} to {high:.4f}) | {rows:,}",
            accuracies,
        ),
        report.table(
            "difference | mean | 95% interval",
            "{task}: ours - {name} | {mean:+.4f} | {low:+.4f} to {high:+.4f}",
            differences,
        ),
        f"The interval draws from {settings.seeds} pretraining seeds only, so it is too narrow.",
        f"Above the training length: {above['reviews']} reviews, {above['masked']:,} masked tokens at each length; "
        f"hf_bert, whose positions end there: {statistics.mean(hf):.4f}.",
        report.table(
            "times | tokens | ours, mean (range of seeds) | difference to 1x (95% interval)",
            "{times}x | {tokens} | {mean:.4f} ({low:.4f} to {high:.4f}) "
            "| {change[mean]:+.4f} ({change[low]:+.4f} to {change[high]:+.4f})",
            rows,
        ),
    ]
    record = {"settings": dataclasses.asdict(settings), "unigram_loss": unigram_loss}
    record |= {"pretraining": pretrained, "tasks": results, "extrapolation": above}
    pretraining.publish(args, argv, "quality", "Accuracy after fine-tuning", lines, record)
    return f"quality {' '.join(fields)}"


def main(argv: list[str]) -> None:
    """Do what is left, and report."""
    args = pretraining.options(__doc__, SETTINGS.minutes, "runs/quality").parse_args(argv)
    settings, deadline = TOY if args.toy else replace(SETTINGS, minutes=args.minutes), Deadline(args.hours)
    settings = replace(settings, device=args.device)
    print(f"# {report.described(report.machine(args.device))}", flush=True)
    text = read_text(args.folder, settings)
    plan = pretrain(args.folder, text, settings, 2 if args.toy else args.rounds, deadline)
    found = finetune_all(args.folder, settings, deadline)
    print(report_all(args, argv, plan, settings, text, found, extrapolate(args.folder, text, settings)))


if __name__ == "__main__":
    main(sys.argv[1:])
