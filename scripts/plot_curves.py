"""Draw the losses of one or several runs over steps, tokens and time.

    python -m scripts.plot_curves runs/a runs/b/metrics.jsonl --out losses.png

A run is given by its metrics.jsonl or the folder of it. Thin lines are training batches, points are evaluations.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

TRAIN_LOSS, EVAL_LOSS = "loss/train/total", "metrics/eval/LanguageCrossEntropy"

AXES = {"batch": (1, "steps"), "token": (1e6, "million tokens"), "seconds": (3600, "hours of training")}
"""Unit and label of the axis, by the field of a line."""


def read_metrics(path: str) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl, or of the one in a folder, without a last line that a crash cut off.

    Raises:
        ValueError: the file is missing, or has no training step.
    """
    file = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"{file}: no such file; loggers.metrics_file writes it")
    lines = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
    if not any(TRAIN_LOSS in line for line in lines):
        raise ValueError(f"{file}: no training step yet")
    return lines


def draw(
    runs: dict[str, list[dict[str, Any]]],
    path: Path,
    axes: tuple[str, ...] = tuple(AXES),
    level: tuple[float, str] | None = None,
) -> None:
    """Write a picture with one panel for each of ``axes``.

    Args:
        runs: lines of each run, by name.
        path: of the picture; the suffix is its format.
        axes: keys of AXES.
        level: a loss to draw as a line, and its name.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(axes), figsize=(7 * len(axes), 5), layout="constrained", squeeze=False)
    for panel, axis in zip(panels[0], axes, strict=True):
        unit, label = AXES[axis]
        for number, (name, lines) in enumerate(runs.items()):
            for key, what, style in (
                (TRAIN_LOSS, "training batch", {"alpha": 0.35, "linewidth": 1}),
                (EVAL_LOSS, "validation set", {"marker": "o", "linewidth": 2}),
            ):
                points = [(line[axis] / unit, line[key]) for line in lines if line.get(key) is not None]
                if points:
                    x, y = zip(*points, strict=True)
                    color = f"C{2 * number + (key == EVAL_LOSS)}" if len(runs) == 1 else f"C{number}"
                    panel.plot(x, y, label=f"{name}: {what}", color=color, **style)
        if level is not None:
            panel.axhline(level[0], color="gray", linestyle="--", label=level[1])
        panel.set(xlabel=label, ylabel="masked-token loss (nats)")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="metrics.jsonl of a run, or its folder")
    parser.add_argument("--out", type=Path, default=Path("losses.png"), help="picture (default: %(default)s)")
    args = parser.parse_args(argv)
    runs = {path: read_metrics(path) for path in args.runs}
    draw(runs, args.out)
    for path, lines in runs.items():
        evaluated = [line[EVAL_LOSS] for line in lines if EVAL_LOSS in line]
        last = f"{evaluated[-1]:.4f}" if evaluated else "none"
        print(f"{path}: {lines[-1]['batch']} steps, {lines[-1]['token']:,} tokens, last evaluation {last}")
    print(f"drawn: {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"plot_curves.py: {error}")
