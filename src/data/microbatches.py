"""Padded batch -> microbatches for the device, cut on the CPU. Needs neither Composer nor streaming.

Letters: B sequences, S longest length in the batch, T tokens (padding never counts), M masked tokens.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from src.bert_padding import Layout, unpad_layout
from src.data.balance import partition
from src.masked_lm_loss import IGNORED

Batch = dict[str, Any]


class MaskedCount(int):
    """A number of masked tokens, as Composer weights a microbatch's loss: by count / count of the global batch.

    0 / 0 is 0, so a global batch without masked tokens has the loss 0, and a rank without any counts none.
    """

    def __truediv__(self, total: float) -> float:
        return int(self) / total if self else 0.0


def sequence_lengths(batch: Batch) -> Tensor:
    """(B,) int64: tokens of each sequence of a padded batch, 0 for a filler, which is not counted."""
    lengths = batch["attention_mask"].sum(dim=1)
    return lengths.where(~batch["filler"].squeeze(1), 0) if "filler" in batch else lengths


def split_padded(batch: Batch, microbatch_size: int, tokens: int | None = None) -> list[Batch]:
    """Cut a padded batch (B, S) into padded microbatches, each as long as its longest sequence.

    Args:
        batch: padded and masked.
        microbatch_size, tokens: sequences, and tokens, that a microbatch may have (``balance.partition``).

    Adds counts as Python ints, which are read without waiting for a GPU: ``num_samples``, ``num_tokens``, and
    ``num_masked``, the tokens with a loss. Fillers are not counted.
    """
    microbatches = []
    lengths_B = batch["attention_mask"].sum(dim=1)
    for rows in partition(lengths_B, microbatch_size, tokens):
        longest = int(lengths_B[rows].max())
        part: Batch = {name: x[rows][:, :longest] for name, x in batch.items()}
        counts, totals = num_samples(part), num_tokens(part)
        part |= {"num_samples": counts, "num_tokens": totals["total"], "num_masked": int(totals["loss_generating"])}
        part.pop("filler", None)
        microbatches.append(part)
    return microbatches


def split_unpadded(
    batch: Batch,
    microbatch_size: int,
    tables_of: Callable[[Layout], dict[int, Tensor]] | None = None,
    tokens: int | None = None,
) -> list[Batch]:
    """Cut a padded batch (B, S) into unpadded microbatches, each with its layout. Nothing may slice them later.

    Args:
        batch: padded and masked.
        microbatch_size, tokens: sequences, and tokens, that a microbatch may have (``balance.partition``).
        tables_of: makes the tile tables of a layout (``attention_tiles.tile_tables``); optional.

    Returns:
        For each microbatch, its sequences longest first: ``input_ids`` (T,), ``labels`` (M,), ``masked_index`` (M,)
        int64 into 0..T-1, the fields of ``Layout``, and the counts of ``split_padded``.
    """
    microbatches = []
    for part in split_padded(batch, microbatch_size, tokens):
        # Longest first: neighbours of one length share an attention tile, and a GPU's last tiles are its smallest.
        layout = unpad_layout(part["attention_mask"], longest_first=True)
        if tables_of is not None:
            layout = replace(layout, tables=tables_of(layout))
        labels = part["labels"].flatten()[layout.indices]
        masked_index = (labels >= 0).nonzero().squeeze(1)
        microbatches.append(
            {
                "input_ids": part["input_ids"].flatten()[layout.indices],
                "labels": labels[masked_index],
                "masked_index": masked_index,
                **vars(layout),
                **{name: part[name] for name in ("num_samples", "num_tokens", "num_masked")},
            }
        )
    return microbatches


def num_samples(batch: Batch) -> int:
    """Sequences of a batch or microbatch, without fillers."""
    return batch["num_samples"] if "num_samples" in batch else int((sequence_lengths(batch) > 0).sum())


def num_tokens(batch: Batch) -> dict[str, int]:
    """Tokens of a batch or microbatch ("total"), and tokens with a loss ("loss_generating")."""
    if "num_tokens" in batch:
        return {"total": batch["num_tokens"], "loss_generating": MaskedCount(batch["num_masked"])}
    masked = int((batch["labels"] >= 0).sum()) if "labels" in batch else 0  # a scheduled rate makes labels later
    return {"total": int(sequence_lengths(batch).sum()), "loss_generating": MaskedCount(masked)}


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
