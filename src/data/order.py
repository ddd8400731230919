"""The order of samples within an epoch, and which process and worker gets which of them."""

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


def partition(
    num_samples: int,
    num_canonical_nodes: int,
    num_physical_nodes: int,
    ranks_per_node: int,
    workers_per_rank: int,
    batch_size: int,
    drop_first: int = 0,
    initial_physical_nodes: int | None = None,
) -> NDArray[np.int64]:
    """The positions of an epoch, each once, dealt out to workers; for any world size the same global batches.

    The epoch's order takes a sample of each canonical node in turn. A global batch is its next
    ``batch_size * ranks`` samples, dealt out to the nodes, then to their ranks. The last global batch has what is left.

    Streaming's own partitions have the same order, but repeat samples at the end of the epoch, others on each number of
    processes, and refuse canonical nodes that are no multiple or divisor of the nodes.

    Args:
        num_samples: samples of the epoch.
        num_canonical_nodes: nodes that the order is computed for.
        num_physical_nodes, ranks_per_node, workers_per_rank: the processes of this run.
        batch_size: samples of a rank in a global batch.
        drop_first: samples that were trained before a restart.
        initial_physical_nodes: no effect; streaming passes it.

    Returns:
        (nodes, ranks per node, workers per rank, batches per worker, batch_size), -1 where there is no sample.
    """
    starts = np.arange(num_canonical_nodes + 1) * num_samples // num_canonical_nodes
    longest = -(-num_samples // num_canonical_nodes)
    ids = (np.arange(longest)[:, None] + starts[:-1]).ravel()
    # Canonical nodes differ by at most one sample, so only the last turn has gaps.
    last = ids[-num_canonical_nodes:]
    present = last[last < starts[1:]]
    last[: len(present)] = present
    ids = ids[drop_first:num_samples]
    batches = -(-len(ids) // (batch_size * num_physical_nodes * ranks_per_node))
    turns = -(-batches // workers_per_rank)
    shape = turns, workers_per_rank, batch_size, ranks_per_node, num_physical_nodes
    dealt = np.full(shape, -1)
    dealt.reshape(-1)[: len(ids)] = ids
    return dealt.transpose(4, 3, 1, 0, 2)


def filling_worker(num_samples: int, rank: int, num_ranks: int, workers: int, batch_size: int) -> int | None:
    """The worker of a rank that adds an empty sample to the rank's last batch; None if none does.

    All ranks then have the same number of samples in the last batch, and the same number of microbatches: ranks with
    fewer would leave the others waiting.

    Args:
        num_samples: samples that are left of the epoch, over all ranks.
        rank: this rank's place in the order in which samples are dealt out.
        num_ranks, workers: ranks, and workers of each.
        batch_size: samples of a rank in a global batch.
    """
    batches, left = divmod(num_samples, batch_size * num_ranks)
    return batches % workers if 0 < left % num_ranks <= rank else None


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
