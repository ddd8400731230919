"""The order of samples within an epoch."""

import numpy as np
from numpy.typing import NDArray


def occurrences(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each id stood before in ``ids``: [7, 5, 7, 7] gives [0, 0, 1, 2]."""
    order = np.argsort(ids, kind="stable")  # merges runs, which these are: quick
    ranked = ids[order]
    first = np.flatnonzero(np.diff(ranked, prepend=ranked[:1] - 1))
    counts = np.empty_like(ids)
    counts[order] = np.arange(len(ids)) - np.repeat(first, np.diff(first, append=len(ids)))
    return counts


def group_lengths(
    lengths: NDArray[np.uint16], nodes: int, batch: int, window: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """An order in which global batches are of like length: the (N,) positions of a shuffled epoch, permuted.

    Streaming deals the epoch out in equal parts to ``nodes`` canonical nodes, and a global batch takes the next few
    samples of each. So each part is cut into windows of ``window`` batches and sorted by length in each window (ties
    stay as they were shuffled); then a window's batches are permuted, in the same way for all nodes, so that what a
    batch takes from each is of like length. A node's samples stay sorted, and are dealt out to its ranks in turn: with
    one canonical node the tokens of two ranks differ by less than two samples of a batch do. What fills no batch stays
    at the end.

    Args:
        lengths: (N,) of samples in shuffled order.
        nodes: canonical nodes.
        batch: samples of a canonical node in a global batch.
        window: batches, as many as to sort together.
        rng: orders the batches of a window.
    """
    samples = len(lengths)
    order = np.arange(samples)
    batches = samples // nodes // batch
    for first in range(0, batches, window):
        count = min(window, batches - first)
        permuted = rng.permutation(count)
        for node in range(nodes):
            begin = samples * node // nodes + first * batch
            sorted_ = np.argsort(lengths[begin : begin + count * batch], kind="stable")
            order[begin : begin + count * batch] = begin + sorted_.reshape(count, batch)[permuted].ravel()
    return order
