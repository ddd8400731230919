"""Small pretraining runs of any variant on real text, from scratch and by one recipe, for the benchmarks of learning.

All runs share one loop, whose losses are those of main.py's Trainer (tests/benchmarks/test_loop.py): the same batches
in the same order for the same seed, the product's AdamW (fused, betas 0.9 and 0.98, eps 1e-6, decay 0.02) and learning
rate schedule (warmup of 6%, linear decay to 2%), the mean loss over all masked tokens of a batch. Composer's Trainer
would need a ComposerModel and a batch format for each baseline.

A run's clock is its steps times the time of a step, which is measured before, interleaved. So other programs do not
count, nor do evaluation, loading and masking.
"""

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from composer.core import Time, Timestamp
from composer.optim import LinearWithWarmupScheduler
from transformers import PreTrainedTokenizerFast

from benchmarks import report, timing
from benchmarks.learning.ablations import ABLATIONS
from benchmarks.variants import VARIANTS, Batch, Shape, Variant, check
from src.convert.samples import Tokens
from src.convert.stats import Stats
from src.data.masking import MaskingCollator, Sample, mask_batch
from src.data.unigram import unigram_loss
from src.train.models import padded_vocab_size
from src.train.optim import WarmupStableDecayScheduler, adamw

WARMUP, LAST = "0.06dur", 0.02
TUNING = 0.25
"""Length of a run that searches the learning rate, as a share of a whole run."""
OVERHEAD = 1.2
"""Hours of a run over those of its steps: evaluation, loading, masking."""


def nadamw(model: torch.nn.Module, lr: float, decay_matrices_only: bool) -> torch.optim.Optimizer:
    """torch's AdamW with Nesterov momentum (Dozat, 2016), with the settings of ``adamw``."""
    options: dict[str, Any] = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.02}
    return torch.optim.NAdam(model.parameters(), lr, decoupled_weight_decay=True, **options)


@dataclass(frozen=True)
class Recipe:
    """A variant and how it is trained."""

    variant: str = "mosaic_bert"
    """A name of VARIANTS or ABLATIONS."""
    masking: tuple[float, float] = (0.3, 0.3)
    """Share of tokens masked at the first and at the last step, linear between."""
    dropout: float = 0.1
    """Of hidden states; ModernBERT has none."""
    decay_matrices_only: bool = False
    """No weight decay on biases and norms."""
    t_decay: str | None = None
    """Final part of the run in which the learning rate falls, such as 0.3dur; None: it falls from the warmup on."""
    optimizer: Callable[..., torch.optim.Optimizer] = adamw

    def scheduler(self) -> Any:
        if self.t_decay is None:
            return LinearWithWarmupScheduler(WARMUP, alpha_f=LAST)
        return WarmupStableDecayScheduler(WARMUP, self.t_decay, LAST)


RECIPES: dict[str, Recipe] = {
    "ours": Recipe(),
    "hf_bert": Recipe("hf_bert", (0.15, 0.15)),
    "hf_strong": Recipe("hf_strong", (0.15, 0.15)),
    "modernbert": Recipe("modernbert"),
}


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
    documents: int | None = None
    """Most samples to train on, and to validate on. None: all."""
    device: str = "cpu"
    evaluations: int = 1
    """Of a run, evenly spread, the last at its end."""


Texts = Iterable[str]


class Text:
    """Documents as tokens, and batches of them.

    Args:
        train, validation: documents.
        pack: ``truncate`` takes their beginnings, ``chunk`` all of them (src/convert/unit.py).
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, train: Texts, validation: Texts, setup: Setup, pack: str = "truncate"
    ):
        self.tokenizer, self.setup, self.pack = tokenizer, setup, pack
        self.train = list(itertools.islice(self._samples(train), setup.documents))
        self.validation = list(itertools.islice(self._samples(validation), setup.documents))
        masks, size = MaskingCollator(tokenizer, 0.15, seed=0), setup.batch
        self.evaluation = [masks(self.validation[i : i + size]) for i in range(0, len(self.validation), size)]

    def _samples(self, texts: Texts) -> Iterator[Sample]:
        tokens = Tokens("", self.tokenizer, self.setup.shape.length, self.pack)
        for number, ids in enumerate(tokens.samples(iter(texts), Stats())):
            yield {"input_ids": ids, "sample_id": number, "epoch": 0}

    def batches(self, seed: int, steps: int, masking: tuple[float, float]) -> Iterator[Batch]:
        """``steps`` training batches: each epoch has another order and other masks."""
        order = np.random.default_rng(seed)
        masks = MaskingCollator(self.tokenizer, None, seed)
        per_epoch = len(self.train) // self.setup.batch
        for step in range(steps):
            epoch, at = divmod(step, per_epoch)
            if at == 0:
                picked = order.permutation(len(self.train))
            rows = picked[at * self.setup.batch : (at + 1) * self.setup.batch]
            rate = masking[0] + (masking[1] - masking[0]) * step / steps
            samples: list[Any] = [{**self.train[i], "epoch": epoch} for i in rows]
            yield mask_batch(masks(samples), rate)

    def unigram_loss(self) -> float:
        """``unigram_loss`` on the evaluation's masked tokens."""
        return unigram_loss((sample["input_ids"] for sample in self.train), self.evaluation, self.tokenizer)

    def fill(self) -> float:
        """Share of tokens in a padded training batch, the mean of 20."""
        batches = list(self.batches(0, 20, (0.15, 0.15)))
        return sum(int(b["attention_mask"].sum()) for b in batches) / sum(b["input_ids"].numel() for b in batches)


class Training:
    """The loop that all runs share: a variant with its optimizer and schedule.

    Args:
        rate: highest learning rate.
    """

    def __init__(self, variant: Variant, recipe: Recipe, rate: float, steps: int):
        self.variant = variant
        self.optimizer = recipe.optimizer(variant.model, rate, decay_matrices_only=recipe.decay_matrices_only)
        scheduler, duration = recipe.scheduler(), Time(steps, "ba")

        def factor(step: int) -> float:
            # Composer moves a schedule on before it counts the batch, so step t trains at the rate of t - 1.
            return scheduler(SimpleNamespace(timestamp=Timestamp(batch=max(0, step - 1)), max_duration=duration))

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
    return (VARIANTS | ABLATIONS)[recipe.variant](shape, setup.device, dtype)


def new_training(text: Text, recipe: Recipe, rate: float, seed: int, steps: int) -> Training:
    """A training whose weights and dropout are drawn from ``seed``."""
    torch.manual_seed(seed)
    return Training(make_variant(text, recipe), recipe, rate, steps)


def curve(training: Training, text: Text, recipe: Recipe, seed: int, steps: int, evaluations: int) -> list[dict]:
    """Train; returns step, tokens, seconds in steps and validation loss, at the start and ``evaluations`` times."""
    at = {round(steps * i / evaluations) for i in range(evaluations + 1)}
    clock = timing.wall_clock(text.setup.device)
    points, tokens, seconds = [], 0, 0.0
    batches = text.batches(seed, steps, recipe.masking)
    for step in range(steps + 1):
        if step in at:
            loss = training.validation_loss(text.evaluation)
            points.append({"step": step, "tokens": tokens, "seconds": seconds, "loss": loss})
        if step < steps:
            batch = next(batches)
            tokens += int(batch["attention_mask"].sum())
            seconds += clock(partial(training.step, batch))
    return points


def time_steps(path: Path, text: Text, recipes: Mapping[str, Recipe], rounds: int) -> dict[str, float]:
    """Seconds per step of each recipe: those of ours times the median ratio to ours, on the same batches, interleaved.

    They are kept in ``path``; recipes that come later are timed with ours and scaled to its first seconds. Each
    variant is also checked, at its own size.
    """
    known: dict[str, float] = json.loads(path.read_text())["seconds"] if path.exists() else {}
    new = [name for name in recipes if name not in known]
    if not new:
        return known
    runs = {}
    for name in dict.fromkeys(["ours", *new]):
        recipe = recipes[name]
        training = new_training(text, recipe, 1e-3, 0, 1000)
        batches, variant = [*text.batches(0, rounds + 2, recipe.masking)], training.variant  # masking is not timed
        check((VARIANTS | ABLATIONS)[recipe.variant], variant.shape, variant.device, variant.dtype, batches[0])
        runs[name] = partial(next, map(training.step, batches))
    seconds = timing.interleaved(runs, rounds, timing.wall_clock(text.setup.device), warmup=2)
    unit = known.get("ours", statistics.median(seconds["ours"]))
    known |= {name: unit * timing.ratios(seconds["ours"], seconds[name])[0] for name in new}
    report.write_json(path, {"seconds": known, "rounds": rounds, "machine": report.machine(text.setup.device)})
    return known


class Deadline:
    """The end of the hours that a command may take."""

    def __init__(self, hours: float):
        self.end = time.perf_counter() + 3600 * hours

    def need(self, minutes: float) -> None:
        """Raise SystemExit if work of so many minutes would not end in time."""
        if time.perf_counter() + 60 * minutes > self.end:
            sys.exit("the hours are spent; finished work is kept, and the same command continues")


class Plan:
    """The runs of a folder. A finished run is kept as a file and is not repeated.

    Args:
        recipes: by name; ``ours`` among them.
        searched: names whose learning rate is searched; the others take that of ours.

    Raises:
        SystemExit: the folder's runs have other settings.
    """

    def __init__(self, folder: Path, setup: Setup, recipes: Mapping[str, Recipe], searched: Iterable[str]):
        self.folder, self.setup, self.recipes = folder, setup, recipes
        self.searched = [name for name in searched if name in recipes]
        record, asked = folder / "settings.json", json.loads(json.dumps(dataclasses.asdict(setup)))
        if record.exists() and json.loads(record.read_text()) != asked:
            sys.exit(f"{folder} holds runs with other settings ({record}); give the same settings or another --folder")
        report.write_json(record, asked)

    def path(self, name: str, seed: int, rate: float | None = None) -> Path:
        """The file of a run; ``rate``: of the search for a learning rate, whose seed is 0."""
        file = f"{name}-seed{seed}.json" if rate is None else f"tuning-{name}-lr{rate:g}.json"
        return self.folder / "curves" / file

    def losses(self, name: str) -> dict[float, float]:
        """Final losses of the finished runs of a search, by learning rate."""
        paths = {rate: self.path(name, 0, rate) for rate in self.setup.learning_rates}
        return {rate: final(json.loads(path.read_text())) for rate, path in paths.items() if path.exists()}

    def curves(self, name: str) -> list[dict[str, Any]]:
        """Finished runs."""
        paths = [self.path(name, seed) for seed in range(1, self.setup.seeds + 1)]
        return [json.loads(path.read_text()) for path in paths if path.exists()]

    def left(self) -> list[tuple[str, int, float | None]]:
        """Runs to do: searches first, then seed by seed, so that all variants progress alike."""
        runs: list[tuple[str, int, float | None]] = [
            (name, 0, rate) for name in self.searched for rate in self.setup.learning_rates
        ]
        runs += [(name, seed, None) for seed in range(1, self.setup.seeds + 1) for name in self.recipes]
        return [run for run in runs if not self.path(*run).exists()]

    def say_left(self) -> None:
        left = self.left()
        hours = OVERHEAD * self.setup.minutes * sum(TUNING if rate else 1 for _, _, rate in left) / 60
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
        setup = self.setup
        seconds = time_steps(self.folder / "steps.json", text, self.recipes, rounds)
        for name, seed, searching in self.left():
            minutes = setup.minutes * (TUNING if searching else 1)
            deadline.need(OVERHEAD * minutes)
            losses, recipe = self.losses(name if name in self.searched else "ours"), self.recipes[name]
            rate = searching or min(losses, key=losses.__getitem__)
            steps = max(8, setup.evaluations, round(60 * minutes / seconds[name]))
            training = new_training(text, recipe, rate, seed, steps)
            points = curve(training, text, recipe, seed, steps, 1 if searching else setup.evaluations)
            found = {"arm": name, "rate": rate, "seed": seed, "steps": steps, "step_seconds": seconds[name]}
            found |= {"samples": len(text.train), "machine": report.machine(setup.device), "points": points}
            found["parameters"] = sum(p.numel() for p in training.variant.model.parameters())
            if not searching:
                keep(name, seed, training.variant)
            report.write_json(self.path(name, seed, searching), found)
            print(
                f"{name} seed {seed}, learning rate {rate:g}: {steps} steps, {points[-1]['tokens']:,} tokens, "
                f"validation loss {final(found):.4f}, {points[-1]['seconds'] / 60:.1f} min in steps, "
                f"{steps * seconds[name] / 60:.1f} by its clock"
            )
            self.say_left()


def final(found: dict[str, Any]) -> float:
    """The last validation loss of a run."""
    return found["points"][-1]["loss"]


def table_of_runs(setup: Setup, curves: dict[str, list[dict[str, Any]]]) -> str:
    """Learning rate, size, speed and final loss of each variant."""
    rates, rows = setup.learning_rates, []
    for name, runs in curves.items():
        losses, first = [final(run) for run in runs], runs[0]
        row = {"name": name, "masked": RECIPES[name].masking[0], "mean": statistics.mean(losses)}
        row |= {"low": min(losses), "high": max(losses)}
        row["edge"] = " (edge of the grid)" if len(rates) > 2 and first["rate"] in (min(rates), max(rates)) else ""
        row["epochs"] = first["steps"] * setup.batch / first["samples"]
        rows.append(first | row)
    return report.table(
        "variant | masked | learning rate | M parameters | ms per step | steps | epochs | validation loss at 15%",
        "{name} | {masked:.0%} | {rate:g}{edge} | {parameters:M.2f} | {step_seconds:m.1f} | {steps:,} | {epochs:.2f} "
        "| {mean:.4f} ({low:.4f} to {high:.4f})",
        rows,
    )


def bootstrap(draw: Callable[[np.random.Generator], float], draws: int = 2000) -> dict[str, float]:
    """95% interval, low and high, of what ``draw`` computes from a sample drawn with replacement."""
    rng = np.random.default_rng(0)
    values = sorted(draw(rng) for _ in range(draws))
    return {"low": float(values[round(0.025 * (draws - 1))]), "high": float(values[round(0.975 * (draws - 1))])}


def options(description: str | None, minutes: float, folder: str) -> argparse.ArgumentParser:
    """The options that all benchmarks of learning have, with their defaults."""
    parser = report.parser(description)
    parser.add_argument("--minutes", type=float, default=minutes, help="training time of a run")
    parser.add_argument("--hours", type=float, default=math.inf, help="start nothing that would not end in this time")
    parser.add_argument("--rounds", type=int, default=40, help="steps that each variant is timed for")
    report.add_device(parser)
    parser.add_argument("--folder", type=Path, default=Path(folder), help="of models and runs")
    parser.add_argument("--out", type=Path, default=Path(folder) / "report", help="folder of the report")
    parser.add_argument("--toy", action="store_true", help="tiny; its figures mean nothing")
    return parser


def publish(args: argparse.Namespace, argv: list[str], name: str, title: str, page: list[str], record: dict) -> None:
    """Write NAME-DEVICE.json and .md to the folder of the report, and print the page's paragraphs."""
    about, command = report.machine(args.device), f"python -m benchmarks.learning.{name} {' '.join(argv)}"
    made = f"{report.described(about)}. `{command}`"
    record = record | {"machine": about, "command": command}
    path = args.out / f"{name}-{args.device}.json"
    report.write_page(path, title, f"benchmarks.learning.{name}", [made, *page], record)
    print("\n\n".join(page))
