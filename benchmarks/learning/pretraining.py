"""Small pretraining runs of any arm on real text, all from scratch and by the same recipe, for benchmarks of quality.

All arms share what is not theirs: batches of the same documents in the same order for the same seed, AdamW (fused,
betas 0.9 and 0.98, eps 1e-6, decay 0.02), a warmup of 6% and a linear fall to 2%. Their clock is steps times the time
of a step, which is measured before, interleaved; so other programs do not count, nor do evaluation, loading, masking.
"""

import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from benchmarks import report
from benchmarks.learning.ablations import ABLATIONS
from benchmarks.variants import ARMS, Arm, Batch, Shape, check
from src.convert.samples import Tokens
from src.convert.stats import Stats
from src.data.masking import MaskingCollator, Sample, mask_batch
from src.data.unigram import unigram_loss
from src.train.models import padded_vocab_size

WARMUP, LAST = 0.06, 0.02
TUNING = 0.25
"""Share of a run's time that a run of the search for its learning rate has."""
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, fused=True),
    "nadamw": partial(torch.optim.NAdam, decoupled_weight_decay=True),
}
"""torch's; Nesterov's momentum in the second is Dozat's (2016)."""


@dataclass(frozen=True)
class Recipe:
    """An arm and how it is trained."""

    arm: str = "mosaic_bert"
    """A name of ARMS or ABLATIONS."""
    masking: tuple[float, float] = (0.3, 0.3)
    """Share of tokens masked at the first and at the last step, linear between."""
    dropout: float = 0.1
    """Of hidden states; ModernBERT has none."""
    decay_all: bool = True
    """Weight decay on biases and norms too."""
    stable: float = 0.0
    """Share of the run at the highest learning rate before it falls."""
    optimizer: str = "adamw"
    """A name of OPTIMIZERS."""


RECIPES: dict[str, Recipe] = {
    "ours": Recipe(),
    "hf_bert": Recipe("hf_bert", (0.15, 0.15)),
    "hf_strong": Recipe("hf_strong", (0.15, 0.15)),
    "modernbert": Recipe("modernbert"),
}


@dataclass(frozen=True)
class Setup:
    """What all runs of a benchmark share."""

    batch: int
    """Sequences."""
    vocabulary: int
    """Word pieces of the tokenizer."""
    shape: Shape
    """Its vocabulary is the tokenizer's, its ``length`` that of samples."""
    documents: int | None = None
    """At most so many samples to train on, and to hold out. None: all."""
    device: str = "cpu"


def keep_settings(folder: Path, settings: Setup) -> None:
    """Write down what the runs of a folder share.

    Raises:
        SystemExit: its runs have other settings.
    """
    record, asked = folder / "settings.json", json.loads(json.dumps(dataclasses.asdict(settings)))
    if record.exists() and json.loads(record.read_text()) != asked:
        sys.exit(f"{folder} holds runs with other settings ({record}); give them again, or another --folder")
    report.write_json(record, asked)


class Text:
    """Documents as tokens, and batches of them.

    Args:
        train, held_out: documents.
        pack: ``truncate`` takes beginnings, ``chunk`` all of a document (src/convert/unit.py).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        train: Iterable[str],
        held_out: Iterable[str],
        setup: Setup,
        pack: str = "truncate",
    ):
        self.tokenizer, self.setup, self.pack = tokenizer, setup, pack
        self.train = list(itertools.islice(self._samples(train), setup.documents))
        self.held_out = list(itertools.islice(self._samples(held_out), setup.documents))
        self.evaluation = list(self._batches(self.held_out, MaskingCollator(tokenizer, 0.15, seed=0)))

    def _samples(self, texts: Iterable[str]) -> Iterator[Sample]:
        tokens = Tokens("", self.tokenizer, self.setup.shape.length, self.pack)
        for number, ids in enumerate(tokens.samples(iter(texts), Stats())):
            yield {"input_ids": ids, "sample_id": number, "epoch": 0}

    def _batches(self, samples: list[Sample], masks: MaskingCollator) -> Iterator[Batch]:
        for first in range(0, len(samples), self.setup.batch):
            yield masks(samples[first : first + self.setup.batch])

    def batches(self, seed: int, steps: int, masking: tuple[float, float]) -> Iterator[Batch]:
        """``steps`` batches to train on: samples in another order each epoch, masked anew."""
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

    def frequency_loss(self) -> float:
        """``unigram_loss`` on the evaluation's masked tokens."""
        return unigram_loss((sample["input_ids"] for sample in self.train), self.evaluation, self.tokenizer)

    def real_share(self) -> float:
        """Of a padded training batch, on average."""
        batches = list(self.batches(0, 20, (0.15, 0.15)))
        return sum(int(b["attention_mask"].sum()) for b in batches) / sum(b["input_ids"].numel() for b in batches)


class Run:
    """An arm in training.

    Args:
        rate: highest learning rate.
        seed: of weights, order, masks and dropout.
    """

    def __init__(self, text: Text, recipe: Recipe, rate: float, seed: int, steps: int):
        torch.manual_seed(seed)
        self.text, self.recipe, self.seed, self.steps = text, recipe, seed, steps
        self.arm = make_arm(text, recipe)
        matrices = [p for p in self.arm.model.parameters() if recipe.decay_all or p.dim() > 1]
        others = [p for p in self.arm.model.parameters() if not recipe.decay_all and p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = OPTIMIZERS[recipe.optimizer](
            [group for group in groups if group["params"]], lr=rate, betas=(0.9, 0.98), eps=1e-6
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.factor)

    def factor(self, step: int) -> float:
        """Of the learning rate."""
        warmup = max(1, round(WARMUP * self.steps))
        falls_from = max(warmup, round(self.recipe.stable * self.steps))
        fallen = max(0.0, (step - falls_from) / max(1, self.steps - falls_from))
        return min((step + 1) / warmup, 1 - (1 - LAST) * fallen)

    def step(self, batch: Batch) -> None:
        self.arm.backward(batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

    def held_out_loss(self) -> float:
        """Nats a masked token."""
        self.arm.model.eval()
        total = masked = 0.0
        with torch.no_grad():
            for batch in self.text.evaluation:
                total += sum(self.arm.run(part).item() for part in self.arm.parts(batch))
                masked += int((batch["labels"] >= 0).sum())
        self.arm.model.train()
        return total / masked

    def curve(self, evaluations: int) -> list[dict[str, float]]:
        """Train; step, real tokens seen, seconds really spent in steps, and held-out loss, before and so often."""
        at = {round(self.steps * i / evaluations) for i in range(evaluations + 1)}
        points, tokens, seconds = [], 0, 0.0
        batches = self.text.batches(self.seed, self.steps, self.recipe.masking)
        for step in range(self.steps + 1):
            if step in at:
                points.append({"step": step, "tokens": tokens, "seconds": seconds, "loss": self.held_out_loss()})
            if step < self.steps:
                batch = next(batches)
                tokens += int(batch["attention_mask"].sum())
                seconds += timed(self, batch)
        return points


def make_arm(text: Text, recipe: Recipe) -> Arm:
    """With fresh weights, of the size that the text's setup asks for."""
    setup = text.setup
    shape = replace(setup.shape, vocabulary=padded_vocab_size(text.tokenizer), dropout=recipe.dropout)
    dtype = torch.bfloat16 if setup.device == "cuda" else torch.float32
    return (ARMS | ABLATIONS)[recipe.arm](shape, setup.device, dtype)


def timed(run: Run, batch: Batch) -> float:
    """Seconds of a step."""
    started = time.perf_counter()
    run.step(batch)
    if run.arm.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def time_steps(path: Path, text: Text, recipes: Mapping[str, Recipe], rounds: int) -> dict[str, float]:
    """Seconds a step of each arm: those of ours times the median ratio to ours, on the same batches, interleaved.

    Kept in ``path``; arms that come later are timed beside ours and take its first seconds as their unit. Each is
    also checked, at its own size.

    Args:
        recipes: by name; ``ours`` among them.
    """
    known: dict[str, float] = json.loads(path.read_text())["seconds"] if path.exists() else {}
    new = [name for name in recipes if name not in known]
    if not new:
        return known
    runs = {name: Run(text, recipes[name], 1e-3, 0, 1000) for name in ["ours", *(n for n in new if n != "ours")]}
    for name, run in runs.items():
        arm = run.arm
        batch = next(text.batches(0, 1, recipes[name].masking))
        check((ARMS | ABLATIONS)[recipes[name].arm], arm.shape, arm.device, arm.dtype, batch)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    batches = {name: text.batches(0, rounds + 2, recipes[name].masking) for name in runs}
    for turn in range(rounds + 2):
        for name, run in runs.items():
            spent = timed(run, next(batches[name]))
            if turn >= 2:  # the first two warm up
                seconds[name].append(spent)
    unit = known.get("ours", statistics.median(seconds["ours"]))
    for name in new:
        ratios = [b / a for a, b in zip(seconds["ours"], seconds[name], strict=True)]
        known[name] = unit * statistics.median(ratios)
    report.write_json(path, {"seconds": known, "rounds": rounds, "machine": report.machine(text.setup.device)})
    return known
