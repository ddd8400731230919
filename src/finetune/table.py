"""Results of several seeds as a table: mean, standard deviation, 95% interval. Imports no torch."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

HEADER = ("task", "metric", "n", "mean", "deviation", "95% interval")


def t_quantile(freedom: int) -> float:
    """The t for which 95% of Student's distribution of ``freedom`` degrees lies between -t and t, by bisection.

    Abramowitz and Stegun, 1964, 26.7.3 and 26.7.4. Ours, because scipy is no dependency of either stack.
    """

    def share_within(t: float) -> float:
        angle = math.atan(t / math.sqrt(freedom))
        odd, cos = freedom % 2, math.cos(angle)
        total, term = 0.0, cos if odd else 1.0
        for k in range(2 if odd else 1, freedom, 2):  # the next term is this one * cos^2 * k / (k + 1)
            total += term
            term *= cos**2 * k / (k + 1)
        return (2 / math.pi) * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total

    low, high = 0.0, 1e3
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if share_within(middle) < 0.95 else (low, middle)
    return low


def summarize(values: dict[str, float]) -> dict[str, Any]:
    """``n``, ``mean``, sample standard ``deviation`` and 95% ``interval`` of the mean (Student's t) of values by seed.

    Deviation and interval are None for a single value.
    """
    n, mean = len(values), fmean(values.values())
    deviation = interval = None
    if n >= 2:
        deviation = stdev(values.values())
        half = t_quantile(n - 1) * deviation / math.sqrt(n)
        interval = [mean - half, mean + half]
    return {"n": n, "mean": mean, "deviation": deviation, "interval": interval, "values": values}


def aggregate(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The summary of each metric and of the score by task, and the mean score over tasks, from runs' result.json."""
    tasks: dict[str, Any] = {}
    for task in dict.fromkeys(result["task"] for result in results):
        runs = {str(result["seed"]): result for result in results if result["task"] == task}
        metrics: dict[str, Any] = {}
        for dataset, named in next(iter(runs.values()))["metrics"].items():
            for metric in named:
                label = metric if dataset == "validation" else f"{metric} ({dataset})"
                metrics[label] = summarize({seed: run["metrics"][dataset][metric] for seed, run in runs.items()})
        tasks[task] = {"metrics": metrics, "score": summarize({seed: run["score"] for seed, run in runs.items()})}
    return {"tasks": tasks, "average": fmean(task["score"]["mean"] for task in tasks.values()) if tasks else None}


def table_lines(aggregated: dict[str, Any]) -> list[tuple[str, ...]]:
    """HEADER and the lines below it. A score has its own line if it is the mean of several metrics."""
    lines: list[tuple[str, ...]] = [HEADER]
    for task, found in aggregated["tasks"].items():
        several = sum(not name.endswith("(test)") for name in found["metrics"]) > 1
        for name, entry in {**found["metrics"], **({"score": found["score"]} if several else {})}.items():
            deviation = "" if entry["deviation"] is None else f"{entry['deviation']:.4f}"
            interval = "" if entry["interval"] is None else "{:.4f} to {:.4f}".format(*entry["interval"])
            lines.append((task, name, str(entry["n"]), f"{entry['mean']:.4f}", deviation, interval))
    if len(aggregated["tasks"]) > 1:
        lines.append((f"{len(aggregated['tasks'])} tasks", "mean score", "", f"{aggregated['average']:.4f}", "", ""))
    return lines


def truncation_notes(results: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each set of a task that the model did not see completely."""
    notes = {}
    for result in results:
        for name, rows in result["rows"].items():
            cut, unread = result["cut"][name], result["unread_words"][name]
            words = f"; {unread} labelled words are not seen" if unread else ""
            if cut or unread:
                notes[f"{result['task']}: {name}: {cut} of {rows} rows are cut at max_seq_len{words}"] = None
    return list(notes)


def as_text(lines: Sequence[tuple[str, ...]]) -> str:
    """Aligned columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join("  ".join(map(str.ljust, line, widths)).rstrip() + "\n" for line in lines)


def as_markdown(lines: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table."""
    return "".join(f"| {' | '.join(line)} |\n" for line in (lines[0], ("---",) * len(HEADER), *lines[1:]))
