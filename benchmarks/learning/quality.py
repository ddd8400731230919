"""What pretraining is worth: ours beside Hugging Face's BERT beside no pretraining, by accuracy on labelled text.

    python -m benchmarks.learning.quality [--minutes 6] [--hours 2] [--out FOLDER]
    python -m benchmarks.learning.quality --toy      # a minute: only that all of it runs

Text: Wikipedia lead paragraphs and IMDb's film reviews, cut to consecutive samples of 128 tokens of a tokenizer of
8,192 word pieces that is trained on the same text. Tasks, each with 1,000 rows to fine-tune on:

    topics       the topic of a lead paragraph, one of 11
    sentences    whether a sentence of a film review praises or pans (Rotten Tomatoes)

Each text belongs to train (75%), validation (10%) or test (15%) by a hash of it (``texts.part_of``, whose seed is 17).
Only train is pretrained on, of paragraphs and of reviews; sentences of Rotten Tomatoes are not pretrained on at all.
Whatever is chosen (learning rates) is chosen by validation; test is scored once, by the runs that count.

ours and hf_bert have the same widths (benchmarks/variants.py) and the same training time, in steps fixed by a probe
(benchmarks/pretraining.py), at the better of PRETRAINING_RATES by held-out loss after a quarter of the time; untrained
is ours with fresh weights. Several pretrained models of each are fine-tuned with several seeds, by finetune.py's own
code, at the best of RATES by validation of one run, for each arm and task.

A difference is that of accuracies on the same test rows, averaged over all runs; its 95% interval comes from a
bootstrap that draws pretraining seeds, fine-tuning seeds and test rows with replacement, the same for both arms.
Finished pieces are kept in ``--folder`` and not done again. Last line:

    quality topics_vs_hf=… topics_vs_hf_low=… topics_vs_hf_high=… topics_vs_untrained=… … sentences_vs_hf=… …
"""

import argparse
import csv
import dataclasses
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import train_tokenizer
from benchmarks import report
from benchmarks.learning.pretraining import RECIPES, TUNING, Run, Setup, Text, keep_settings, time_steps
from benchmarks.texts import UNCATEGORIZED, Labelled, film_reviews, part_of, wikipedia_topics, write_json_lines
from benchmarks.variants import Shape
from src.data.tokenizer import load_tokenizer, save_tokenizer
from src.finetune import plan
from src.finetune.config import FinetuneConfig, LabelledData, TaskConfig
from src.finetune.run import PREDICTIONS_FOLDER, RESULT_FILE
from src.finetune.run import train_and_evaluate as finetune_once
from src.train.schema import Component

ARMS = {"ours": "mosaic_bert", "hf_bert": "hf_bert", "untrained": "mosaic_bert"}
"""With the model's name in finetune.py."""
TASKS = ("topics", "sentences")
PRETRAINING_RATES = (1e-3, 3e-3)
RATES = (3e-4, 1e-3, 3e-3)
DRAWS = 2000
"""Of the bootstrap."""


@dataclass(frozen=True)
class Settings(Setup):
    """What must be the same for all pieces of a folder."""

    batch: int = 16
    vocabulary: int = 8192
    shape: Shape = field(default_factory=lambda: Shape(4, 128, 8, 384, 0, length=128))
    minutes: float = 6
    """Training time of a pretraining."""
    seeds: int = 3
    finetuning_seeds: int = 5
    rows: int = 1000
    """To fine-tune on, of each task."""
    held_out_rows: int | None = None
    """At most so many to validate on, and to test on. None: all."""
    epochs: int = 3
    pretraining_rates: tuple[float, ...] = PRETRAINING_RATES
    rates: tuple[float, ...] = RATES


TOY = Settings(
    batch=8,
    documents=64,
    vocabulary=1000,
    shape=Shape(1, 16, 2, 32, 0, length=32),
    minutes=0.005,
    seeds=2,
    finetuning_seeds=2,
    rows=48,
    held_out_rows=32,
    epochs=1,
    pretraining_rates=(1e-3, 2e-3),
    rates=(1e-3, 3e-3),
)


# ----------------------------------------------------------------------------------------------------------------------
# Text
# ----------------------------------------------------------------------------------------------------------------------


def labelled(task: str) -> list[Labelled]:
    """All rows of a task, shuffled."""
    rows = film_reviews("rotten_tomatoes") if task == "sentences" else wikipedia_topics()
    kept = [row for row in rows if row.label != UNCATEGORIZED and row.text.strip()]
    random.Random(17).shuffle(kept)
    return kept


def unlabelled(part: str) -> Iterator[str]:
    """Paragraphs and reviews of a part."""
    for rows in (wikipedia_topics(), film_reviews("imdb")):
        yield from (row.text for row in rows if part_of(row.text) == part)


def write_tasks(folder: Path, settings: Settings) -> None:
    """``TASK-PART.csv`` of text and label."""
    for task in TASKS:
        rows = labelled(task)
        for part in ("train", "validation", "test"):
            limit = settings.rows if part == "train" else settings.held_out_rows
            with (folder / f"{task}-{part}.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(Labelled._fields)
                writer.writerows([row for row in rows if part_of(row.text) == part][:limit])


def read_text(folder: Path, settings: Settings) -> Text:
    """What is pretrained on; the tokenizer and the tasks' files are made in the folder if they are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    train = [*unlabelled("train")]
    name = folder / "tokenizer"
    if not name.exists():
        write_json_lines(folder / "train.jsonl", train)
        train_tokenizer.main(
            [str(folder / "train.jsonl"), "--out", str(name), "--vocab_size", str(settings.vocabulary)]
        )
        (folder / "train.jsonl").unlink()
    write_tasks(folder, settings)
    held_out = [*unlabelled("validation")][::4]  # enough, and evaluated often
    random.Random(17).shuffle(train)
    return Text(load_tokenizer(str(name)), train, held_out, settings, "chunk")


# ----------------------------------------------------------------------------------------------------------------------
# Pretraining
# ----------------------------------------------------------------------------------------------------------------------


class Clock:
    """Ends the program between two pieces of work when its hours are spent."""

    def __init__(self, hours: float):
        self.end = time.perf_counter() + 3600 * hours

    def need(self, minutes: float) -> None:
        if time.perf_counter() + 60 * minutes > self.end:
            sys.exit("the hours are spent; what is finished is kept, and the same command goes on")


def model_folder(folder: Path, arm: str, seed: int) -> Path:
    return folder / "models" / f"{arm}-seed{seed}"


def save(run: Run, path: Path, about: dict[str, Any]) -> None:
    """A Hugging Face folder with the tokenizer, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    run.arm.model.save_pretrained(partial)
    save_tokenizer(run.text.tokenizer, partial)
    (partial / "about.json").write_text(json.dumps(about, indent=1))
    partial.rename(path)


def pretrain(folder: Path, text: Text, settings: Settings, rounds: int, clock: Clock) -> None:
    """Make those models that are not there yet."""
    recipes = {name: RECIPES[name] for name in ("ours", "hf_bert")}
    seconds = time_steps(folder / "steps.json", text, recipes, rounds)
    steps = {name: max(8, round(60 * settings.minutes / seconds[name])) for name in recipes}
    losses: dict[str, dict[float, float]] = {name: {} for name in recipes}
    for name, recipe in recipes.items():
        for rate in settings.pretraining_rates:
            path = folder / "tuning" / f"{name}-lr{rate:g}.json"
            if not path.exists():
                clock.need(1.2 * TUNING * settings.minutes)
                run = Run(text, recipe, rate, 0, max(8, round(TUNING * steps[name])))
                report.write_json(path, {"loss": run.curve(1)[-1]["loss"]})
            losses[name][rate] = json.loads(path.read_text())["loss"]
            print(f"{name} learning rate {rate:g}: held-out loss {losses[name][rate]:.4f}", flush=True)
    for seed in range(1, settings.seeds + 1):
        for name, recipe in recipes.items():
            path = model_folder(folder, name, seed)
            if path.exists():
                continue
            clock.need(1.2 * settings.minutes)
            rate = min(losses[name], key=losses[name].__getitem__)
            run = Run(text, recipe, rate, seed, steps[name])
            point = run.curve(1)[-1]
            about = {"rate": rate, "step_seconds": seconds[name], **point, "samples": len(text.train)}
            save(run, path, about | {"machine": report.machine(settings.device)})
            print(f"{name} seed {seed}: {steps[name]} steps, held-out loss {point['loss']:.4f}", flush=True)
        path = model_folder(folder, "untrained", seed)
        if not path.exists():
            save(Run(text, RECIPES["ours"], 0.0, seed, 1), path, {})


# ----------------------------------------------------------------------------------------------------------------------
# Fine-tuning
# ----------------------------------------------------------------------------------------------------------------------


def finetuned(
    folder: Path, settings: Settings, arm: str, seed: int, task: str, rate: float, seeds: list[int], test: bool
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Result and predictions of the test set for each fine-tuning seed; ``test`` False: it is not looked at."""
    data = LabelledData(
        train=str(folder / f"{task}-train.csv"),
        validation=str(folder / f"{task}-validation.csv"),
        test=str(folder / f"{task}-test.csv") if test else None,
        text="text",
    )
    config = FinetuneConfig(
        run_name="quality",
        folder=str(folder / "finetuning"),
        model=Component(ARMS[arm], {}),
        pretrained=str(model_folder(folder, arm, seed)),
        tasks={task: TaskConfig(lr=rate, batch_size=32, epochs=settings.epochs, seeds=seeds, data=data)},
        optimizer=Component("adamw", {"betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.1}),
        scheduler=Component("linear_decay_with_warmup", {"t_warmup": "0.06dur", "alpha_f": 0.0}),
        max_seq_len=min(64, settings.shape.length),
        precision="fp32" if settings.device == "cpu" else "amp_bf16",
        eval_interval="1dur",
        save_models=False,
    )
    for spec in plan.plan_runs(config):
        if not plan.is_finished(spec):
            Path(spec.folder).mkdir(parents=True, exist_ok=True)
            finetune_once(spec)
        predictions = Path(spec.folder) / PREDICTIONS_FOLDER / "test.txt"
        result = json.loads((Path(spec.folder) / RESULT_FILE).read_text())
        yield result, predictions.read_text().splitlines() if test else []


def best_rate(folder: Path, settings: Settings, arm: str, task: str, clock: Clock) -> float:
    """By validation, of the first pretrained model and a seed that takes part in nothing else."""
    scores = {}
    for rate in settings.rates:
        clock.need(1.5)
        ((result, _),) = finetuned(folder, settings, arm, 1, task, rate, [0], test=False)
        scores[rate] = result["score"]
    return max(scores, key=scores.__getitem__)


def finetune_all(folder: Path, settings: Settings, clock: Clock) -> dict[str, dict[str, dict[str, Any]]]:
    """By task and arm: learning rate, validation accuracies, and which test rows are ``right``, (P, F, rows) bool."""
    found: dict[str, dict[str, dict[str, Any]]] = {task: {} for task in TASKS}
    for task in TASKS:
        with (folder / f"{task}-test.csv").open(newline="") as file:
            labels = [row["label"] for row in csv.DictReader(file)]
        for arm in ARMS:
            rate = best_rate(folder, settings, arm, task, clock)
            right, validation = [], []
            for seed in range(1, settings.seeds + 1):
                seeds = [*range(1, settings.finetuning_seeds + 1)]
                clock.need(1.5 * len(seeds))
                runs = [*finetuned(folder, settings, arm, seed, task, rate, seeds, test=True)]
                right.append([[p == label for p, label in zip(ps, labels, strict=True)] for _, ps in runs])
                validation += [result["score"] for result, _ in runs]
            found[task][arm] = {"rate": rate, "validation": validation, "right": np.array(right)}
            mean = found[task][arm]["right"].mean()
            print(f"{task} {arm}: learning rate {rate:g}, accuracy on test {mean:.4f}", flush=True)
    return found


def interval(a: NDArray[np.bool_], b: NDArray[np.bool_], draws: int = DRAWS) -> tuple[float, float]:
    """95% of the mean of ``a`` minus that of ``b``, (P, F, rows) each.

    Drawn with replacement, the same for both: P pretraining seeds, for each of them F fine-tuning seeds, and rows.
    """
    rng = np.random.default_rng(0)
    difference = a.astype(np.float64) - b
    P, F, rows = difference.shape
    means = []
    for _ in range(draws):
        seeds = rng.integers(P, size=(P, 1)), rng.integers(F, size=(P, F))
        weights = np.bincount(rng.integers(rows, size=rows), minlength=rows) / rows
        means.append(difference[seeds].mean(axis=(0, 1)) @ weights)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


# ----------------------------------------------------------------------------------------------------------------------
# Report
# ----------------------------------------------------------------------------------------------------------------------


def publish(
    folder: Path,
    out: Path,
    settings: Settings,
    frequency_loss: float,
    found: dict[str, dict[str, dict[str, Any]]],
    command: str,
) -> str:
    """Write JSON and Markdown; the last line."""
    device, fields, results, models = settings.device, [], {}, []
    abouts = {
        arm: [json.loads((model_folder(folder, arm, s + 1) / "about.json").read_text()) for s in range(settings.seeds)]
        for arm in ("ours", "hf_bert")
    }
    for arm, runs in abouts.items():
        losses = [run["loss"] for run in runs]
        models.append(
            [
                arm,
                f"{RECIPES[arm].masking[0]:.0%}",
                f"{runs[0]['rate']:g}",
                f"{1e3 * runs[0]['step_seconds']:.1f}",
                f"{runs[0]['step']:,}",
                f"{runs[0]['step'] * settings.batch / runs[0]['samples']:.2f}",
                f"{np.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})",
            ]
        )
    accuracies, differences = [], []
    for task, arms in found.items():
        results[task] = {"arms": {}, "differences": {}}
        for arm, runs in arms.items():
            each = runs["right"].mean(axis=2).flatten()
            results[task]["arms"][arm] = {
                "rate": runs["rate"],
                "validation": runs["validation"],
                "test": runs["right"].mean(axis=2).tolist(),
            }
            accuracies.append(
                [
                    f"{task}: {arm}",
                    f"{runs['rate']:g}",
                    f"{np.mean(runs['validation']):.4f}",
                    f"{each.mean():.4f} ({each.min():.4f} to {each.max():.4f})",
                    f"{runs['right'].shape[2]:,}",
                ]
            )
        for rival, label in (("hf_bert", "hf"), ("untrained", "untrained")):
            mean = float(arms["ours"]["right"].mean() - arms[rival]["right"].mean())
            low, high = interval(arms["ours"]["right"], arms[rival]["right"])
            results[task]["differences"][rival] = {"mean": mean, "low": low, "high": high}
            differences.append([f"{task}: ours - {rival}", f"{mean:+.4f}", f"{low:+.4f} to {high:+.4f}"])
            name = f"{task}_vs_{label}"
            fields += [f"{name}={mean:.4f}", f"{name}_low={low:.4f}", f"{name}_high={high:.4f}"]
    about = report.machine(device)
    pretraining = ["arm", "masked", "learning rate", "ms a step", "steps", "passes", "held-out loss at 15%"]
    lines = [
        "# What pretraining is worth",
        "",
        "By `python -m benchmarks.learning.quality`, whose first lines say what is compared and how.",
        "",
        f"{report.described(about)}. `{command}`",
        "",
        f"Pretraining, {settings.minutes:g} minutes of training a model, {settings.seeds} seeds; frequencies of word "
        f"pieces alone give a loss of {frequency_loss:.4f}:",
        "",
        report.table(pretraining, models),
        "",
        f"Fine-tuning on {settings.rows:,} rows a task, {settings.epochs} epochs, "
        f"{settings.seeds} x {settings.finetuning_seeds} runs; accuracy on test rows:",
        "",
        report.table(
            ["task: arm", "learning rate", "validation", "test, mean (range of runs)", "test rows"], accuracies
        ),
        "",
        report.table(["difference", "mean", "95% interval"], differences),
        "",
        f"The interval draws from {settings.seeds} pretraining seeds only, which makes it rather too narrow.",
        "",
    ]
    record = {"settings": dataclasses.asdict(settings), "machine": about, "command": command}
    record |= {"frequency_loss": frequency_loss}
    report.write_json(out / f"quality-{device}.json", {**record, "pretraining": abouts, "tasks": results})
    (out / f"quality-{device}.md").write_text("\n".join(lines))
    print("\n".join(lines[6:]))
    return f"quality {' '.join(fields)}"


def settings_of(args: argparse.Namespace) -> Settings:
    """Of the command line, which must be those of the folder's other runs."""
    settings = replace(TOY, device=args.device) if args.toy else Settings(minutes=args.minutes, device=args.device)
    keep_settings(args.folder, settings)
    return settings


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The options that the scripts have which use these models."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=Settings.minutes, help="training time of a pretraining")
    parser.add_argument("--hours", type=float, default=math.inf, help="begin nothing that would not end in this time")
    parser.add_argument("--rounds", type=int, default=40, help="steps that each arm is timed for")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"), help="of models and runs")
    parser.add_argument("--out", type=Path, default=Path("runs/quality/report"), help="folder of the report")
    parser.add_argument("--toy", action="store_true", help="tiny; its figures mean nothing")
    return parser


def main(argv: list[str]) -> None:
    """Do what is left, and report."""
    args = parser_of(__doc__).parse_args(argv)
    settings, clock = settings_of(args), Clock(args.hours)
    print(f"# {report.described(report.machine(args.device))}", flush=True)
    text = read_text(args.folder, settings)
    pretrain(args.folder, text, settings, 2 if args.toy else args.rounds, clock)
    found = finetune_all(args.folder, settings, clock)
    command = f"python -m benchmarks.learning.quality {' '.join(argv)}"
    print(publish(args.folder, args.out, settings, text.frequency_loss(), found, command))


if __name__ == "__main__":
    main(sys.argv[1:])
