"""Lines that say what a run does, on standard error, which finetune.py forwards to the terminal."""

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")

INTERVAL_S = 5.0
"""Seconds between two lines about one loop."""
SHOWN = 12
"""Classes that a line names."""


def say(line: str) -> None:
    """Print a line at once."""
    print(line, file=sys.stderr, flush=True)


def counted(items: Sequence[Item], what: str) -> Iterator[Item]:
    """The items; after the first INTERVAL_S, and then every INTERVAL_S, a line says how many are done."""
    due = time.monotonic() + INTERVAL_S
    for done, item in enumerate(items):
        if time.monotonic() >= due:
            due = time.monotonic() + INTERVAL_S
            say(f"{what}: {done:,} of {len(items):,} ({done / len(items):.0%})")
        yield item


def described(rows: int, labels: Counter[str]) -> str:
    """``1,000 rows; no 600, yes 400``: the size of a set and how often it has each label, the most frequent first."""
    most = [f"{name} {count:,}" for name, count in labels.most_common(SHOWN)]
    more = [f"{len(labels) - SHOWN} more classes"] if len(labels) > SHOWN else []
    return f"{rows:,} rows" + (f"; {', '.join(most + more)}" if most else "")
