"""Padded batch -> the microbatches that training sends to the device, on the CPU. Needs neither Composer nor streaming.

    split_unpadded              without padding, with their layout
    split_padded                padded, for models that pad
    num_samples, num_tokens     of a batch or microbatch

Letters: B sequences, S longest length in the batch, T real tokens, M masked tokens.
"""

from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from src.bert_padding import tile_tables
from src.masked_lm_loss import IGNORED

Batch = dict[str, Any]


def split_padded(batch: Batch, microbatch_size: int) -> list[Batch]:
    """Cut a padded batch (B, S) into padded microbatches, each no longer than its longest sequence, on the CPU.

    Counts are Python ints, so that asking for them never waits for a GPU: ``num_samples``, ``num_tokens`` (real ones),
    and ``num_masked``, those that carry loss. In a batch without a single one, the first microbatch counts 1, because
    Composer divides by their sum; its loss is 0.
    """
    microbatches = []
    for start in range(0, len(batch["input_ids"]), microbatch_size):
        rows = slice(start, start + microbatch_size)
        lengths = batch["attention_mask"][rows].sum(dim=1)
        part: Batch = {name: x[rows, : int(lengths.max())] for name, x in batch.items()}
        part["num_samples"] = len(lengths)
        part["num_tokens"] = int(lengths.sum())
        part["num_masked"] = int((part["labels"] >= 0).sum())
        microbatches.append(part)
    if not any(part["num_masked"] for part in microbatches):
        microbatches[0]["num_masked"] = 1
    return microbatches


def split_unpadded(batch: Batch, microbatch_size: int, tile_sizes: Iterable[int] = ()) -> list[Batch]:
    """Cut a padded batch into microbatches of real tokens, each with its layout, on the CPU.

    Nothing slices a layout afterwards.

    Args:
        batch: what ``split_padded`` takes, or a microbatch that comes back as it is.
        microbatch_size: sequences in a microbatch.
        tile_sizes: rows of the attention kernels' tiles (``flash_attn_triton.TILE_ROWS``), to make their tables here.

    Returns:
        For each microbatch, its sequences sorted by length: ``input_ids`` (T,), ``labels`` (M,), ``masked_index`` (M,)
        int64 into 0..T-1, ``indices`` (T,) int64 into the flattened (B * S), ``cu_seqlens`` (B + 1,) int32, the int
        ``max_seqlen``, the counts of ``split_padded``, and with ``tile_sizes`` the ``tables`` of ``tile_tables``.

    Raises:
        ValueError: ``batch`` is a microbatch already, and larger than ``microbatch_size``.
    """
    if "cu_seqlens" in batch:
        if batch["num_samples"] > microbatch_size:
            raise ValueError(f"a microbatch of {batch['num_samples']} samples cannot be cut again to {microbatch_size}")
        return [batch]
    microbatches = []
    for part in split_padded(batch, microbatch_size):
        # Longest first: neighbours of one length share an attention tile, and a GPU's last tiles are its smallest.
        lengths, order = part["attention_mask"].sum(dim=1).sort(descending=True, stable=True)
        position = torch.arange(part["input_ids"].shape[1])
        indices = (order[:, None] * len(position) + position)[position < lengths[:, None]]
        labels = part["labels"].flatten()[indices]
        masked_index = (labels >= 0).nonzero().squeeze(1)
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
        tables = tile_tables(cu_seqlens, tile_sizes)
        microbatches.append(
            {
                "input_ids": part["input_ids"].flatten()[indices],
                "labels": labels[masked_index],
                "masked_index": masked_index,
                "indices": indices,
                "cu_seqlens": cu_seqlens,
                "max_seqlen": int(lengths.max()),
                **{name: part[name] for name in ("num_samples", "num_tokens", "num_masked")},
                **({"tables": tables} if tables else {}),
            }
        )
    return microbatches


def num_samples(batch: Batch) -> int:
    """Sequences of a batch or microbatch."""
    return batch["num_samples"] if "num_samples" in batch else len(batch["input_ids"])


def num_tokens(batch: Batch) -> dict[str, int]:
    """Real tokens of a batch or microbatch ("total"), and those that carry loss ("loss_generating")."""
    if "num_tokens" in batch:
        return {"total": batch["num_tokens"], "loss_generating": batch["num_masked"]}
    masked = int((batch["labels"] >= 0).sum()) if "labels" in batch else 0  # no labels yet: the rate is scheduled
    return {"total": int(batch["attention_mask"].sum()), "loss_generating": masked}


def fullest_batch(tokenizer: PreTrainedTokenizerFast, rate: float, batch_size: int, max_seq_len: int) -> Batch:
    """A padded, masked batch (B, S) without padding, T = B * S: the most that a batch can ask of a device."""
    shape = (batch_size, max_seq_len)
    ids = torch.full(shape, int(tokenizer.mask_token_id))  # pyright: ignore[reportArgumentType]
    masked = torch.arange(batch_size * max_seq_len).reshape(shape) % 100 < round(100 * rate)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.where(masked, ids, IGNORED)}
