"""Time to a given quality: MosaicBERT, changes of its recipe, and its baselines, trained from scratch on the same text.

    python -m benchmarks.learning.time_to_loss changes [--hours 3] [--only …] [--out FOLDER]
    python -m benchmarks.learning.time_to_loss models [--hours 3] [--only …] [--out FOLDER]
    python -m benchmarks.learning.time_to_loss changes --toy      # seconds: only that all of it runs

``changes``: ours (mosaic_bert.yaml) with one change of its recipe, or without one of its parts; 0.6 of a pass over the
text.
``models``: ours, what won together (mosaic_bert_fast.yaml) and the baselines; three passes and more.

Text (``reviews_and_leads``): film reviews of IMDb and lead paragraphs of Wikipedia, 9 million tokens of a tokenizer of
4,096 word pieces trained on them, cut into samples of at most 128. One document in ten is held out; 400 samples of them
are evaluated on, masked at 15% by one seed. Batches of 32 samples. Recipes share what they do not change
(benchmarks/learning/pretraining.py), and train for the same time.

The learning rate of each recipe is searched with equal effort: runs of a quarter of the time, at LEARNING_RATES and
then beyond them until the best has a worse one on both sides. Then it trains with 3 seeds (of weights, order, masks,
dropout). Time is counted by the recipe's clock: seconds per step measured before, interleaved with ours.

A finished run is kept in ``--folder`` and not repeated, so the hours can be split, also among commands that run at the
same time. The report uses what is finished: the time to reach given losses, on curves smoothed over three evaluations,
averaged over seeds, and interpolated; a picture; and the last line

    changes NAME=… …            time of a change to the lowest loss that it and ours reach, over that of ours
    models NAME=… …             time of a whole run of fast to the final loss of another over the other's time

inf: not reached. 95% intervals are by a bootstrap over seeds.
"""

import argparse
import dataclasses
import math
import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.learning import pretraining
from benchmarks.learning.ablations import ABLATIONS
from benchmarks.learning.pretraining import RECIPES, Deadline, Phase, Plan, Recipe, Setup, Text, locked
from benchmarks.texts import film_reviews, make_tokenizer, part_of, wikipedia_topics
from benchmarks.variants import Shape, Variant
from src.data.tokenizer import load_tokenizer

SHORT_FIRST = (Phase(0.25, 32), Phase(0.25, 64), Phase(0.5))
BATCH_WARMUP = (Phase(0.1, batch=0.25), Phase(0.2, batch=0.5), Phase(0.7))
CHANGED: dict[str, Recipe] = {
    "muon": Recipe(optimizer="muon"),
    "soap": Recipe(optimizer="soap"),
    "dropout_0": Recipe(dropout=0.0),
    "stable_to_0": Recipe(t_decay="0.3dur", last=0.0),
    "stable_sqrt": Recipe(t_decay="0.3dur", last=0.0, decay="sqrt"),
    "short_first": Recipe(phases=SHORT_FIRST),
    "batch_warmup": Recipe(phases=BATCH_WARMUP),
    "masking_20": Recipe(masking=(0.2, 0.2)),
    "masking_40": Recipe(masking=(0.4, 0.4)),
    "masking_falls": Recipe(masking=(0.4, 0.15)),
    "embeddings_3x": Recipe(optimizer="adamw_embeddings"),
    "decay_matrices": Recipe(options={"decay_matrices_only": True}),
    "scaled_init": Recipe("scaled_init"),
    "z_loss": Recipe("z_loss"),
}
"""One change of ours each."""
FAST = Recipe(dropout=0.0, optimizer="muon_half", t_decay="0.3dur", last=0.0)
"""What won together: mosaic_bert_fast.yaml."""
TOGETHER: dict[str, Recipe] = {
    "muon_half_together": FAST,
    "muon_together": replace(FAST, optimizer="muon"),
    "soap_together": replace(FAST, optimizer="soap"),
}
"""Several changes at once."""
SHORTER = {"fast_half": 0.5, "fast_quarter": 0.25, "fast_eighth": 0.125}
"""Whole runs of the fast recipe in less time."""
ABLATED = {name: Recipe(name) for name in ABLATIONS} | {"masking_15": Recipe(masking=(0.15, 0.15))}
"""Ours without one of its parts."""
MODELS = {"ours": RECIPES["ours"], "fast": FAST}
MODELS |= {name: replace(FAST, time=time, rate_of="fast") for name, time in SHORTER.items()} | RECIPES

FAMILY = ("fast", *SHORTER)

LEARNING_RATES = (1e-3, 2e-3, 4e-3)
CHANGES_SETUP = Setup(32, 4096, Shape(4, 64, 4, 192, 0, length=128), 4, 3, LEARNING_RATES, evaluations=12)
MODELS_SETUP = replace(CHANGES_SETUP, minutes=22, evaluations=16)
SETTINGS: dict[str, tuple[Setup, dict[str, Recipe]]] = {
    "changes": (CHANGES_SETUP, {"ours": RECIPES["ours"]} | CHANGED | TOGETHER | ABLATED),
    "models": (MODELS_SETUP, MODELS),
}
TOY = Setup(8, 1000, Shape(2, 32, 2, 64, 0, length=32), 0.004, 2, (1e-3, 4e-3), documents=64, evaluations=3)
EVALUATED = 400
"""Samples of an evaluation."""
Curves = list[dict[str, Any]]
"""The runs of a recipe, one for each seed."""


def reviews_and_leads(folder: Path, setup: Setup) -> Text:
    """IMDb's reviews and Wikipedia's leads, and a tokenizer trained on them; both are kept in the folder.

    Held out: leads whose ``part_of`` is validation or test (quality.py's tasks use them), and reviews of validation.
    """
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for row in wikipedia_topics():
        parts[part_of(row.text)].append(row.text)
    for row in film_reviews("imdb"):
        parts["validation" if part_of(row.text) == "validation" else "train"].append(row.text)
    for texts in parts.values():
        random.Random(17).shuffle(texts)
    if setup.documents is not None:
        parts = {name: texts[: setup.documents] for name, texts in parts.items()}
    folder = folder / f"text-{setup.vocabulary}"
    with locked(folder / "tokenizer", wait=True):
        tokenizer = load_tokenizer(make_tokenizer(folder, parts["train"], setup.vocabulary))
        return Text(folder, tokenizer, parts["train"], parts["validation"], setup, EVALUATED)


def mean_curve(curves: Curves) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of the evaluations, and the loss: mean over the seeds of a recipe, smoothed, never rising."""
    losses = np.mean([[point["loss"] for point in curve["points"]] for curve in curves], axis=0)
    smooth = losses.copy()
    smooth[1:-1] = (losses[:-2] + losses[1:-1] + losses[2:]) / 3
    return positions(curves, "time"), np.minimum.accumulate(smooth)


def positions(curves: Curves, axis: str) -> np.ndarray:
    """Time (seconds by the recipe's clock) or tokens of the evaluations: mean over the seeds of a recipe."""
    field = {"time": "clock", "tokens": "tokens"}[axis]
    return np.mean([[point[field] for point in curve["points"]] for curve in curves], axis=0)


def time_to(curves: Curves, loss: float) -> float:
    """Seconds until the mean curve reaches a loss, interpolated; inf: it does not."""
    x, y = mean_curve(curves)
    reached = np.flatnonzero(y <= loss)
    if not len(reached):
        return math.inf
    i = reached[0]
    before = max(0, i - 1)
    return float(np.interp(-loss, [-y[before], -y[i]], [x[before], x[i]]))


def ratio(ours: Curves, baseline: Curves) -> float:
    """Time of ours to the baseline's final loss over the baseline's whole time."""
    x, y = mean_curve(baseline)
    return time_to(ours, float(y[-1])) / float(x[-1])


def ratio_of_runs(fast: list[Curves], baseline: Curves) -> float:
    """Time of a whole run of a recipe that ends at the baseline's final loss, over the baseline's whole time.

    Args:
        fast: whole runs of a recipe in different times. Between them the final loss is interpolated over the logarithm
            of the time. If the shortest ends below the baseline's loss, its time is an upper bound.
    """
    loss = float(np.mean([curve["points"][-1]["loss"] for curve in baseline]))
    ends = sorted(
        (float(positions(runs, "time")[-1]), float(np.mean([r["points"][-1]["loss"] for r in runs]))) for runs in fast
    )
    times, losses = np.array(ends).T
    if loss < losses.min():
        return math.inf
    falling = np.minimum.accumulate(losses)
    reached = np.interp(-loss, -falling, np.log(times))
    return float(np.exp(reached) / positions(baseline, "time")[-1])


def worth(ours: Curves, changed: Curves) -> float:
    """Time of a changed recipe to the lowest loss that both reach, over that of ours; above 1 the change costs time."""
    loss = common_loss(ours, changed)
    return time_to(changed, loss) / time_to(ours, loss)


def common_loss(*recipes: Curves) -> float:
    """The lowest loss that all reach."""
    return max(float(mean_curve(curves)[1][-1]) for curves in recipes)


def interval(
    measure: Callable[[Curves, Curves], float], ours: Curves, other: Curves, paired: bool = False
) -> dict[str, float]:
    """95% interval of ``ratio`` or ``worth`` over seeds.

    Args:
        paired: draw the same seeds for both: one seed gives changes of one model the same weights, order and masks.
    """

    def draw(rng: np.random.Generator) -> float:
        drawn = rng.integers(len(ours), size=len(ours))
        drawn_other = drawn if paired else rng.integers(len(other), size=len(other))
        return measure([ours[i] for i in drawn], [other[i] for i in drawn_other])

    return pretraining.bootstrap(draw)


def interval_of_runs(fast: list[Curves], baseline: Curves) -> dict[str, float]:
    """95% interval of ``ratio_of_runs`` over seeds, drawn for the runs of each time and for the baseline."""

    def draw(rng: np.random.Generator) -> float:
        drawn = [[runs[i] for i in rng.integers(len(runs), size=len(runs))] for runs in (*fast, baseline)]
        return ratio_of_runs(drawn[:-1], drawn[-1])

    return pretraining.bootstrap(draw)


def levels(curves: dict[str, Curves]) -> list[float]:
    """Losses of the table: the final ones, and quarters from the lowest that all reach upwards."""
    finals = {math.ceil(1000 * mean_curve(c)[1][-1]) / 1000 for c in curves.values()}
    quarters = {math.ceil(4 * max(finals)) / 4 + 0.25 * i for i in range(4)}
    return sorted(finals | quarters, reverse=True)


def minutes_to(curves: Curves, loss: float) -> str:
    """Minutes to a loss, with the range over seeds."""
    each = [time_to([curve], loss) / 60 for curve in curves]
    mean = time_to(curves, loss) / 60
    return "not reached" if mean == math.inf else f"{mean:.2f} ({min(each):.2f} to {max(each):.2f})"


def draw(path: Path, curves: dict[str, Curves]) -> None:
    """Loss over time and over tokens: the mean of the seeds as a line, their range as a band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    axes = (("time", 60, "minutes of training"), ("tokens", 1e6, "million tokens"))
    for panel, (axis, unit, label) in zip(panels, axes, strict=True):
        for name, runs in curves.items():
            losses, x = np.array([[p["loss"] for p in run["points"]] for run in runs]), positions(runs, axis) / unit
            (line,) = panel.plot(x, losses.mean(axis=0), label=name)
            panel.fill_between(x, losses.min(axis=0), losses.max(axis=0), color=line.get_color(), alpha=0.25)
        panel.set(xlabel=label)
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="validation loss at 15% masking (nats)")
    panels[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def effect(ours: Curves, runs: Curves) -> dict[str, float]:
    """The effect of a change of ours."""
    return {
        "rate": runs[0]["rate"],
        "final": float(mean_curve(runs)[1][-1]),
        "loss": common_loss(ours, runs),
        "worth": worth(ours, runs),
        **interval(worth, ours, runs, paired=True),
    }


def searches(plan: Plan, names: Iterable[str]) -> str:
    """Losses by learning rate."""
    losses = {name: plan.losses(name) for name in names}
    rates = sorted({rate for each in losses.values() for rate in each})
    titles = " | ".join(["recipe", *(f"{rate:g}" for rate in rates)])
    row = " | ".join(["{name}", *(f"{{at{i}}}" for i in range(len(rates)))])
    cells = [
        {f"at{i}": f"{each[rate]:.4f}" for i, rate in enumerate(rates) if rate in each} for each in losses.values()
    ]
    return report.table(titles, row, [{"name": name, **cell} for name, cell in zip(losses, cells, strict=True)])


def report_finished(args: argparse.Namespace, argv: list[str], plan: Plan, text: Text) -> str:
    """Write JSON, Markdown and picture of what is finished; returns the last line."""
    setup, name = plan.setup, args.setting
    names = sorted(plan.recipes, key=lambda name: name != "ours")  # ours first
    curves = {name: runs for name in names if len(runs := plan.curves(name)) == setup.seeds}
    lines = [
        f"{setup.minutes:g} minutes of training per run, {setup.seeds} seeds; {text.tokens() / 1e6:.2f} million tokens "
        f"to train on, {len(text.validation)} samples to validate on; {text.fill():.0%} of a padded batch are tokens. "
        f"{setup.shape.layers} layers of {setup.shape.hidden}, {setup.shape.heads} heads, gated width "
        f"{setup.shape.width}. Unigram baseline: {text.unigram_loss():.3f}.",
        pretraining.table_of_runs(setup, curves, plan.recipes),
        "Validation loss by learning rate, after a quarter of the time:",
        searches(plan, curves),
    ]
    found: dict[str, dict[str, float]] = {}
    if name == "changes" and "ours" in curves:
        found = {each: effect(curves["ours"], runs) for each, runs in curves.items() if each != "ours"}
        titles = "change | learning rate | final loss | common loss | time to it / ours (95%, seeds)"
        row = "{name} | {rate:g} | {final:.4f} | {loss:.4f} | {worth:.2f} ({low:.2f} to {high:.2f})"
        for title, group in (
            ("Changed, one at a time", CHANGED),
            ("Together", TOGETHER),
            ("Taken away, one at a time", ABLATED),
        ):
            rows = [{"name": each, **change} for each, change in found.items() if each in group]
            lines += [f"{title}:", report.table(titles, row, rows)] if rows else []
    if name == "models" and curves:
        lines += ["Minutes to a validation loss, mean curve (range over seeds):"]
        whole = {each: runs for each, runs in curves.items() if each not in SHORTER} or curves
        rows = [
            {"loss": loss} | {each: minutes_to(runs, loss) for each, runs in whole.items()} for loss in levels(whole)
        ]
        row = " | ".join(["{loss:.3f}", *(f"{{{each}}}" for each in whole)])
        lines += [report.table(" | ".join(["loss", *whole]), row, rows)]
        if all(each in curves for each in FAMILY):
            family = [curves[each] for each in FAMILY]
            for each in (each for each in curves if each not in FAMILY):
                found[each] = {"worth": ratio_of_runs(family, curves[each]), **interval_of_runs(family, curves[each])}
                found[each]["along"] = ratio(curves["fast"], curves[each])
            lines += [
                "Time of fast to the final loss of another over the other's whole time: of a whole run of fast "
                "(between runs of an eighth of the time and more), and along the curve of its longest run:"
            ]
            titles = "other | whole run | 95% interval (bootstrap over seeds) | along the curve"
            row = "{name} | {worth:.3f} | {low:.3f} to {high:.3f} | {along:.3f}"
            lines += [report.table(titles, row, [{"name": each, **measured} for each, measured in found.items()])]
    if curves:
        lines += [f"![loss](time_to_loss_{name}-{setup.device}.png)"]
        draw(args.out / f"time_to_loss_{name}-{setup.device}.png", curves)
    record = {"settings": dataclasses.asdict(setup), "found": found, "curves": curves}
    record |= {"recipes": {each: dataclasses.asdict(plan.recipes[each]) for each in curves}}
    record |= {"searched": {each: plan.losses(each) for each in curves}}
    pretraining.publish(args, argv, "time_to_loss", f"time_to_loss_{name}", TITLES[name], lines, record)
    fields = [f"{each}={measured['worth']:.3f}" for each, measured in found.items()]
    fields += [f"runs_left={len(plan.left())}"] if plan.left() else []
    return " ".join([name, *fields])


TITLES = {"changes": "Changes of the recipe", "models": "Time to a given quality"}


def main(argv: list[str]) -> None:
    """Run what is left, and report."""
    parser = pretraining.options(__doc__, "runs/learning")
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=sorted({n for _, each in SETTINGS.values() for n in each}),
        help="these, in this order, and ours",
    )
    args = parser.parse_args(argv)
    settings, recipes = SETTINGS[args.setting]
    if args.toy:
        settings, args.rounds = TOY, 2
    settings = replace(settings, device=args.device)
    kept = {name: recipes[name] for name in dict.fromkeys([*(args.only or recipes), "ours"])}
    text = reviews_and_leads(args.folder, settings)
    plan = Plan(args.folder / args.setting, settings, kept)
    print(f"# {report.described(report.machine(args.device))}")
    plan.say_left()

    def save(name: str, seed: int, variant: Variant) -> None:
        pretraining.save_model(plan.folder, name, seed, variant, text)

    try:
        plan.run(text, args.rounds, Deadline(args.hours), save if args.setting == "models" else lambda *_: None)
    except SystemExit as stopped:
        print(stopped)
    print(report_finished(args, argv, plan, text))


if __name__ == "__main__":
    main(sys.argv[1:])
