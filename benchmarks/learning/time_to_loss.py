"""Time to a given quality: ours and what a user would run instead, each trained from scratch on the same real text.

    python -m benchmarks.learning.time_to_loss [--minutes 5] [--hours 3] [--arms …] [--ablate] [--beyond] [--out FOLDER]
    python -m benchmarks.learning.time_to_loss --toy      # seconds: only that all of it runs

Text: 10,033 lead paragraphs of Wikipedia, their beginnings up to 128 tokens by a tokenizer of 2,560 word pieces trained
on them; one document in twenty is held out, by the hash of its text, as in the quickstart. Evaluation is the same for
every arm: half of the held-out documents, masked at 15% by one seed. Shape: 6 layers of 128; with so few word pieces
the head has the share of the work that it has at base. Arms, as benchmarks/variants.py has them, with their own masking
rates:

    ours 30%    hf_bert 15%    hf_strong 15% (masked-token head, grouped by length)    modernbert 30% (equal parameters)

All share what is not theirs: batches of 8 documents in the same order for the same seed, AdamW (fused, betas 0.9 and
0.98, eps 1e-6, decay 0.02), a warmup of 6% and a linear fall to 2%. Each has the same training time. First the arms'
steps are timed, interleaved, on the same batches; what fits into ``--minutes`` is an arm's number of steps, and its
clock is steps times that time, so that other programs do not count; evaluation, loading and masking do not either. Each
arm's learning rate is the best of LEARNING_RATES by held-out loss after a run of a quarter of the time, the same effort
for all. Then each arm is trained with 3 seeds (of weights, order, masks, dropout).

--ablate takes ours apart (benchmarks/ablations.py, and 15% masking), --beyond changes its recipe (BEYOND), one thing at
a time and what won together, at the learning rate of ours; other layers (OTHER_LAYERS) have a search of their own.

Every run writes its curve to ``--folder`` when it is finished, and a finished one is not run again, so that the hours
can be split; --hours starts no run that would not end in time. The report is made of what is there: per arm the time to
reach given losses, on curves smoothed over three evaluations, averaged over seeds, and interpolated; a picture; and

    time_to_loss ratio=… ratio_low=… ratio_high=… ratio_strong=…

the time that ours needs to reach hf_bert's final loss over hf_bert's whole time (95% interval by a bootstrap over
seeds), and the same for hf_strong. inf: not reached.
"""

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import train_tokenizer
from benchmarks import report
from benchmarks.learning.ablations import ABLATIONS
from benchmarks.learning.pretraining import (
    RECIPES,
    TUNING,
    Recipe,
    Run,
    Setup,
    Text,
    keep_settings,
    make_arm,
    time_steps,
)
from benchmarks.variants import Shape
from scripts import quickstart
from src.convert.sources import iter_documents
from src.data.tokenizer import load_tokenizer

LEARNING_RATES = (5e-4, 1e-3, 2e-3, 4e-3)
EVALUATIONS = 15
"""In a run, evenly spread; one more before the first step. A run of the search has the last of them only."""
OVERHEAD = 1.2
"""A run's hours over those of its steps: evaluation, loading, masking."""
RIVALS = ("hf_bert", "hf_strong", "modernbert")


ABLATED: dict[str, Recipe] = {name: Recipe(name) for name in ABLATIONS} | {"mask_15": Recipe(masking=(0.15, 0.15))}
BEYOND: dict[str, Recipe] = {
    "dropout_0": Recipe(dropout=0.0),
    "masking_falls": Recipe(masking=(0.3, 0.15)),
    "no_decay_groups": Recipe(decay_all=False),
    "warmup_stable_decay": Recipe(stable=0.7),
    "nadamw": Recipe(optimizer="nadamw"),
    "fast": Recipe(dropout=0.0, stable=0.7),
}
"""The last is what won of these, together: yamls/mosaic_bert_fast.yaml."""
OTHER_LAYERS = ("no_alibi", "no_glu")
SEARCHED = (*RECIPES, *OTHER_LAYERS)
"""Names with a learning rate of their own."""
ALL = RECIPES | ABLATED | BEYOND
CHANGES = {"Taken away": ABLATED, "Changed": BEYOND}


@dataclass(frozen=True)
class Settings(Setup):
    """What must be the same for all runs of a folder."""

    batch: int = 8
    vocabulary: int = 2560
    """As many as 6 x 128 is of 12 x 768, of base's 30,528."""
    shape: Shape = field(default_factory=lambda: Shape(6, 128, 8, 512, 0, length=128))
    minutes: float = 5
    """Training time of a run."""
    seeds: int = 3
    learning_rates: tuple[float, ...] = LEARNING_RATES
    evaluations: int = EVALUATIONS


TOY = Settings(
    batch=8,
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
    return Text(load_tokenizer(name), texts[0], texts[1][::2], setup=settings)  # half is enough, and often


# ----------------------------------------------------------------------------------------------------------------------
# The plan: what is to be run, what is there
# ----------------------------------------------------------------------------------------------------------------------


class Plan:
    """The runs of a folder: which are finished, and what the next is."""

    def __init__(self, folder: Path, settings: Settings, names: list[str]):
        self.folder, self.settings, self.names = folder, settings, names

    def path(self, name: str, rate: float, seed: int, tuning: bool) -> Path:
        return self.folder / "curves" / f"{'tuning-' * tuning}{name}-lr{rate:g}-seed{seed}.json"

    def tuning(self, name: str) -> dict[float, Path]:
        """Files of the search for an arm's learning rate, by the rate; seed 0 takes part in nothing else."""
        return {rate: self.path(name, rate, 0, True) for rate in self.settings.learning_rates}

    def searched(self, name: str) -> dict[float, float]:
        """Losses of an arm's finished runs of the search, by the learning rate."""
        return {rate: final(json.loads(path.read_text())) for rate, path in self.tuning(name).items() if path.exists()}

    def best_rate(self, name: str) -> float | None:
        """The learning rate of an arm, that of ours for most changes; None before the search is finished."""
        losses = self.searched(name if name in SEARCHED else "ours")
        return min(losses, key=losses.__getitem__) if len(losses) == len(self.settings.learning_rates) else None

    def curves(self, name: str) -> list[dict[str, Any]]:
        """Finished runs at the best learning rate."""
        rate = self.best_rate(name)
        paths = [self.path(name, rate, seed, False) for seed in self.seeds()] if rate is not None else []
        return [json.loads(path.read_text()) for path in paths if path.exists()]

    def seeds(self) -> range:
        return range(1, self.settings.seeds + 1)

    def searches(self) -> list[str]:
        """Arms whose learning rate is searched for."""
        return [name for name in SEARCHED if name in self.names or name == "ours"]

    def left(self) -> tuple[int, int]:
        """Runs still to be done: of the search, and whole ones."""
        search = sum(not path.exists() for name in self.searches() for path in self.tuning(name).values())
        return search, sum(self.settings.seeds - len(self.curves(name)) for name in self.names)

    def hours_left(self) -> float:
        """About."""
        search, whole = self.left()
        return OVERHEAD * self.settings.minutes * (TUNING * search + whole) / 60

    def next(self) -> tuple[str, float, int, bool] | None:
        """Arm, learning rate, seed, and whether it belongs to the search; seed by seed, so that all arms get on."""
        for name in self.searches():
            for rate, path in self.tuning(name).items():
                if not path.exists():
                    return name, rate, 0, True
        for seed, name in itertools.product(self.seeds(), self.names):
            rate = self.best_rate(name)
            assert rate is not None
            if not self.path(name, rate, seed, False).exists():
                return name, rate, seed, False
        return None


def run_all(plan: Plan, text: Text, seconds: dict[str, float], hours: float) -> None:
    """Run what is left, one after another, until it is done or the hours are spent."""
    started, settings = time.perf_counter(), plan.settings
    while (todo := plan.next()) is not None:
        name, rate, seed, tuning = todo
        minutes = settings.minutes * (TUNING if tuning else 1)
        if time.perf_counter() - started + 60 * OVERHEAD * minutes > 3600 * hours:
            print(f"--hours {hours:g} are spent; about {plan.hours_left():.1f} hours are left", flush=True)
            return
        steps = max(settings.evaluations, round(60 * minutes / seconds[name]))
        run = Run(text, ALL[name], rate, seed, steps)
        points = run.curve(1 if tuning else settings.evaluations)
        about = {"arm": name, "rate": rate, "seed": seed, "steps": steps, "step_seconds": seconds[name]}
        curve = {**about, "machine": report.machine(settings.device), "points": points}
        report.write_json(plan.path(name, rate, seed, tuning), curve)
        what = "learning rate" if tuning else "seed"
        print(
            f"{name} {what} {rate if tuning else seed}: {steps} steps, {points[-1]['tokens']:,} tokens, held-out loss "
            f"{final(curve):.4f}, {points[-1]['seconds'] / 60:.1f} min in steps, {steps * seconds[name] / 60:.1f} "
            f"by its clock; about {plan.hours_left():.1f} hours left",
            flush=True,
        )


# ----------------------------------------------------------------------------------------------------------------------
# What the curves say
# ----------------------------------------------------------------------------------------------------------------------


def final(curve: dict[str, Any]) -> float:
    return curve["points"][-1]["loss"]


def mean_curve(curves: list[dict[str, Any]], axis: str = "time") -> tuple[np.ndarray, np.ndarray]:
    """Seconds by the arm's clock, or tokens, and the loss, averaged over runs of one arm, smoothed, falling only."""
    losses = np.mean([[point["loss"] for point in curve["points"]] for curve in curves], axis=0)
    smooth = losses.copy()
    smooth[1:-1] = (losses[:-2] + losses[1:-1] + losses[2:]) / 3
    return positions(curves, axis), np.minimum.accumulate(smooth)


def positions(curves: list[dict[str, Any]], axis: str) -> np.ndarray:
    """Of the evaluations: seconds, or tokens, averaged over runs of one arm."""
    field = {"time": "step", "tokens": "tokens"}[axis]
    x = np.mean([[point[field] for point in curve["points"]] for curve in curves], axis=0)
    return x * curves[0]["step_seconds"] if axis == "time" else x


def time_to(curves: list[dict[str, Any]], loss: float) -> float:
    """Seconds until the mean curve reaches a loss, interpolated; inf if it does not."""
    x, y = mean_curve(curves)
    reached = np.flatnonzero(y <= loss)
    if not len(reached):
        return math.inf
    i = reached[0]
    if i == 0:
        return float(x[0])
    return float(x[i - 1] + (x[i] - x[i - 1]) * (y[i - 1] - loss) / (y[i - 1] - y[i]))


def ratio(ours: list[dict[str, Any]], rival: list[dict[str, Any]]) -> float:
    """Time of ours to the rival's final loss over the rival's whole time."""
    x, y = mean_curve(rival)
    return time_to(ours, float(y[-1])) / float(x[-1])


def worth(ours: list[dict[str, Any]], changed: list[dict[str, Any]]) -> float:
    """Time of a changed form to the lowest loss that both reach over that of ours; above 1, the change costs time."""
    loss = common_loss(ours, changed)
    return time_to(changed, loss) / time_to(ours, loss)


def common_loss(*arms: list[dict[str, Any]]) -> float:
    """The lowest loss that all reach."""
    return max(float(mean_curve(curves)[1][-1]) for curves in arms)


def interval(
    measure: Callable[[list[dict[str, Any]], list[dict[str, Any]]], float],
    ours: list[dict[str, Any]],
    other: list[dict[str, Any]],
    paired: bool = False,
    draws: int = 2000,
) -> tuple[float, float]:
    """95% of ``ratio`` or ``worth`` over seeds drawn with replacement, each arm's for itself, or ``paired``: the same
    for both, as one seed gives changes of one model the same weights, order and masks."""
    rng = np.random.default_rng(0)
    values = []
    for _ in range(draws):
        drawn = rng.integers(len(ours), size=len(ours))
        drawn_other = drawn if paired else rng.integers(len(other), size=len(other))
        values.append(measure([ours[i] for i in drawn], [other[i] for i in drawn_other]))
    values.sort()
    return values[round(0.025 * (draws - 1))], values[round(0.975 * (draws - 1))]


# ----------------------------------------------------------------------------------------------------------------------
# Report
# ----------------------------------------------------------------------------------------------------------------------


def levels(curves: dict[str, list[dict[str, Any]]]) -> list[float]:
    """Losses to ask for: the final ones, and steps of a quarter above the lowest that all reach."""
    finals = {math.ceil(1000 * mean_curve(c)[1][-1]) / 1000 for c in curves.values()}
    quarters = {math.ceil(4 * max(finals)) / 4 + 0.25 * i for i in range(4)}
    return sorted(finals | quarters, reverse=True)


def minutes_to(curves: list[dict[str, Any]], loss: float) -> str:
    """With the range over seeds."""
    each = [time_to([curve], loss) / 60 for curve in curves]
    mean = time_to(curves, loss) / 60
    return "not reached" if mean == math.inf else f"{mean:.2f} ({min(each):.2f} to {max(each):.2f})"


def draw(path: Path, curves: dict[str, list[dict[str, Any]]]) -> None:
    """Loss over time and over tokens; lines are means over seeds, bands their range."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(13, 5), layout="constrained", sharey=True)
    axes = (("time", 60, "minutes of training"), ("tokens", 1e6, "million real tokens"))
    for panel, (axis, unit, label) in zip(panels, axes, strict=True):
        for name, runs in curves.items():
            losses = np.array([[point["loss"] for point in run["points"]] for run in runs])
            x = positions(runs, axis) / unit
            (line,) = panel.plot(x, losses.mean(axis=0), label=name)
            panel.fill_between(x, losses.min(axis=0), losses.max(axis=0), color=line.get_color(), alpha=0.25)
        panel.set(xlabel=label)
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="held-out loss at 15% masking (nats)")
    panels[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def changed(curves: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """What each change of ours does."""
    changes = {}
    for name, runs in curves.items():
        if name not in RECIPES:
            low, high = interval(worth, curves["ours"], runs, paired=True)
            changes[name] = {
                "rate": runs[0]["rate"],
                "step_seconds": runs[0]["step_seconds"],
                "final": float(mean_curve(runs)[1][-1]),
                "loss": common_loss(curves["ours"], runs),
                "worth": worth(curves["ours"], runs),
                "low": low,
                "high": high,
            }
    return changes


def table_of_changes(title: str, changes: dict[str, dict[str, float]]) -> list[str]:
    """Lines of the report."""
    header = ["change", "learning rate", "ms a step", "final loss", "common loss", "time to it / ours (95%, seeds)"]
    rows = []
    for name, c in changes.items():
        row = [name, f"{c['rate']:g}", f"{1e3 * c['step_seconds']:.1f}", f"{c['final']:.4f}", f"{c['loss']:.4f}"]
        rows.append([*row, f"{c['worth']:.2f} ({c['low']:.2f} to {c['high']:.2f})"])
    return [f"{title}, one at a time:", "", report.table(header, rows), ""] if rows else []


def publish(plan: Plan, text: Text, out: Path, command: str) -> str:
    """Write JSON, Markdown and pictures of what is finished; the last line."""
    settings, device = plan.settings, plan.settings.device
    curves = {name: plan.curves(name) for name in ALL}
    curves = {name: runs for name, runs in curves.items() if len(runs) == settings.seeds}
    main = {name: runs for name, runs in curves.items() if name in RECIPES}
    searched = {name: plan.searched(name) for name in SEARCHED if name in curves}
    lines = [
        "# Time to a given quality",
        "",
        "By `python -m benchmarks.learning.time_to_loss`, whose first lines say what is compared and how.",
        "",
        f"{report.described(report.machine(device))}. `{command}`",
        "",
        f"{settings.minutes:g} minutes of training a run, {settings.seeds} seeds; {len(text.train):,} documents train, "
        f"{len(text.held_out):,} are evaluated on; {text.real_share():.0%} of a padded batch are real tokens. "
        f"Frequencies of word pieces alone give a loss of {text.frequency_loss():.3f}.",
        "",
    ]
    fields, ratios, changes = [], {}, {}
    if main:
        header = ["arm", "masked", "learning rate", "M parameters", "ms a step", "steps", "passes", "final loss"]
        rows = []
        for name, runs in main.items():
            seen = runs[0]["steps"] * settings.batch / len(text.train)
            finals = [final(run) for run in runs]
            rates = sorted(settings.learning_rates)
            edge = " (edge of the grid)" if runs[0]["rate"] in (rates[0], rates[-1]) else ""
            rows.append(
                [
                    name,
                    f"{ALL[name].masking[0]:.0%}",
                    f"{runs[0]['rate']:g}{edge}",
                    f"{sum(p.numel() for p in make_arm(text, ALL[name]).model.parameters()) / 1e6:.2f}",
                    f"{1e3 * runs[0]['step_seconds']:.1f}",
                    f"{runs[0]['steps']:,}",
                    f"{seen:.2f}",
                    f"{statistics.mean(finals):.4f} ({min(finals):.4f} to {max(finals):.4f})",
                ]
            )
        lines += [report.table(header, rows), ""]
        rows = [[name, *(f"{loss:.4f}" for loss in losses.values())] for name, losses in searched.items()]
        rates = [f"{rate:g}" for rate in settings.learning_rates]
        lines += ["Held-out loss by learning rate, after a run of a quarter of the time:", ""]
        lines += [
            report.table(["arm", *rates], rows),
            "",
            "Minutes to a held-out loss, mean curve (range over seeds):",
            "",
        ]
        rows = [[f"{loss:.3f}", *(minutes_to(runs, loss) for runs in main.values())] for loss in levels(main)]
        lines += [report.table(["loss", *main], rows), "", f"![loss](time_to_loss-{device}.png)", ""]
        out.mkdir(parents=True, exist_ok=True)
        draw(out / f"time_to_loss-{device}.png", main)
    if "ours" in main:
        for name in RIVALS:
            if name in main:
                low, high = interval(ratio, main["ours"], main[name])
                ratios[name] = {"ratio": ratio(main["ours"], main[name]), "low": low, "high": high}
        rows = [[n, f"{r['ratio']:.3f}", f"{r['low']:.3f} to {r['high']:.3f}"] for n, r in ratios.items()]
        if rows:
            lines += ["Time of ours to the final loss of another arm over that arm's whole time:", ""]
            lines += [report.table(["arm", "ratio", "95% interval (bootstrap over seeds)"], rows), ""]
        changes = changed(curves)
        for title, group in CHANGES.items():
            lines += table_of_changes(title, {name: change for name, change in changes.items() if name in group})
    if "hf_bert" in ratios:
        r = ratios["hf_bert"]
        fields += [f"ratio={r['ratio']:.3f}", f"ratio_low={r['low']:.3f}", f"ratio_high={r['high']:.3f}"]
    fields += [f"ratio_{n.removeprefix('hf_')}={ratios[n]['ratio']:.3f}" for n in RIVALS[1:] if n in ratios]
    search, whole = plan.left()
    fields += [f"runs_left={search + whole}"] if search + whole else []
    report.write_json(
        out / f"time_to_loss-{device}.json",
        {
            "settings": dataclasses.asdict(settings),
            "machine": report.machine(device),
            "command": command,
            "ratios": ratios,
            "changes": changes,
            "searched": searched,
            "curves": curves,
        },
    )
    (out / f"time_to_loss-{device}.md").write_text("\n".join(lines))
    print("\n".join(lines[8:]))
    return f"time_to_loss {' '.join(fields)}"


def main(argv: list[str]) -> None:
    """Run what is left, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=Settings.minutes, help="training time of a run")
    parser.add_argument("--seeds", type=int, default=Settings.seeds)
    parser.add_argument("--hours", type=float, default=math.inf, help="start no run that would not end in this time")
    parser.add_argument("--arms", nargs="+", choices=[*RIVALS], default=[*RIVALS], help="beside ours")
    parser.add_argument("--ablate", action="store_true", help="also take ours apart")
    parser.add_argument("--beyond", action="store_true", help="also change the recipe of ours")
    parser.add_argument("--only", nargs="+", choices=[*ABLATED, *BEYOND], help="of --ablate and --beyond, these")
    parser.add_argument("--rounds", type=int, default=40, help="steps that each arm is timed for")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, default=Path("runs/time_to_loss"), help="of the runs")
    parser.add_argument("--out", type=Path, default=Path("runs/time_to_loss/report"), help="folder of the report")
    parser.add_argument("--toy", action="store_true", help="tiny; its figures mean nothing")
    args = parser.parse_args(argv)
    settings = replace(Settings(), minutes=args.minutes, seeds=args.seeds, device=args.device)
    if args.toy:
        settings, args.rounds = replace(TOY, device=args.device), 2

    changed = [*(ABLATED if args.ablate else ()), *(BEYOND if args.beyond else ())]
    changed = [name for name in changed if args.only is None or name in args.only]
    if args.device == "cpu" and "no_kernels" in changed:
        changed.remove("no_kernels")
        print("no_kernels: left out, there are none on a CPU")
    plan = Plan(args.folder, settings, [name for name in RECIPES if name == "ours" or name in args.arms] + changed)
    keep_settings(args.folder, settings)

    search, whole = plan.left()
    print(f"# {report.described(report.machine(args.device))}")
    print(
        f"{search} runs of {TUNING * settings.minutes:g} minutes to find learning rates and {whole} of "
        f"{settings.minutes:g} minutes are left: about {plan.hours_left():.1f} hours",
        flush=True,
    )
    text = wikipedia(args.folder, settings)
    seconds = time_steps(args.folder / "steps.json", text, {name: ALL[name] for name in plan.names}, args.rounds)
    run_all(plan, text, seconds, args.hours)
    print(publish(plan, text, args.out, f"python -m benchmarks.learning.time_to_loss {' '.join(argv)}"))


if __name__ == "__main__":
    main(sys.argv[1:])
