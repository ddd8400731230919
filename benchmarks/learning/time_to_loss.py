"""Time to a given quality: MosaicBERT and its baselines, each trained from scratch on the same real text.

    python -m benchmarks.learning.time_to_loss [--minutes 5] [--hours 3] [--arms …] [--ablate] [--beyond] [--out FOLDER]
    python -m benchmarks.learning.time_to_loss --toy      # seconds: only that all of it runs

Text: 10,033 lead paragraphs of Wikipedia, their first 128 tokens, by a tokenizer of 2,560 word pieces trained on them.
One document in twenty is held out by the hash of its text, as in the quickstart. Evaluation is the same for
all: half of the held-out documents, masked at 15% by one seed. Size: 6 layers of 128; with so few word pieces the head
has the share of the work that it has at base. Variants (benchmarks/variants.py) and their masking rates:

    ours 30%    hf_bert 15%    hf_strong 15% (masked-token head, grouped by length)    modernbert 30% (equal parameters)

All share the rest (benchmarks/learning/pretraining.py), with batches of 8 documents, and train for the same time: as
many steps as fit into ``--minutes``. The learning rate of each is the best of LEARNING_RATES by validation loss after
a quarter of the time, the same effort for all. Then each trains with 3 seeds (of weights, order, masks, dropout).

--ablate takes ours apart (benchmarks/learning/ablations.py, and 15% masking), --beyond changes its recipe (BEYOND): one
change at a time, and what won together, at the learning rate of ours. Other layers (no_alibi, no_glu) have a search of
their own.

A finished run is kept in ``--folder`` and not repeated, so the hours can be split; --hours starts no run that would not
end in time. The report uses what is finished: the time to reach given losses, on curves smoothed over three
evaluations, averaged over seeds, and interpolated; a picture; and the last line

    time_to_loss ratio=… ratio_low=… ratio_high=… ratio_strong=…

the time that ours needs to reach hf_bert's final loss over hf_bert's whole time (95% interval by a bootstrap over
seeds), and the same for hf_strong. inf: not reached.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import train_tokenizer
from benchmarks import report
from benchmarks.learning.ablations import ABLATIONS
from benchmarks.learning.pretraining import (
    RECIPES,
    Deadline,
    Plan,
    Recipe,
    Setup,
    Text,
    bootstrap,
    nadamw,
    options,
    publish,
    table_of_runs,
)
from benchmarks.variants import Shape
from scripts import quickstart
from src.convert.sources import iter_documents
from src.data.tokenizer import load_tokenizer

LEARNING_RATES = (5e-4, 1e-3, 2e-3, 4e-3)
BASELINES = ("hf_bert", "hf_strong", "modernbert")
ABLATED: dict[str, Recipe] = {name: Recipe(name) for name in ABLATIONS} | {"mask_15": Recipe(masking=(0.15, 0.15))}
BEYOND: dict[str, Recipe] = {
    "dropout_0": Recipe(dropout=0.0),
    "masking_falls": Recipe(masking=(0.3, 0.15)),
    "no_decay_groups": Recipe(decay_matrices_only=True),
    "warmup_stable_decay": Recipe(t_decay="0.3dur"),
    "nadamw": Recipe(optimizer=nadamw),
    "fast": Recipe(dropout=0.0, t_decay="0.3dur"),
}
"""The last is what won of these, together: yamls/mosaic_bert_fast.yaml."""
ALL = RECIPES | ABLATED | BEYOND
SEARCHED = (*RECIPES, "no_alibi", "no_glu")
"""Names with a learning rate of their own."""
CHANGES = {"Taken away": ABLATED, "Changed": BEYOND}


@dataclass(frozen=True)
class Settings(Setup):
    batch: int = 8
    vocabulary: int = 2560
    """As many as 6 x 128 is of 12 x 768, of base's 30,528."""
    shape: Shape = field(default_factory=lambda: Shape(6, 128, 8, 512, 0, length=128))
    minutes: float = 5
    seeds: int = 3
    learning_rates: tuple[float, ...] = LEARNING_RATES
    evaluations: int = 15


TOY = Settings(
    documents=64,
    vocabulary=1000,
    shape=Shape(2, 32, 2, 64, 0, length=32),
    minutes=0.01,
    seeds=2,
    learning_rates=(1e-3, 4e-3),
    evaluations=3,
)


def wikipedia(folder: Path, settings: Setup) -> Text:
    """The quickstart's documents, and a tokenizer trained on them; both are kept in the folder."""
    if not (folder / "text").exists():
        quickstart.write_text(folder / "partial", None)
        (folder / "partial" / "text").rename(folder / "text")
    train, held_out = (str(folder / f"text/c4-{split}.00000-of-00001.json.gz") for split in ("train", "validation"))
    name = str(folder / "tokenizer")
    if not Path(name).exists():
        train_tokenizer.main([train, "--out", name, "--vocab_size", str(settings.vocabulary)])
    texts = [[document["text"] for document in iter_documents(path)] for path in (train, held_out)]
    return Text(load_tokenizer(name), texts[0], texts[1][::2], setup=settings)  # half: it is evaluated often


def mean_curve(curves: list[dict[str, Any]], axis: str = "time") -> tuple[np.ndarray, np.ndarray]:
    """Time or tokens of the evaluations, and the loss: mean over the seeds of a recipe, smoothed, never rising."""
    losses = np.mean([[point["loss"] for point in curve["points"]] for curve in curves], axis=0)
    smooth = losses.copy()
    smooth[1:-1] = (losses[:-2] + losses[1:-1] + losses[2:]) / 3
    return positions(curves, axis), np.minimum.accumulate(smooth)


def positions(curves: list[dict[str, Any]], axis: str) -> np.ndarray:
    """Time (seconds by the recipe's clock) or tokens of the evaluations: mean over the seeds of a recipe."""
    field = {"time": "step", "tokens": "tokens"}[axis]
    x = np.mean([[point[field] for point in curve["points"]] for curve in curves], axis=0)
    return x * curves[0]["step_seconds"] if axis == "time" else x


def time_to(curves: list[dict[str, Any]], loss: float) -> float:
    """Seconds until the mean curve reaches a loss, interpolated; inf: it does not."""
    x, y = mean_curve(curves)
    reached = np.flatnonzero(y <= loss)
    if not len(reached):
        return math.inf
    i = reached[0]
    if i == 0:
        return float(x[0])
    return float(x[i - 1] + (x[i] - x[i - 1]) * (y[i - 1] - loss) / (y[i - 1] - y[i]))


def ratio(ours: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> float:
    """Time of ours to the baseline's final loss over the baseline's whole time."""
    x, y = mean_curve(baseline)
    return time_to(ours, float(y[-1])) / float(x[-1])


def worth(ours: list[dict[str, Any]], changed: list[dict[str, Any]]) -> float:
    """Time of a changed recipe to the lowest loss that both reach, over that of ours; above 1 the change costs time."""
    loss = common_loss(ours, changed)
    return time_to(changed, loss) / time_to(ours, loss)


def common_loss(*recipes: list[dict[str, Any]]) -> float:
    """The lowest loss that all reach."""
    return max(float(mean_curve(curves)[1][-1]) for curves in recipes)


def interval(
    measure: Callable[[list[dict[str, Any]], list[dict[str, Any]]], float],
    ours: list[dict[str, Any]],
    other: list[dict[str, Any]],
    paired: bool = False,
) -> dict[str, float]:
    """95% interval of ``ratio`` or ``worth`` over seeds.

    Args:
        paired: draw the same seeds for both: one seed gives changes of one model the same weights, order and masks.
    """

    def draw(rng: np.random.Generator) -> float:
        drawn = rng.integers(len(ours), size=len(ours))
        drawn_other = drawn if paired else rng.integers(len(other), size=len(other))
        return measure([ours[i] for i in drawn], [other[i] for i in drawn_other])

    return bootstrap(draw)


def levels(curves: dict[str, list[dict[str, Any]]]) -> list[float]:
    """Losses of the table: the final ones, and quarters from the lowest that all reach upwards."""
    finals = {math.ceil(1000 * mean_curve(c)[1][-1]) / 1000 for c in curves.values()}
    quarters = {math.ceil(4 * max(finals)) / 4 + 0.25 * i for i in range(4)}
    return sorted(finals | quarters, reverse=True)


def minutes_to(curves: list[dict[str, Any]], loss: float) -> str:
    """Minutes to a loss, with the range over seeds."""
    each = [time_to([curve], loss) / 60 for curve in curves]
    mean = time_to(curves, loss) / 60
    return "not reached" if mean == math.inf else f"{mean:.2f} ({min(each):.2f} to {max(each):.2f})"


def draw(path: Path, curves: dict[str, list[dict[str, Any]]]) -> None:
    """Loss over time and over tokens."""
    with report.picture(path, 2) as panels:
        axes = (("time", 60, "minutes of training"), ("tokens", 1e6, "million tokens"))
        for panel, (axis, unit, label) in zip(panels, axes, strict=True):
            for name, runs in curves.items():
                losses = np.array([[point["loss"] for point in run["points"]] for run in runs])
                report.draw_seeds(panel, name, positions(runs, axis) / unit, losses)
            panel.set(xlabel=label)
        panels[0].set(ylabel="validation loss at 15% masking (nats)")


def changed(curves: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """The effect of each change of ours."""
    changes = {}
    for name, runs in curves.items():
        if name not in RECIPES:
            changes[name] = {
                "rate": runs[0]["rate"],
                "step_seconds": runs[0]["step_seconds"],
                "final": float(mean_curve(runs)[1][-1]),
                "loss": common_loss(curves["ours"], runs),
                "worth": worth(curves["ours"], runs),
                **interval(worth, curves["ours"], runs, paired=True),
            }
    return changes


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
        "",
    ]
    if main:
        lines += [table_of_runs(setup, main), "", "Validation loss by learning rate, after a quarter of the time:", ""]
        names, row = " | ".join(["variant", *(f"{rate:g}" for rate in setup.learning_rates)]), "{name}"
        row += "".join(f" | {{losses[{i}]:.4f}}" for i in range(len(setup.learning_rates)))
        rows = [{"name": name, "losses": [*losses.values()]} for name, losses in searched.items()]
        lines += [report.table(names, row, rows), ""]
        lines += ["Minutes to a validation loss, mean curve (range over seeds):", ""]
        rows = [{"loss": loss} | {name: minutes_to(runs, loss) for name, runs in main.items()} for loss in levels(main)]
        row = " | ".join(["{loss:.3f}", *(f"{{{name}}}" for name in main)])
        lines += [report.table(" | ".join(["loss", *main]), row, rows), ""]
        lines += [f"![loss](time_to_loss-{setup.device}.png)", ""]
        draw(args.out / f"time_to_loss-{setup.device}.png", main)
    ratios, changes = {}, {}
    if "ours" in main:
        for name in (name for name in BASELINES if name in main):
            ratios[name] = {"ratio": ratio(main["ours"], main[name]), **interval(ratio, main["ours"], main[name])}
        lines += ["Time of ours to the final loss of a baseline over the baseline's whole time:", ""]
        titles = "baseline | ratio | 95% interval (bootstrap over seeds)"
        rows = [{"name": name, **each} for name, each in ratios.items()]
        lines += [report.table(titles, "{name} | {ratio:.3f} | {low:.3f} to {high:.3f}", rows), ""]
        changes = changed(curves)
    titles = "change | learning rate | ms per step | final loss | common loss | time to it / ours (95%, seeds)"
    row = "{name} | {rate:g} | {step_seconds:m.1f} | {final:.4f} | {loss:.4f} | {worth:.2f} ({low:.2f} to {high:.2f})"
    for title, group in CHANGES.items():
        rows = [{"name": name, **change} for name, change in changes.items() if name in group]
        lines += [f"{title}, one at a time:", "", report.table(titles, row, rows), ""] if rows else []
    record = {"settings": dataclasses.asdict(setup), "ratios": ratios, "changes": changes}
    record |= {"searched": searched, "curves": curves}
    publish(args, argv, "time_to_loss", "Time to a given quality", lines, record)
    fields = []
    if "hf_bert" in ratios:
        fields.append("ratio={ratio:.3f} ratio_low={low:.3f} ratio_high={high:.3f}".format(**ratios["hf_bert"]))
    fields += [f"ratio_{n.removeprefix('hf_')}={ratios[n]['ratio']:.3f}" for n in BASELINES[1:] if n in ratios]
    fields += [f"runs_left={len(plan.left())}"] if plan.left() else []
    return f"time_to_loss {' '.join(fields)}"


def main(argv: list[str]) -> None:
    """Run what is left, and report."""
    parser = options(__doc__, Settings.minutes, "runs/time_to_loss")
    parser.add_argument("--seeds", type=int, default=Settings.seeds)
    parser.add_argument("--arms", nargs="+", choices=BASELINES, default=BASELINES, help="baselines to compare with")
    parser.add_argument("--ablate", action="store_true", help="also take ours apart")
    parser.add_argument("--beyond", action="store_true", help="also change the recipe of ours")
    parser.add_argument("--only", nargs="+", choices=[*ABLATED, *BEYOND], help="of --ablate and --beyond, these")
    args = parser.parse_args(argv)
    settings = replace(Settings(), minutes=args.minutes, seeds=args.seeds, device=args.device)
    if args.toy:
        settings, args.rounds = replace(TOY, device=args.device), 2

    names = ["ours", *args.arms, *(ABLATED if args.ablate else ()), *(BEYOND if args.beyond else ())]
    kept = [name for name in names if name in RECIPES or args.only is None or name in args.only]
    plan = Plan(args.folder, settings, {name: recipe for name, recipe in ALL.items() if name in kept}, SEARCHED)
    print(f"# {report.described(report.machine(args.device))}")
    print(f"{len(plan.left())} runs are left, about {plan.hours_left():.1f} hours", flush=True)
    text = wikipedia(args.folder, settings)
    try:
        plan.run(text, args.rounds, Deadline(args.hours))
    except SystemExit as stopped:
        print(stopped)
    print(report_finished(args, argv, plan, text))


if __name__ == "__main__":
    main(sys.argv[1:])
