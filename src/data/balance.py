"""Which sequences of a device batch make a microbatch.

Letters: B sequences of the batch.
"""

import heapq
from itertools import count

import torch
from torch import Tensor


def partition(lengths_B: Tensor, sequences: int, tokens: int | None = None) -> list[Tensor]:
    """Indices (int64) of the sequences of each microbatch.

    Without ``tokens``, consecutive ones. With it, as few microbatches as possible, of nearly equal numbers of tokens:
    each sequence, the longest first, goes to the microbatch with fewest tokens (longest processing time first; Graham,
    1969, doi 10.1137/0117039). If one comes out too long, that is repeated with one microbatch more, so in rare cases
    there is one more than necessary. The same lengths always give the same microbatches.

    Args:
        lengths_B: (B,) tokens of each sequence, without padding.
        sequences: most sequences of a microbatch.
        tokens: most tokens of a microbatch.

    Raises:
        ValueError: a sequence alone has more than ``tokens``.
    """
    B = len(lengths_B)
    if tokens is None:
        return list(torch.arange(B).split(sequences))
    ordered, order = lengths_B.sort(descending=True, stable=True)
    if B and ordered[0] > tokens:
        raise ValueError(f"a sequence of {int(ordered[0])} tokens, but a microbatch may have {tokens}")
    # Of the i longest, each at least as long as the i-th, a microbatch takes tokens // (length of the i-th).
    least = -(-torch.arange(1, B + 1) // (tokens // ordered.clamp(min=1)).clamp(max=sequences))
    first = max(int(least.max()) if B else 0, -(-int(ordered.sum()) // tokens))
    dealt = (_deal(ordered.tolist(), number, sequences, tokens) for number in count(first))
    return [order[part] for part in next(parts for parts in dealt if parts is not None)]


def _deal(lengths: list[int], number: int, sequences: int, tokens: int) -> list[list[int]] | None:
    """Positions in ``lengths``, longest first, of each of ``number`` microbatches; None if one would be too long."""
    parts: list[list[int]] = [[] for _ in range(number)]
    open_parts = [(0, i) for i in range(number)]  # tokens, microbatch: a heap
    for position, length in enumerate(lengths):
        total, i = open_parts[0]
        if total + length > tokens:
            return None
        parts[i].append(position)
        if len(parts[i]) < sequences:
            heapq.heapreplace(open_parts, (total + length, i))
        else:
            heapq.heappop(open_parts)
    return parts
