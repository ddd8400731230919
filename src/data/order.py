"""The order of samples within an epoch."""

import numpy as np
from numpy.typing import NDArray


def occurrences(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each id has occurred before: [7, 5, 7, 7] gives [0, 0, 1, 2]."""
    order = np.argsort(ids, kind="stable")  # fast, as ids are sorted in runs
    ranked = ids[order]
    first = np.flatnonzero(np.diff(ranked, prepend=ranked[:1] - 1))
    counts = np.empty_like(ids)
    counts[order] = np.arange(len(ids)) - np.repeat(first, np.diff(first, append=len(ids)))
    return counts


def group_lengths(
    lengths: NDArray[np.uint16], nodes: int, batch: int, window: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Group by length: permuted positions (N,) of a shuffled epoch, in which global batches have similar lengths.

    Streaming gives each canonical node an equal part of the epoch, and a global batch takes the next samples of each.
    Each part is cut into windows of ``window`` batches, and each window is sorted by length (ties keep their order).
    Then the batches of a window are permuted, in the same way for all nodes. Within a batch, a node's samples stay
    sorted and go to its ranks in turn: with one canonical node, the tokens of two ranks differ by at most the range of
    lengths in the batch. Samples that fill no batch stay at the end.

    Args:
        lengths: of samples in shuffled order, (N,).
        nodes: canonical nodes.
        batch: samples of a canonical node in a global batch.
        window: global batches that are sorted together.
        rng: permutes the batches of a window.
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
