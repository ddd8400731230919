"""Which sequences make a microbatch."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.variants import c4_like_lengths
from src.data.balance import partition


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 70), st.integers(40, 200))
def test_each_sequence_is_in_one_microbatch_within_both_limits(lengths, sequences, tokens):
    lengths = torch.tensor(lengths, dtype=torch.int64)
    parts = partition(lengths, sequences, tokens)
    assert sorted(i for part in parts for i in part.tolist()) == list(range(len(lengths)))
    assert all(part.dtype == torch.int64 and 0 < len(part) <= sequences for part in parts)
    assert all(lengths[part].sum() <= tokens for part in parts)
    again = partition(lengths.clone(), sequences, tokens)
    assert all(torch.equal(one, other) for one, other in zip(parts, again, strict=True))


@pytest.mark.parametrize(
    ("lengths", "sequences", "tokens", "number"),
    [
        ([512] * 128, 1000, 65536, 1),
        ([512] * 129, 1000, 65536, 2),
        ([128] * 512, 128, 65536, 4),  # the number of sequences is the limit
        ([300] * 4096, 4096, 599, 4096),  # at once: not by trying 2,052, 2,053 ...
        ([300] * 10 + [200] * 10, 4096, 599, 10),
        ([1] * 7, 7, 7, 1),
        ([], 4, 10, 0),
    ],
)
def test_as_few_microbatches_as_possible(lengths, sequences, tokens, number):
    assert len(partition(torch.tensor(lengths, dtype=torch.int64), sequences, tokens)) == number


def test_without_a_budget_microbatches_are_consecutive():
    assert [part.tolist() for part in partition(torch.tensor([3, 9, 1, 4, 7]), 2)] == [[0, 1], [2, 3], [4]]


def test_a_sequence_above_the_budget_is_refused():
    with pytest.raises(ValueError, match="a sequence of 12 tokens, but a microbatch may have 11"):
        partition(torch.tensor([3, 12]), 4, 11)


def test_microbatches_of_lengths_like_c4s_are_equally_large():
    """The figures of docs/data.md: a device batch of 1,024 sequences of up to 512 tokens."""
    lengths = c4_like_lengths(1024, 512)
    slices = torch.stack([lengths[part].sum() for part in partition(lengths, 128)]).double()
    budget = torch.stack([lengths[part].sum() for part in partition(lengths, 1024, 65536)]).double()
    described = [
        f"| {len(T)} | {int(T.min()):,} to {int(T.max()):,} | {T.std(correction=0) / T.mean():.2%} |"
        for T in (slices, budget)
    ]
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    assert all(line in text for line in described), described
