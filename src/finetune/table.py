"""Results of several seeds as a table: mean, deviation, 95% interval. Imports no torch."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

HEADER = ("task", "metric", "n", "mean", "deviation", "95% interval")


def t_quantile(freedom: int, share: float = 0.95) -> float:
    """The t with ``share`` of Student's distribution of ``freedom`` degrees between -t and t.

    The share between is a finite sum in cos(atan(t / sqrt(freedom))): Abramowitz and Stegun, 1964, 26.7.3 and 26.7.4.
    """

    def between(t: float) -> float:
        angle = math.atan(t / math.sqrt(freedom))
        odd, cos = freedom % 2, math.cos(angle)
        total, term = 0.0, cos if odd else 1.0
        for k in range(2 if odd else 1, freedom, 2):  # k is the last factor of the term's denominator, 1 less in it
            total += term
            term *= cos**2 * k / (k + 1)
        return (2 / math.pi) * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total

    low, high = 0.0, 1e3
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if between(middle) < share else (low, middle)
    return low


def summary(values: dict[str, float]) -> dict[str, Any]:
    """``n``, ``mean``, the sample's standard ``deviation`` and the 95% ``interval`` of the mean (Student's t).

    Args:
        values: by seed. With one of them there is neither deviation nor interval.
    """
    n, mean = len(values), fmean(values.values())
    deviation = interval = None
    if n >= 2:
        deviation = stdev(values.values())
        half = t_quantile(n - 1) * deviation / math.sqrt(n)
        interval = [mean - half, mean + half]
    return {"n": n, "mean": mean, "deviation": deviation, "interval": interval, "values": values}


def aggregate(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Tasks with the summary of each metric and of the score, and the mean of the tasks' scores.

    Args:
        results: of finished runs, as run.py writes them.
    """
    tasks: dict[str, Any] = {}
    for task in dict.fromkeys(result["task"] for result in results):
        runs = [result for result in results if result["task"] == task]
        metrics: dict[str, Any] = {}
        for dataset, named in runs[0]["metrics"].items():
            for metric in named:
                values = {str(run["seed"]): run["metrics"][dataset][metric] for run in runs}
                label = metric if dataset == "validation" else f"{metric} ({dataset})"
                metrics[label] = summary(values)
        score = summary({str(run["seed"]): run["score"] for run in runs})
        tasks[task] = {"metrics": metrics, "score": score}
    return {"tasks": tasks, "average": fmean(task["score"]["mean"] for task in tasks.values()) if tasks else None}


def rows(aggregated: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table's lines under HEADER; a score has one where it is the mean of several metrics."""
    lines = []
    for task, found in aggregated["tasks"].items():
        counted = {name: entry for name, entry in found["metrics"].items() if not name.endswith("(test)")}
        entries = {**found["metrics"], **({"score": found["score"]} if len(counted) > 1 else {})}
        for name, entry in entries.items():
            deviation = "" if entry["deviation"] is None else f"{entry['deviation']:.4f}"
            interval = "" if entry["interval"] is None else "{:.4f} to {:.4f}".format(*entry["interval"])
            lines.append((task, name, str(entry["n"]), f"{entry['mean']:.4f}", deviation, interval))
    if len(aggregated["tasks"]) > 1:
        lines.append((f"{len(aggregated['tasks'])} tasks", "mean score", "", f"{aggregated['average']:.4f}", "", ""))
    return lines


def losses(results: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each task's set of which the model did not see all."""
    lines = {}
    for result in results:
        for name, rows in result["rows"].items():
            cut, unread = result["cut"][name], result["unread_words"][name]
            if cut or unread:
                words = f", and {unread} labelled words are not seen" if unread else ""
                lines[result["task"], name] = (
                    f"{result['task']}: {name}: {cut} of {rows} rows are cut at max_seq_len{words}"
                )
    return list(lines.values())


def as_text(lines: Sequence[tuple[str, ...]]) -> str:
    """Columns beside each other."""
    widths = [max(len(line[i]) for line in (HEADER, *lines)) for i in range(len(HEADER))]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n"
        for line in (HEADER, *lines)
    )


def as_markdown(lines: Sequence[tuple[str, ...]]) -> str:
    """A table of Markdown."""
    cells = [HEADER, ("---",) * len(HEADER), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)
