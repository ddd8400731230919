"""Small pretraining runs of any variant on real text, from scratch and by one recipe, for the benchmarks of learning.

All runs share one loop, whose losses are those of main.py's Trainer (tests/benchmarks/test_loop.py): the same batches
in the same order for the same seed, the product's optimizers (betas 0.9 and 0.98, eps 1e-6, decay 0.02) and schedules
(warmup of 6%), the mean loss over all masked tokens of a batch. Composer's Trainer would need a ComposerModel and a
batch format for each baseline.

A run's clock is its steps times the time of a step, which is measured before, interleaved. So other programs do not
count, nor do evaluation, loading and masking.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from composer.core import Time, Timestamp
from composer.optim import LinearWithWarmupScheduler
from transformers import PreTrainedTokenizerFast

from benchmarks import report, timing
from benchmarks.learning.ablations import OPTIMIZERS, VARIANTS
from benchmarks.variants import Batch, Shape, Variant, check
from src.common.files import replace_folder
from src.convert.samples import Tokens
from src.convert.stats import Stats
from src.data.masking import MaskingCollator, Sample, mask_batch
from src.data.tokenizer import save_tokenizer
from src.data.unigram import unigram_loss
from src.train.models import padded_vocab_size
from src.train.optim import WarmupStableDecayScheduler

WARMUP, LAST = "0.06dur", 0.02
TUNING = 0.25
"""Length of a run that searches the learning rate, as a share of a whole run."""
OVERHEAD = 1.2
"""Hours of a run over those of its steps: evaluation, loading, masking."""


@dataclass(frozen=True)
class Phase:
    """A part of a run."""

    share: float = 1.0
    """Of the run's time."""
    length: int | None = None
    """Longer samples are cut into pieces of this many tokens, [CLS] and [SEP] included. None: they stay whole."""
    batch: float = 1.0
    """Batch size over that of the setup."""


@dataclass(frozen=True)
class Recipe:
    """A variant and how it is trained. Its defaults are mosaic_bert.yaml's."""

    variant: str = "mosaic_bert"
    """A name of VARIANTS (benchmarks/learning/ablations.py)."""
    masking: tuple[float, float] = (0.3, 0.3)
    """Share of tokens masked at the first and at the last step, linear between."""
    dropout: float = 0.1
    """Of hidden states; ModernBERT has none."""
    optimizer: str = "adamw"
    """A name of OPTIMIZERS there."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the optimizer."""
    t_decay: str | None = None
    """Final part of the run in which the learning rate falls, such as 0.3dur; None: it falls from the warmup on."""
    last: float = LAST
    """Learning rate at the end, over the highest."""
    decay: Literal["linear", "sqrt"] = "linear"
    """Form of the fall after a stable rate (WarmupStableDecayScheduler)."""
    phases: tuple[Phase, ...] = (Phase(),)
    """One after another; their shares add up to 1."""
    time: float = 1.0
    """Of a whole run, over the setup's."""
    rate_of: str | None = None
    """Name of the recipe whose learning rate it takes. None: its own is searched."""

    def scheduler(self) -> Any:
        if self.t_decay is None:
            return LinearWithWarmupScheduler(WARMUP, alpha_f=self.last)
        return WarmupStableDecayScheduler(WARMUP, self.t_decay, self.last, self.decay)

    def work(self) -> tuple[Any, ...]:
        """What decides how long a step takes."""
        return self.variant, self.masking, self.dropout, self.optimizer, self.phases


RECIPES: dict[str, Recipe] = {
    "ours": Recipe(),
    "hf_bert": Recipe("hf_bert", (0.15, 0.15)),
    "hf_strong": Recipe("hf_strong", (0.15, 0.15)),
    "modernbert": Recipe("modernbert"),
}


class Course:
    """The steps of a run: their phases and when they end, by the recipe's clock.

    Args:
        step_seconds: of each phase.
        seconds: of the run.
    """

    def __init__(self, recipe: Recipe, step_seconds: Sequence[float], seconds: float):
        counts = [max(1, round(p.share * seconds / each)) for p, each in zip(recipe.phases, step_seconds, strict=True)]
        self.phases = [phase for phase, count in zip(recipe.phases, counts, strict=True) for _ in range(count)]
        each = np.repeat(step_seconds, counts)
        self.steps = len(each)
        self.ends = np.concatenate([[0.0], np.cumsum(each)])
        """Seconds at the start and at the end of each step, (steps + 1,)."""

    def position(self, step: int) -> int:
        """Share of the run that a step begins at, in steps of equal length. Without phases it is the step."""
        return round(self.steps * self.ends[step] / self.ends[-1])

    def nearest(self, share: float) -> int:
        """The step that begins nearest to this share of the run."""
        return int(np.abs(self.ends - share * self.ends[-1]).argmin())


@dataclass(frozen=True)
class Setup:
    """What all runs of a folder share."""

    batch: int
    """Sequences."""
    vocabulary: int
    """Word pieces of the tokenizer."""
    shape: Shape
    """Its vocabulary is replaced by the tokenizer's; its ``length`` is that of samples."""
    minutes: float
    """Training time of a run."""
    seeds: int
    learning_rates: tuple[float, ...]
    """Where each search begins. While the best is the lowest or highest tried, it goes on beyond by twice."""
    documents: int | None = None
    """Most samples to train on, and to validate on. None: all."""
    device: str = "cpu"
    evaluations: int = 1
    """Of a run, evenly spread, the last at its end."""


Texts = Iterable[str]


class Text:
    """Documents as tokens, and batches of them.

    Args:
        train, validation: documents. Their tokens are kept in the folder.
        evaluated: most validation samples that an evaluation takes, evenly spread.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerFast,
        train: Texts,
        validation: Texts,
        setup: Setup,
        evaluated: int | None = None,
    ):
        self.tokenizer, self.setup = tokenizer, setup
        self.train, held_out = (
            self._samples(folder / f"{name}-{setup.shape.length}.npz", texts)[: setup.documents]
            for name, texts in (("train", train), ("validation", validation))
        )
        self.validation = held_out[:: max(1, len(held_out) // evaluated)] if evaluated else held_out
        masks, size = MaskingCollator(tokenizer, 0.15, seed=0), setup.batch
        self.evaluation = [masks(self.validation[i : i + size]) for i in range(0, len(self.validation), size)]

    def _samples(self, path: Path, texts: Texts) -> list[Sample]:
        """Consecutive samples of the documents."""
        if not path.exists():
            chunks = Tokens("", self.tokenizer, self.setup.shape.length, "chunk")
            found = [*chunks.samples(iter(texts), Stats())]
            part = path.with_suffix(f".{os.getpid()}.npz")
            np.savez(part, ids=np.concatenate(found), ends=np.cumsum([len(ids) for ids in found]))
            part.rename(path)
        with np.load(path) as file:
            ids, ends = file["ids"], file["ends"]
        pieces = np.split(ids, ends[:-1])
        return [{"input_ids": ids, "sample_id": number, "epoch": 0} for number, ids in enumerate(pieces)]

    def tokens(self) -> int:
        """Of all training samples."""
        return sum(len(sample["input_ids"]) for sample in self.train)

    def batches(self, seed: int, course: Course, masking: tuple[float, float]) -> Iterator[Batch]:
        """The training batches of a run: each epoch has another order and other masks."""
        order = np.random.default_rng(seed)
        masks = MaskingCollator(self.tokenizer, None, seed)
        epoch, at, picked = -1, len(self.train), np.empty(0, int)
        for step, phase in enumerate(course.phases):
            size = max(1, round(phase.batch * self.setup.batch))
            if at + size > len(self.train):
                epoch, at, picked = epoch + 1, 0, order.permutation(len(self.train))
            samples: list[Any] = [{**self.train[i], "epoch": epoch} for i in picked[at : at + size]]
            at += size
            if phase.length is not None:
                samples = [piece for sample in samples for piece in shorter(sample, phase.length)]
            rate = masking[0] + (masking[1] - masking[0]) * course.position(step) / course.steps
            yield mask_batch(masks(samples), rate)

    def unigram_loss(self) -> float:
        """``unigram_loss`` on the evaluation's masked tokens."""
        return unigram_loss((sample["input_ids"] for sample in self.train), self.evaluation, self.tokenizer)

    def fill(self) -> float:
        """Share of tokens in a padded training batch, the mean of 20."""
        batches = list(self.batches(0, Course(Recipe(), [1.0], 20), (0.15, 0.15)))
        return sum(int(b["attention_mask"].sum()) for b in batches) / sum(b["input_ids"].numel() for b in batches)


def shorter(sample: Sample, length: int) -> Iterator[Sample]:
    """Consecutive pieces of a sample, [CLS] and [SEP] around each, with ids of their own."""
    ids = sample["input_ids"]
    content, most = ids[1:-1], 2**16  # more pieces than any sample has
    for number, at in enumerate(range(0, len(content), length - 2)):
        piece = np.concatenate([ids[:1], content[at : at + length - 2], ids[-1:]])
        yield {**sample, "input_ids": piece, "sample_id": sample["sample_id"] * most + number}


class Training:
    """The loop that all runs share: a variant with its optimizer and schedule.

    Args:
        rate: highest learning rate.
    """

    def __init__(self, variant: Variant, recipe: Recipe, rate: float, course: Course):
        self.variant = variant
        self.optimizer = OPTIMIZERS[recipe.optimizer](variant.model, rate, **recipe.options)
        scheduler, duration = recipe.scheduler(), Time(course.steps, "ba")

        def factor(step: int) -> float:
            # Composer moves a schedule on before it counts the batch, so step t trains at the rate of t - 1.
            at = course.position(max(0, min(step, course.steps) - 1))
            return scheduler(SimpleNamespace(timestamp=Timestamp(batch=at), max_duration=duration))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def step(self, batch: Batch) -> torch.Tensor:
        """Train on a batch; returns its mean loss, ()."""
        loss = self.variant.backward(batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return loss

    def validation_loss(self, batches: Iterable[Batch]) -> float:
        """Nats per masked token."""
        self.variant.model.eval()
        total = masked = 0.0
        for batch in batches:
            total += self.variant.evaluate(batch)
            masked += int((batch["labels"] >= 0).sum())
        self.variant.model.train()
        return total / masked


def make_variant(text: Text, recipe: Recipe) -> Variant:
    """The recipe's variant with fresh weights, of the size that the text's setup asks for."""
    setup = text.setup
    shape = replace(setup.shape, vocabulary=padded_vocab_size(text.tokenizer), dropout=recipe.dropout)
    dtype = torch.bfloat16 if setup.device == "cuda" else torch.float32
    return VARIANTS[recipe.variant](shape, setup.device, dtype)


def new_training(text: Text, recipe: Recipe, rate: float, seed: int, course: Course) -> Training:
    """A training whose weights and dropout are drawn from ``seed``."""
    torch.manual_seed(seed)
    return Training(make_variant(text, recipe), recipe, rate, course)


def curve(training: Training, text: Text, recipe: Recipe, seed: int, course: Course, evaluations: int) -> list[dict]:
    """Train; returns step, tokens, seconds in steps, seconds by the clock and validation loss, at the start and
    ``evaluations`` times."""
    at = {course.nearest(i / evaluations) for i in range(evaluations + 1)}
    clock = timing.wall_clock(text.setup.device)
    points, tokens, seconds = [], 0, 0.0
    batches = text.batches(seed, course, recipe.masking)
    for step in range(course.steps + 1):
        if step in at:
            loss, by_clock = training.validation_loss(text.evaluation), float(course.ends[step])
            points.append({"step": step, "tokens": tokens, "seconds": seconds, "clock": by_clock, "loss": loss})
        if step < course.steps:
            batch = next(batches)
            tokens += int(batch["attention_mask"].sum())
            seconds += clock(partial(training.step, batch))
    return points


def time_steps(path: Path, text: Text, recipes: Mapping[str, Recipe], rounds: int) -> dict[str, list[float]]:
    """Seconds per step of each recipe, by phase: those of ours times the median ratio to ours, interleaved.

    They are kept in ``path``; recipes that come later are timed with ours and scaled to its first seconds. Recipes that
    do the same work are timed once. Each variant is also checked, at its own size.
    """
    with locked(path, wait=True):
        known: dict[str, list[float]] = json.loads(path.read_text())["seconds"] if path.exists() else {}
        work = {recipes[name].work(): name for name in recipes if name in known or name == "ours"}
        alike = {name: work.setdefault(recipe.work(), name) for name, recipe in recipes.items()}
        new = [name for name in recipes if name not in known]
        if not new:
            return known
        runs = {}
        for name in dict.fromkeys(["ours", *(alike[name] for name in new if alike[name] not in known)]):
            recipe = recipes[name]
            for number, phase in enumerate(recipe.phases):
                course = Course(replace(recipe, phases=(replace(phase, share=1.0),)), [1.0], rounds + 2)
                training = new_training(text, recipe, 1e-3, 0, course)
                batches, variant = [*text.batches(0, course, recipe.masking)], training.variant  # masking is not timed
                make = VARIANTS[recipe.variant]
                check(make, variant.shape, variant.device, variant.dtype, batches[0])
                runs[name, number] = partial(next, map(training.step, batches))
        seconds = timing.interleaved(runs, rounds, timing.wall_clock(text.setup.device), warmup=2)
        ours = seconds["ours", 0]
        unit = known.get("ours", [statistics.median(ours)])[0]
        timed: dict[str, list[float]] = {}
        for (name, _), each in seconds.items():
            timed.setdefault(name, []).append(unit * timing.ratios(ours, each)[0])
        known |= {name: known.get(alike[name]) or timed[alike[name]] for name in new}
        report.write_json(path, {"seconds": known, "rounds": rounds, "machine": report.machine(text.setup.device)})
        return known


@contextlib.contextmanager
def locked(path: Path, wait: bool) -> Iterator[bool]:
    """Hold a lock on PATH.lock, so that several commands can share a folder; False: another command has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


class Deadline:
    """The end of the hours that a command may take."""

    def __init__(self, hours: float):
        self.end = time.perf_counter() + 3600 * hours

    def need(self, minutes: float) -> None:
        """Raise SystemExit if work of so many minutes would not end in time."""
        if time.perf_counter() + 60 * minutes > self.end:
            sys.exit("the hours are spent; finished work is kept, and the same command continues")


def keep_settings(folder: Path, settings: Any) -> None:
    """Write a dataclass of settings to the folder; raises SystemExit if the folder's are others."""
    record, asked = folder / "settings.json", json.loads(json.dumps(dataclasses.asdict(settings)))
    if record.exists() and json.loads(record.read_text()) != asked:
        sys.exit(f"{folder} holds runs with other settings ({record}); give the same settings or another --folder")
    report.write_json(record, asked)


class Plan:
    """The runs of a folder. A finished run is kept as a file and is not repeated; commands that share the folder do
    different runs.

    Args:
        recipes: by name; ``ours`` among them.

    Raises:
        SystemExit: the folder's runs have other settings.
    """

    def __init__(self, folder: Path, setup: Setup, recipes: Mapping[str, Recipe]):
        self.folder, self.setup, self.recipes = folder, setup, recipes
        keep_settings(folder, setup)

    def path(self, name: str, seed: int, rate: float | None = None) -> Path:
        """The file of a run; ``rate``: of the search for a learning rate, whose seed is 0."""
        file = f"{name}-seed{seed}.json" if rate is None else f"tuning-{name}-lr{rate:g}.json"
        return self.folder / "curves" / file

    def losses(self, name: str) -> dict[float, float]:
        """Final losses of the finished runs of a recipe's search, by learning rate; inf: it diverged."""
        name = self.recipes[name].rate_of or name
        found = (json.loads(path.read_text()) for path in (self.folder / "curves").glob(f"tuning-{name}-lr*.json"))
        each = {run["rate"]: final(run) for run in found}
        return {rate: loss if math.isfinite(loss) else math.inf for rate, loss in sorted(each.items())}

    def to_search(self, name: str) -> list[float]:
        """Learning rates that are still to be tried; none: the best has worse ones on both sides."""
        losses = self.losses(name)
        if new := [rate for rate in self.setup.learning_rates if rate not in losses]:
            return new
        best = min(losses, key=losses.__getitem__)
        if not math.isfinite(losses[best]):
            return [min(losses) / 2]
        return [best / 2] if best == min(losses) else [best * 2] if best == max(losses) else []

    def curves(self, name: str) -> list[dict[str, Any]]:
        """Finished runs."""
        paths = [self.path(name, seed) for seed in range(1, self.setup.seeds + 1)]
        return [json.loads(path.read_text()) for path in paths if path.exists()]

    def left(self) -> list[tuple[str, int, float | None]]:
        """Runs to do: recipe by recipe, its search first. A search may go on beyond them."""
        runs: list[tuple[str, int, float | None]] = []
        for name, recipe in self.recipes.items():
            runs += [(name, 0, rate) for rate in self.to_search(name)] if recipe.rate_of is None else []
            runs += [(name, seed, None) for seed in range(1, self.setup.seeds + 1)]
        return [run for run in runs if not self.path(*run).exists()]

    def say_left(self) -> None:
        left = self.left()
        shares = sum(TUNING if rate else self.recipes[name].time for name, _, rate in left)
        hours = OVERHEAD * self.setup.minutes * shares / 60
        print(f"{len(left)} runs are left, about {hours:.1f} hours", flush=True)

    def run(
        self, text: Text, rounds: int, deadline: Deadline, keep: Callable[[str, int, Variant], None] = lambda *_: None
    ) -> None:
        """Do what is left.

        Args:
            rounds: steps to time each recipe by.
            keep: called with name, seed and variant at the end of each whole run.

        Raises:
            SystemExit: the next run would not end before the deadline.
        """
        seconds = time_steps(self.folder / "steps.json", text, self.recipes, rounds)
        while left := self.left():
            for name, seed, rate in left:
                deadline.need(OVERHEAD * self.setup.minutes * self.recipes[name].time * (TUNING if rate else 1))
                if rate is None and self.to_search(name):
                    continue  # another command searches
                with locked(self.path(name, seed, rate), wait=False) as mine:
                    if mine and not self.path(name, seed, rate).exists():
                        self.do(text, name, seed, rate, seconds[name], keep)
                        break
            else:
                time.sleep(1)

    def do(
        self,
        text: Text,
        name: str,
        seed: int,
        searched: float | None,
        seconds: list[float],
        keep: Callable[[str, int, Variant], None],
    ) -> None:
        """One run."""
        setup, recipe, losses = self.setup, self.recipes[name], self.losses(name)
        minutes = setup.minutes * recipe.time * (TUNING if searched else 1)
        rate = searched or min(losses, key=losses.__getitem__)
        course = Course(recipe, seconds, max(60 * minutes, max(8, setup.evaluations) * max(seconds)))
        training = new_training(text, recipe, rate, seed, course)
        points = curve(training, text, recipe, seed, course, 1 if searched else setup.evaluations)
        found = {"arm": name, "rate": rate, "seed": seed, "steps": course.steps, "step_seconds": seconds}
        found |= {"samples": len(text.train), "passes": points[-1]["tokens"] / text.tokens()}
        found |= {"parameters": sum(p.numel() for p in training.variant.model.parameters())}
        found |= {"machine": report.machine(setup.device), "points": points}
        if not searched:
            keep(name, seed, training.variant)
        report.write_json(self.path(name, seed, searched), found)
        print(
            f"{name} seed {seed}, learning rate {rate:g}: {course.steps} steps, {points[-1]['tokens']:,} tokens, "
            f"validation loss {final(found):.4f}, {points[-1]['seconds'] / 60:.1f} min in steps, "
            f"{points[-1]['clock'] / 60:.1f} by its clock"
        )
        self.say_left()


def model_folder(folder: Path, name: str, seed: int) -> Path:
    """Where a trained model is saved, with its tokenizer."""
    return folder / "saved" / f"{name}-seed{seed}"


def save_model(folder: Path, name: str, seed: int, variant: Variant, text: Text) -> None:
    """Save a model as a Hugging Face folder."""
    path = model_folder(folder, name, seed)
    new = path.with_name(path.name + ".new")
    variant.model.save_pretrained(new)
    save_tokenizer(text.tokenizer, new)
    replace_folder(new, path)


def final(found: dict[str, Any]) -> float:
    """The last validation loss of a run."""
    return found["points"][-1]["loss"]


def table_of_runs(setup: Setup, curves: dict[str, list[dict[str, Any]]], recipes: Mapping[str, Recipe]) -> str:
    """Learning rate, size, speed and final loss of each recipe."""
    rows = []
    for name, runs in curves.items():
        losses, first, masked = [final(run) for run in runs], runs[0], recipes[name].masking
        row = {"name": name, "masked": " to ".join(f"{rate:.0%}" for rate in dict.fromkeys(masked))}
        row |= {"mean": statistics.mean(losses), "low": min(losses), "high": max(losses)}
        row["ms"] = " / ".join(f"{1e3 * each:.0f}" for each in first["step_seconds"])
        row["passes"] = statistics.mean(run["passes"] for run in runs)
        rows.append(first | row)
    return report.table(
        "recipe | masked | learning rate | M parameters | ms per step | steps | passes | validation loss at 15%",
        "{name} | {masked} | {rate:g} | {parameters:M.2f} | {ms} | {steps:,} | {passes:.2f} "
        "| {mean:.4f} ({low:.4f} to {high:.4f})",
        rows,
    )


def bootstrap(draw: Callable[[np.random.Generator], float], draws: int = 2000) -> dict[str, float]:
    """95% interval, low and high, of what ``draw`` computes from a sample drawn with replacement."""
    rng = np.random.default_rng(0)
    values = sorted(draw(rng) for _ in range(draws))
    return {"low": float(values[round(0.025 * (draws - 1))]), "high": float(values[round(0.975 * (draws - 1))])}


def options(description: str | None, folder: str) -> argparse.ArgumentParser:
    """The options that all benchmarks of learning have, with their defaults."""
    parser = report.parser(description)
    parser.add_argument("--hours", type=float, default=math.inf, help="start nothing that would not end in this time")
    parser.add_argument("--rounds", type=int, default=40, help="steps that each variant is timed for")
    report.add_device(parser)
    parser.add_argument("--folder", type=Path, default=Path(folder), help="of models and runs")
    parser.add_argument("--out", type=Path, default=Path(folder) / "report", help="folder of the report")
    parser.add_argument("--toy", action="store_true", help="tiny; its figures mean nothing")
    return parser


def publish(
    args: argparse.Namespace, argv: list[str], module: str, name: str, title: str, page: list[str], record: dict
) -> None:
    """Write NAME-DEVICE.json and .md to the folder of the report, and print the page's paragraphs."""
    about, command = report.machine(args.device), f"python -m benchmarks.learning.{module} {' '.join(argv)}"
    made = f"{report.described(about)}. `{command}`"
    record = record | {"machine": about, "command": command}
    path = args.out / f"{name}-{args.device}.json"
    report.write_page(path, title, f"benchmarks.learning.{module}", [made, *page], record)
    print("\n\n".join(page))
