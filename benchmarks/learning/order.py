"""The effect of grouping samples by length on padding and on the tokens of each rank, by counting.

    python -m benchmarks.learning.order [--samples 1000000] [--out benchmarks/results/order-cpu.txt]

Documents with lengths like C4's (lognormal, median 250, mean 430 tokens), cut at 128 and 512 and shuffled; global
batches of 4096 for 8 canonical nodes, dealt to 8 ranks as streaming does it; microbatches of 128. Fill is T / (B * S),
S a microbatch's longest sample. Spread is the fullest rank's tokens over the mean, averaged over steps: the other ranks
wait for it, because MosaicBERT computes no padding.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from src.data.order import group_lengths

WINDOWS = (0, 8, 64)
NODES, RANKS, GLOBAL, MICRO = 8, 8, 4096, 128


def dealt(lengths: np.ndarray[Any, Any], window: int) -> np.ndarray[Any, Any]:
    """(steps, RANKS, GLOBAL / RANKS) lengths of each step's samples on each rank, for shuffled ``lengths``."""
    if window:
        rng = np.random.default_rng(1)
        lengths = lengths[group_lengths(lengths, NODES, GLOBAL // NODES, window, rng)]
    steps = len(lengths) // GLOBAL
    flat = lengths.reshape(NODES, -1)[:, : steps * GLOBAL // NODES].T.ravel()  # one of each canonical node in turn
    return flat.reshape(steps, GLOBAL // RANKS, RANKS).transpose(0, 2, 1)


def main(argv: list[str]) -> None:
    """Print the table."""
    parser = report.parser(__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000, help="documents to count")
    parser.add_argument("--out", type=Path, help="file for what is printed")
    args, say = parser.parse_args(argv), report.Printed()
    say(f"# {report.described(report.machine('cpu'))}")
    rng = np.random.default_rng(0)
    drawn = rng.lognormal(np.log(250), np.sqrt(2 * np.log(430 / 250)), args.samples - args.samples % (NODES * GLOBAL))
    say(f"{'cut at':>8}{'window':>8}{'fill':>8}{'spread':>9}{'largest spread':>16}")
    for cut in (128, 512):
        lengths = drawn.round().clip(3, cut).astype(np.uint16)
        for window in WINDOWS:
            steps = dealt(lengths, window).astype(np.int64)
            micro = steps.reshape(*steps.shape[:2], -1, MICRO)
            fill = steps.sum() / (micro.max(axis=-1).sum() * MICRO)
            tokens = steps.sum(axis=-1)
            spread = tokens.max(axis=1) / tokens.mean(axis=1)
            say(f"{cut:8}{window:8}{fill:8.3f}{spread.mean():9.4f}{spread.max():16.4f}")
    say.write(args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
