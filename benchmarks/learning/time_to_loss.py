"""Time to a given quality: MosaicBERT and its baselines, each trained from scratch on the same real text.

    python -m benchmarks.learning.time_to_loss [--minutes 5] [--hours 3] [--arms …] [--ablate] [--beyond] [--out FOLDER]
    python -m benchmarks.learning.time_to_loss --toy      # seconds: only that all of it runs

Text: 10,033 lead paragraphs of Wikipedia, their first 128 tokens, by a tokenizer of 2,560 word pieces trained on them;
one document in twenty is held out, as in the quickstart. All are evaluated on half of these, masked at 15% by one seed.
Size: 6 layers of 128; with so few word pieces the head has the share of the work that it has at base. Variants
(benchmarks/variants.py) and their masking rates:

    ours 30%    hf_bert 15%    hf_strong 15% (masked-token head, grouped by length)    modernbert 30% (equal parameters)

All share the rest (benchmarks/learning/pretraining.py), with batches of 8 documents, and train for ``--minutes``. The
learning rate of each is the best of LEARNING_RATES by validation loss after a quarter of the time. Then each trains
with 3 seeds (of weights, order, masks, dropout). --ablate takes ours apart (benchmarks/learning/ablations.py, and 15%
masking), --beyond changes its recipe (BEYOND): one change at a time, and what won together, at the learning rate of
ours. For no_alibi and no_glu it is searched again.

A finished run is kept in ``--folder`` and not repeated, so the hours can be split. The report uses what is finished:
the time to reach given losses, on curves smoothed over three evaluations, averaged over seeds, and interpolated; a
picture; and the last line

    time_to_loss ratio=… ratio_low=… ratio_high=… ratio_strong=…

the time that ours needs to reach hf_bert's final loss over hf_bert's whole time (95% interval by a bootstrap over
seeds), and the same for hf_strong. inf: not reached.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.learning import pretraining
from benchmarks.learning.ablations import ABLATIONS
from benchmarks.learning.pretraining import RECIPES, Deadline, Plan, Recipe, Setup, Text
from benchmarks.texts import make_tokenizer
from benchmarks.variants import Shape
from scripts import quickstart
from src.convert.sources import TextSource, iter_documents
from src.data.tokenizer import load_tokenizer

LEARNING_RATES = (5e-4, 1e-3, 2e-3, 4e-3)
BASELINES = ("hf_bert", "hf_strong", "modernbert")
ABLATED: dict[str, Recipe] = {name: Recipe(name) for name in ABLATIONS} | {"mask_15": Recipe(masking=(0.15, 0.15))}
BEYOND: dict[str, Recipe] = {
    "dropout_0": Recipe(dropout=0.0),
    "masking_falls": Recipe(masking=(0.3, 0.15)),
    "no_decay_groups": Recipe(decay_matrices_only=True),
    "warmup_stable_decay": Recipe(t_decay="0.3dur"),
    "nadamw": Recipe(optimizer=pretraining.nadamw),
    "fast": Recipe(dropout=0.0, t_decay="0.3dur"),
}
"""The last is what won of these, together: yamls/mosaic_bert_fast.yaml."""
ALL = RECIPES | ABLATED | BEYOND
SEARCHED = (*RECIPES, "no_alibi", "no_glu")
"""Names whose learning rate is searched."""
CHANGES = {"Taken away": ABLATED, "Changed": BEYOND}

SETTINGS = Setup(
    batch=8,
    vocabulary=2560,  # as many as 6 x 128 is of 12 x 768, of base's 30,528
    shape=Shape(6, 128, 8, 512, 0, length=128),
    minutes=5,
    seeds=3,
    learning_rates=LEARNING_RATES,
    evaluations=15,
)
TOY = Setup(8, 1000, Shape(2, 32, 2, 64, 0, length=32), 0.01, 2, (1e-3, 4e-3), documents=64, evaluations=3)
Curves = list[dict[str, Any]]
"""The runs of a recipe, one for each seed."""


def wikipedia(folder: Path, settings: Setup) -> Text:
    """The quickstart's documents, and a tokenizer trained on them; both are kept in the folder."""
    if not (folder / "text").exists():
        quickstart.write_text(folder / "partial", None)
        (folder / "partial" / "text").rename(folder / "text")
    paths = (str(folder / f"text/c4-{split}.00000-of-00001.json.gz") for split in ("train", "validation"))
    train, validation = ([document["text"] for document in iter_documents(TextSource((path,)))] for path in paths)
    tokenizer = load_tokenizer(make_tokenizer(folder, train, settings.vocabulary))
    return Text(tokenizer, train, validation[::2], setup=settings)  # half: it is evaluated often


def mean_curve(curves: Curves) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of the evaluations, and the loss: mean over the seeds of a recipe, smoothed, never rising."""
    losses = np.mean([[point["loss"] for point in curve["points"]] for curve in curves], axis=0)
    smooth = losses.copy()
    smooth[1:-1] = (losses[:-2] + losses[1:-1] + losses[2:]) / 3
    return positions(curves, "time"), np.minimum.accumulate(smooth)


def positions(curves: Curves, axis: str) -> np.ndarray:
    """Time (seconds by the recipe's clock) or tokens of the evaluations: mean over the seeds of a recipe."""
    field = {"time": "step", "tokens": "tokens"}[axis]
    x = np.mean([[point[field] for point in curve["points"]] for curve in curves], axis=0)
    return x * curves[0]["step_seconds"] if axis == "time" else x


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
        **{name: runs[0][name] for name in ("rate", "step_seconds")},
        "final": float(mean_curve(runs)[1][-1]),
        "loss": common_loss(ours, runs),
        "worth": worth(ours, runs),
        **interval(worth, ours, runs, paired=True),
    }


def report_finished(args: argparse.Namespace, argv: list[str], plan: Plan, text: Text) -> str:
    """Write JSON, Markdown and picture of what is finished; returns the last line."""
    setup = plan.setup
    curves = {name: runs for name in ALL if len(runs := plan.curves(name)) == setup.seeds}
    main = {name: runs for name, runs in curves.items() if name in RECIPES}
    searched = {name: plan.losses(name) for name in SEARCHED if name in curves}
    lines = [
        f"{setup.minutes:g} minutes of training per run, {setup.seeds} seeds; {len(text.train):,} documents to train "
        f"on, {len(text.validation):,} to validate on; {text.fill():.0%} of a padded batch are tokens. Unigram "
        f"baseline: {text.unigram_loss():.3f}.",
    ]
    if main:
        lines += [
            pretraining.table_of_runs(setup, main),
            "Validation loss by learning rate, after a quarter of the time:",
        ]
        names, row = " | ".join(["variant", *(f"{rate:g}" for rate in setup.learning_rates)]), "{name}"
        row += "".join(f" | {{losses[{i}]:.4f}}" for i in range(len(setup.learning_rates)))
        rows = [{"name": name, "losses": [*losses.values()]} for name, losses in searched.items()]
        lines += [report.table(names, row, rows)]
        lines += ["Minutes to a validation loss, mean curve (range over seeds):"]
        rows = [{"loss": loss} | {name: minutes_to(runs, loss) for name, runs in main.items()} for loss in levels(main)]
        row = " | ".join(["{loss:.3f}", *(f"{{{name}}}" for name in main)])
        lines += [report.table(" | ".join(["loss", *main]), row, rows)]
        lines += [f"![loss](time_to_loss-{setup.device}.png)"]
        draw(args.out / f"time_to_loss-{setup.device}.png", main)
    ratios, changes = {}, {}
    if "ours" in main:
        for name in (name for name in BASELINES if name in main):
            ratios[name] = {"ratio": ratio(main["ours"], main[name]), **interval(ratio, main["ours"], main[name])}
        lines += ["Time of ours to the final loss of a baseline over the baseline's whole time:"]
        titles = "baseline | ratio | 95% interval (bootstrap over seeds)"
        rows = [{"name": name, **each} for name, each in ratios.items()]
        lines += [report.table(titles, "{name} | {ratio:.3f} | {low:.3f} to {high:.3f}", rows)]
        changes = {name: effect(main["ours"], runs) for name, runs in curves.items() if name not in RECIPES}
    titles = "change | learning rate | ms per step | final loss | common loss | time to it / ours (95%, seeds)"
    row = "{name} | {rate:g} | {step_seconds:m.1f} | {final:.4f} | {loss:.4f} | {worth:.2f} ({low:.2f} to {high:.2f})"
    for title, group in CHANGES.items():
        rows = [{"name": name, **change} for name, change in changes.items() if name in group]
        lines += [f"{title}, one at a time:", report.table(titles, row, rows)] if rows else []
    record = {"settings": dataclasses.asdict(setup), "ratios": ratios, "changes": changes}
    record |= {"searched": searched, "curves": curves}
    pretraining.publish(args, argv, "time_to_loss", "Time to a given quality", lines, record)
    fields = []
    if "hf_bert" in ratios:
        fields.append("ratio={ratio:.3f} ratio_low={low:.3f} ratio_high={high:.3f}".format(**ratios["hf_bert"]))
    fields += [f"ratio_{n.removeprefix('hf_')}={ratios[n]['ratio']:.3f}" for n in BASELINES[1:] if n in ratios]
    fields += [f"runs_left={len(plan.left())}"] if plan.left() else []
    return f"time_to_loss {' '.join(fields)}"


def main(argv: list[str]) -> None:
    """Run what is left, and report."""
    parser = pretraining.options(__doc__, SETTINGS.minutes, "runs/time_to_loss")
    parser.add_argument("--seeds", type=int, default=SETTINGS.seeds)
    parser.add_argument("--arms", nargs="+", choices=BASELINES, default=BASELINES, help="baselines to compare with")
    parser.add_argument("--ablate", action="store_true", help="also take ours apart")
    parser.add_argument("--beyond", action="store_true", help="also change the recipe of ours")
    parser.add_argument("--only", nargs="+", choices=[*ABLATED, *BEYOND], help="of --ablate and --beyond, these")
    args = parser.parse_args(argv)
    settings = replace(SETTINGS, minutes=args.minutes, seeds=args.seeds, device=args.device)
    if args.toy:
        settings, args.rounds = replace(TOY, device=args.device), 2

    names = ["ours", *args.arms, *(ABLATED if args.ablate else ()), *(BEYOND if args.beyond else ())]
    kept = [name for name in names if name in RECIPES or args.only is None or name in args.only]
    plan = Plan(args.folder, settings, {name: recipe for name, recipe in ALL.items() if name in kept}, SEARCHED)
    print(f"# {report.described(report.machine(args.device))}")
    plan.say_left()
    text = wikipedia(args.folder, settings)
    try:
        plan.run(text, args.rounds, Deadline(args.hours))
    except SystemExit as stopped:
        print(stopped)
    print(report_finished(args, argv, plan, text))


if __name__ == "__main__":
    main(sys.argv[1:])
