"""Partition of an epoch: each sample once, the same global batches on any number of processes."""

import itertools

import numpy as np
import pytest
from streaming.base.partition import get_partitions

from src.data.order import filling_worker, partition

PLACES = [(1, 1, 1), (1, 2, 1), (1, 3, 2), (1, 4, 3), (2, 1, 2), (2, 2, 1), (3, 1, 1), (4, 1, 2)]
"""Nodes, ranks per node, workers per rank; a global batch is 12."""


def global_batches(samples, canonical, place, first=0):
    nodes, ranks, workers = place
    dealt = partition(samples, canonical, nodes, ranks, workers, 12 // (nodes * ranks), first)
    assert dealt.shape[:3] == place and dealt.shape[4] == 12 // (nodes * ranks)
    batches = dealt.transpose(3, 2, 0, 1, 4).reshape(-1, 12)
    return [sorted(batch[batch != -1].tolist()) for batch in batches if (batch != -1).any()]


@pytest.mark.parametrize("canonical", [1, 2, 3, 8])
@pytest.mark.parametrize("samples", [1, 2, 7, 12, 13, 301])
def test_global_batches_are_the_same_for_any_number_of_processes(samples, canonical):
    want = global_batches(samples, canonical, PLACES[0])
    assert sorted(itertools.chain(*want)) == list(range(samples))  # each once
    assert [len(batch) for batch in want] == [12] * (samples // 12) + [samples % 12] * (samples % 12 > 0)
    for place in PLACES[1:]:
        assert global_batches(samples, canonical, place) == want
        for done in range(len(want) + 1):  # restarts on other processes
            assert global_batches(samples, canonical, place, min(12 * done, samples)) == want[done:]


@pytest.mark.parametrize("place", [place for place in PLACES if 24 % (place[0] * place[1]) == 0])
def test_full_batches_are_those_of_streaming(place):
    """Checkpoints of earlier versions continue in the same order. Streaming repeats samples at the end of the epoch."""
    nodes, ranks, workers = place
    canonical, batch = 12, 24 // (nodes * ranks)
    ours = partition(301, canonical, nodes, ranks, workers, batch)
    theirs = get_partitions("relaxed", 301, canonical, nodes, ranks, workers, batch)
    assert ours.shape == theirs.shape
    for mine, other in zip(*(x.transpose(3, 2, 0, 1, 4).reshape(-1, 24) for x in (ours, theirs)), strict=True):
        assert np.array_equal(mine, other) or len(np.unique(other)) < 24 or -1 in other
    assert np.array_equal(*(x.transpose(3, 2, 0, 1, 4).reshape(-1, 24)[:12] for x in (ours, theirs)))


@pytest.mark.parametrize("place", PLACES)
def test_all_ranks_have_batches_of_one_size(place):
    nodes, ranks, workers = place
    world_size = nodes * ranks
    for samples in range(1, 50):
        dealt = partition(samples, 1, nodes, ranks, workers, 12 // world_size)
        sizes = (dealt != -1).sum(axis=4)  # (nodes, ranks, workers, batches)
        for node, rank in itertools.product(range(nodes), range(ranks)):
            worker = filling_worker(samples, rank * nodes + node, world_size, workers, 12 // world_size)
            if worker is not None:  # the filler comes after the worker's samples, so it is in its last batch
                last = np.flatnonzero(sizes[node, rank, worker]).tolist()
                batch = last[-1] if last and sizes[node, rank, worker, last[-1]] < 12 // world_size else len(last)
                sizes[node, rank, worker, batch] += 1
        assert (sizes == sizes[0, 0]).all(), samples
        assert sizes.sum() - samples == -samples % world_size
