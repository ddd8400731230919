"""Microbatches in one buffer: a device batch crosses from the worker, into pinned memory and to the GPU as one tensor.

Letters: B sequences, S longest length, T tokens (padding never counts), M masked tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 4
"""Of each tensor in the buffer, in int32: 16 bytes, as kernels expect of a tensor of its own."""


@dataclass(frozen=True)
class Counts:
    """What the main process reads of a batch or microbatch: Python ints, for which it never waits for a GPU.

    Fillers count as positions only.
    """

    num_samples: int
    num_tokens: int
    num_masked: int
    """Tokens with a loss."""
    positions: int
    """B * S, padding included."""
    max_seqlen: int
    """S."""
    squares: int
    """Sum of squared lengths, which attention computes."""
    stream_tokens: dict[int, int] = field(default_factory=dict)
    """Tokens of each of the mixed datasets, by its number; of a microbatch, and without a mixture, empty."""


class Plan(NamedTuple):
    """Where a microbatch lies in the buffer of its batch, and what it holds."""

    begin: int
    end: int
    """Its part of the buffer, in int32."""
    fields: dict[str | int, tuple[int, int, tuple[int, ...], torch.dtype]]
    """By name: begin and end within the part, shape, dtype. Tile tables are named by the rows of a tile."""
    counts: Counts


class Microbatch:
    """One buffer, and its tensors as views of it, so that one copy moves them all. Read by name; nobody may change it.

    Of ``split_unpadded``, its sequences longest first: ``input_ids`` (T,) int32, ``labels`` (M,) int64,
    ``masked_index`` (M,) int64 into 0..T-1, and the fields of ``Layout`` without ``indices``: nothing is padded again.
    Of ``split_padded``: ``input_ids`` and ``attention_mask`` (B, S) int32, ``labels`` (B, S) int64. Of both, the fields
    of ``Counts``.

    It is neither a mapping nor a sequence: torch and Composer would then copy, pin or move its views one by one.
    """

    def __init__(self, packed: Tensor, plan: Plan):
        self.packed, self.plan, self.counts = packed, plan, plan.counts
        tables: dict[int, Tensor] = {}
        self.values: dict[str, Any] = {**vars(plan.counts), "tables": tables}
        for name, (begin, end, shape, dtype) in plan.fields.items():
            view = packed[begin:end]
            view = view if dtype == torch.int32 else view.view(dtype)
            view = view if len(shape) == 1 else view.view(shape)
            if isinstance(name, str):
                self.values[name] = view
            else:
                tables[name] = view

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def to(self, device: torch.device | str) -> "Microbatch":
        """The same on ``device``, by one copy; the CPU does not wait for it if the buffer is pinned."""
        return Microbatch(self.packed.to(device, non_blocking=True), self.plan)

    def __deepcopy__(self, memo: Any) -> "Microbatch":
        return self  # Composer copies each microbatch before a step, in case it is changed


class SplitBatch:
    """A device batch, cut into microbatches that share one buffer: ``len``, iteration and index give them.

    A worker makes it, and torch's pin-memory thread calls ``pin_memory``.
    """

    def __init__(self, packed: Tensor, plans: list[Plan], counts: Counts):
        self.packed, self.plans, self.counts = packed, plans, counts

    @cached_property
    def microbatches(self) -> list[Microbatch]:
        return [Microbatch(self.packed[plan.begin : plan.end], plan) for plan in self.plans]

    def __len__(self) -> int:
        return len(self.plans)

    def __iter__(self) -> Iterator[Microbatch]:
        return iter(self.microbatches)

    def __getitem__(self, i: int) -> Microbatch:
        return self.microbatches[i]

    def pin_memory(self) -> "SplitBatch":
        """The same in pinned memory, from which copies to a GPU do not wait."""
        return SplitBatch(self.packed.pin_memory(), self.plans, self.counts)


def pack(parts: list[dict[str | int, NDArray[Any]]], counts_of_parts: list[Counts], counts: Counts) -> SplitBatch:
    """Copy the arrays of all microbatches, int32 or int64, into one buffer."""
    plans, words = [], 0
    for arrays, part in zip(parts, counts_of_parts, strict=True):
        fields, begin = {}, words
        for name, array in arrays.items():
            first = words - begin
            fields[name] = first, first + array.nbytes // 4, array.shape, getattr(torch, array.dtype.name)
            words += -(-array.nbytes // (4 * ALIGNMENT)) * ALIGNMENT
        plans.append(Plan(begin, words, fields, part))
    packed = np.zeros(words, np.int32)
    for arrays, plan in zip(parts, plans, strict=True):
        part = packed[plan.begin : plan.end]
        for array, (begin, end, _, _) in zip(arrays.values(), plan.fields.values(), strict=True):
            part[begin:end].view(array.dtype)[:] = array.ravel()
    return SplitBatch(torch.from_numpy(packed), plans, counts)
