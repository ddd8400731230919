"""Padded batch -> microbatches for the device, cut on the CPU. Needs neither Composer nor streaming.

Letters: B sequences, S longest length in the batch, T tokens (padding never counts), M masked tokens.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from src.bert_padding import Layout
from src.data.balance import partition
from src.data.packing import Counts, Microbatch, SplitBatch, pack
from src.masked_lm_loss import IGNORED

Batch = dict[str, Any]
"""A padded batch of ``MaskingCollator``."""


class MaskedCount(int):
    """A number of masked tokens, as Composer weights a microbatch's loss: by count / count of the global batch.

    0 / 0 is 0, so a global batch without masked tokens has the loss 0, and a rank without any counts none.
    """

    def __truediv__(self, total: float) -> float:
        return int(self) / total if self else 0.0


class SplittingCollator:
    """Samples -> a batch that is masked and split, for the loader's workers: the main process only hands it out.

    Args:
        mask: samples -> padded, masked batch.
        split: ``split_padded`` or ``split_unpadded``, with its options.
        microbatch_size: sequences in a microbatch.
    """

    def __init__(
        self,
        mask: Callable[[Sequence[Any]], Batch],
        split: Callable[[Batch, int], SplitBatch],
        microbatch_size: int,
    ):
        self.mask, self.split, self.microbatch_size = mask, split, microbatch_size

    def __call__(self, samples: Sequence[Any]) -> SplitBatch:
        return self.split(self.mask(samples), self.microbatch_size)


def split_padded(batch: Batch, microbatch_size: int) -> SplitBatch:
    """Cut a padded, masked batch (B, S) into padded microbatches, each as long as its longest sequence.

    ``microbatch_size``: sequences in a microbatch.
    """
    arrays = {name: batch[name].numpy() for name in ("input_ids", "attention_mask", "labels")}
    arrays |= {name: arrays[name].astype(np.int32) for name in ("input_ids", "attention_mask")}
    lengths, parts, counts = arrays["attention_mask"].sum(axis=1), [], []
    counted, masked = _counted(batch, lengths), (arrays["labels"] >= 0).sum(axis=1)
    for rows in partition(torch.from_numpy(lengths), microbatch_size):
        rows, S = rows.numpy(), int(lengths[rows].max())
        parts.append({name: x[rows, :S] for name, x in arrays.items()})
        counts.append(_counts(counted[rows], masked[rows].sum(), S))
    return pack(parts, counts, counts_of(batch))


def split_unpadded(
    batch: Batch,
    microbatch_size: int,
    tables_of: Callable[[Layout], dict[int, Tensor]] | None = None,
    tokens: int | None = None,
) -> SplitBatch:
    """Cut a padded batch (B, S) into unpadded microbatches, each with its layout. Nothing may slice them later.

    Args:
        batch: padded and masked.
        microbatch_size, tokens: sequences, and tokens, that a microbatch may have (``balance.partition``).
        tables_of: makes the tile tables of a layout (``attention_tiles.tile_tables``); optional.
    """
    mask_BS = batch["attention_mask"].numpy().astype(bool)
    lengths_B = mask_BS.sum(axis=1)
    rows = [part.numpy() for part in partition(torch.from_numpy(lengths_B), microbatch_size, tokens)]
    # Longest first: neighbours of one length share an attention tile, and a GPU's last tiles are its smallest.
    order = np.concatenate([part[np.argsort(-lengths_B[part], kind="stable")] for part in rows])
    mask_BS, lengths_B, counted_B = mask_BS[order], lengths_B[order], _counted(batch, lengths_B)[order]
    ids_T, labels_T = (batch[name].numpy()[order][mask_BS] for name in ("input_ids", "labels"))
    masked_M = np.flatnonzero(labels_T >= 0)
    cu_seqlens = np.concatenate([[0], lengths_B.cumsum()])

    # Where each microbatch begins, and the last one ends, in sequences, tokens and masked tokens.
    at_B = np.cumsum([0, *map(len, rows)])
    at_T = cu_seqlens[at_B]
    at_M = np.searchsorted(masked_M, at_T)
    ids_T, labels_M = ids_T.astype(np.int32), labels_T[masked_M]
    tables = {} if tables_of is None else _tables(tables_of, cu_seqlens, at_T)
    parts: list[dict[str | int, NDArray[Any]]] = []
    counts = []
    for i, ((b, b_end), (t, t_end), (m, m_end)) in enumerate(
        zip(pairwise(at_B), pairwise(at_T), pairwise(at_M), strict=True)
    ):
        part = {"input_ids": ids_T[t:t_end], "labels": labels_M[m:m_end], "masked_index": masked_M[m:m_end] - t}
        part["cu_seqlens"] = (cu_seqlens[b : b_end + 1] - t).astype(np.int32)
        parts.append({**part, **{size: table[i] for size, table in tables.items()}})
        counts.append(_counts(counted_B[b:b_end], m_end - m, int(lengths_B[b])))
    return pack(parts, counts, counts_of(batch))


def _tables(
    tables_of: Callable[[Layout], dict[int, Tensor]], cu_seqlens: NDArray[np.int64], at_T: NDArray[np.int64]
) -> dict[int, list[NDArray[np.int32]]]:
    """The tile tables of each microbatch, cut from those of the whole batch, which is faster than one by one."""
    layout = Layout(torch.from_numpy(cu_seqlens.astype(np.int32)), int(np.diff(cu_seqlens).max(initial=0)))
    tables = {}
    for size, table in tables_of(layout).items():
        whole = table.numpy()
        owner = np.searchsorted(at_T, whole[:, 0], side="right") - 1
        whole = whole[np.argsort(owner, kind="stable")]  # within a microbatch still longest first
        whole[:, 0] -= at_T[np.sort(owner)].astype(np.int32)
        tables[size] = np.split(whole, np.bincount(owner, minlength=len(at_T) - 1).cumsum()[:-1])
    return tables


def counts_of(batch: Batch | SplitBatch | Microbatch) -> Counts:
    """The counts of a padded batch, or of one that holds them."""
    if isinstance(batch, SplitBatch | Microbatch):
        return batch.counts
    lengths = _counted(batch, batch["attention_mask"].numpy().sum(axis=1))
    masked = (batch["labels"].numpy() >= 0).sum() if "labels" in batch else 0  # a scheduled rate makes labels later
    streams = np.bincount(batch["stream"].numpy().squeeze(1), lengths).astype(int) if "stream" in batch else ()
    return _counts(lengths, masked, batch["attention_mask"].shape[1], dict(enumerate(map(int, streams))))


def _counted(batch: Batch, lengths_B: NDArray[np.int64]) -> NDArray[np.int64]:
    """Lengths, 0 for a filler."""
    return np.where(batch["filler"].numpy().squeeze(1), 0, lengths_B) if "filler" in batch else lengths_B


def _counts(lengths_B: NDArray[np.int64], masked: Any, S: int, stream_tokens: dict[int, int] | None = None) -> Counts:
    samples, tokens, squares = np.count_nonzero(lengths_B), lengths_B.sum(), (lengths_B.astype(np.int64) ** 2).sum()
    positions = len(lengths_B) * S
    return Counts(int(samples), int(tokens), int(masked), positions, S, int(squares), stream_tokens or {})


def num_samples(batch: Batch | SplitBatch | Microbatch) -> int:
    """Sequences of a batch or microbatch, without fillers."""
    return counts_of(batch).num_samples


def num_tokens(batch: Batch | SplitBatch | Microbatch) -> dict[str, int]:
    """Tokens of a batch or microbatch ("total"), and tokens with a loss ("loss_generating")."""
    counts = counts_of(batch)
    return {"total": counts.num_tokens, "loss_generating": MaskedCount(counts.num_masked)}


def fullest_batch(
    tokenizer: PreTrainedTokenizerFast, rate: float, batch_size: int, max_seq_len: int, tokens: int | None = None
) -> Batch:
    """A masked batch (B, S) without padding, T = B * S: the most work and memory that a batch can take.

    With fewer ``tokens``, only so many, in the fewest sequences: attention's work grows with their lengths.
    """
    T = min(tokens or batch_size * max_seq_len, batch_size * max_seq_len)
    B = -(-T // max_seq_len)
    ids = torch.full((B, max_seq_len), int(tokenizer.mask_token_id))  # pyright: ignore[reportArgumentType]
    position = torch.arange(ids.numel()).view_as(ids)
    before = (position.double() * rate).floor()  # masked tokens before it: of any part of the batch, the share is rate
    masked = ((position.double() + 1) * rate >= before + 1) & (position < T)
    return {
        "input_ids": ids,
        "attention_mask": (position < T).long(),
        "labels": torch.where(masked, ids, IGNORED),
    }
