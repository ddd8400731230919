"""Samples -> masked, padded batches.

Letters: B samples, S longest length in the batch, T tokens without padding.
"""

from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from src.data.microbatches import Batch
from src.data.tokenizer import continues_word, special_ids, vocab_size, word_ids
from src.masked_lm_loss import IGNORED

EVALUATION_SEED = 17
"""Seed of evaluation's masks, whatever the run's seed: runs of any seeds are compared on the same masked tokens."""


class Sample(TypedDict):
    """What a dataset yields, before padding and masking."""

    input_ids: NDArray[Any]
    """Ids (length,), [CLS] and [SEP] included, any integer type."""
    sample_id: int
    """Position in the dataset, the same for any shuffle and world size; mixed datasets follow each other. The k-th draw
    of a sample within an epoch (from 0) adds k * dataset size, so every draw is masked differently. -1: a filler, which
    is not counted (``streaming.RepairedDataset``)."""
    epoch: int
    """Pass over the data, from 0. Seed, epoch and sample id decide what is masked."""
    stream: NotRequired[int]
    """Which of the mixed datasets it is from; absent if there is one."""


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function (Steele, Lea and Flood, 2014, figure 15): each input bit affects each output bit."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def counter_hash(
    seed: int, epochs: NDArray[np.int64], sample_ids: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """64 random bits for each position of each sample: (T,), a pure function of epochs, sample ids and lengths (B,)."""
    key = _mix(np.full(len(lengths), seed).astype(np.uint64))
    key = _mix(_mix(key ^ epochs.astype(np.uint64)) ^ sample_ids.astype(np.uint64))
    starts = np.cumsum(lengths) - lengths
    position = np.arange(lengths.sum()) - np.repeat(starts, lengths)
    return _mix(np.repeat(key, lengths) + position.astype(np.uint64) * _GOLDEN)


def first_pieces(
    continues: NDArray[np.bool_], is_special: NDArray[np.bool_], lengths: NDArray[np.int64]
) -> NDArray[np.int64]:
    """For each token, the index of its word's first piece: (T,), of tokens (T,) in samples of these lengths (B,)."""
    begins = ~continues
    begins[1:] |= is_special[:-1]
    begins[np.cumsum(lengths) - lengths] = True
    return np.maximum.accumulate(np.where(begins, np.arange(len(begins)), 0))


class MaskingCollator:
    """Samples -> padded batch, masked as in BERT (Devlin et al., 2019, section 3.1).

    u = hash(seed, epoch, sample id, position) in [0, 1); a position is masked if u < rate, except special tokens. 80%
    of the masked tokens become [MASK], 10% a random word of the tokenizer, 10% stay. Masks do not depend on workers,
    ranks, batch sizes or restarts; those of a lower rate are a subset of those of a higher one.

    With ``whole_words``, all pieces of a word share the u of its first piece, so a word is masked as a whole or not at
    all, and the expected share of masked tokens is still the rate. Each masked piece becomes [MASK], a random word or
    stays on its own, as in BERT's code (create_pretraining_data.py, do_whole_word_mask).

    Args:
        tokenizer: from ``load_tokenizer``.
        rate: share of positions to mask. None: ``mask_batch`` masks later, in the main process, for a rate that
            depends on the step; workers load ahead of it.
        seed: of the masks.
        whole_words: mask all pieces of a word or none. A special token ends a word, as a sample does.

    Raises:
        DataError: ``whole_words``, and the tokenizer does not mark words (``continues_word``).

    Returns:
        ``input_ids``, ``attention_mask``, ``labels``, each (B, S) int64, S the longest length in the batch. With
        ``rate=None``, in place of labels: ``mask_u`` (B, S) float64, 2 where nothing may be masked, and ``replacement``
        (B, S) int64, the id of a position if it is masked. With mixed datasets also ``stream`` (B, 1) int64; with a
        filler ``filler`` (B, 1) bool.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rate: float | None, seed: int, whole_words: bool = False):
        self.rate, self.seed = rate, seed
        self.pad_token_id, self.mask_token_id = int(tokenizer.pad_token_id), int(tokenizer.mask_token_id)  # pyright: ignore
        self.is_special = np.zeros(vocab_size(tokenizer), dtype=bool)
        self.is_special[special_ids(tokenizer)] = True
        self.words = word_ids(tokenizer)
        self.continues = continues_word(tokenizer) if whole_words else None

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        lengths = np.array([len(sample["input_ids"]) for sample in samples])
        epochs = np.array([sample["epoch"] for sample in samples])
        sample_ids = np.array([sample["sample_id"] for sample in samples])
        ids = np.concatenate([sample["input_ids"] for sample in samples]).astype(np.int64)  # (T,)
        bits = counter_hash(self.seed, epochs, sample_ids, lengths)
        draws = (
            bits if self.continues is None else bits[first_pieces(self.continues[ids], self.is_special[ids], lengths)]
        )
        u = np.where(self.is_special[ids], 2.0, (draws >> np.uint64(11)) * 2.0**-53)

        is_token = np.arange(lengths.max())[None, :] < lengths[:, None]  # (B, S), False where padded

        def pad(x: NDArray[Any], fill: float) -> Tensor:
            padded = np.full(is_token.shape, fill, dtype=x.dtype)
            padded[is_token] = x
            return torch.from_numpy(padded)

        if self.rate is None:
            fields = {"input_ids": pad(ids, self.pad_token_id), "mask_u": pad(u, 2.0)}
            fields["replacement"] = pad(self._replacements(ids, bits), self.pad_token_id)
        else:
            masked = np.flatnonzero(u < self.rate)
            inputs, labels = ids.copy(), np.full_like(ids, IGNORED)
            labels[masked] = ids[masked]
            inputs[masked] = self._replacements(ids[masked], bits[masked])
            fields = {"input_ids": pad(inputs, self.pad_token_id), "labels": pad(labels, IGNORED)}
        if (sample_ids < 0).any():
            fields["filler"] = torch.from_numpy(sample_ids < 0)[:, None]
        if "stream" in samples[0]:
            fields["stream"] = torch.tensor([[sample.get("stream", 0)] for sample in samples])
        return {**fields, "attention_mask": torch.from_numpy(is_token.astype(np.int64))}

    def _replacements(self, ids: NDArray[np.int64], bits: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Ids at masked positions: [MASK], a random word or the word itself, chosen by a second hash of their bits."""
        bits = _mix(~bits)
        choice = (bits >> np.uint64(32)) * 2.0**-32
        word = self.words[((bits & np.uint64(0xFFFFFFFF)) * np.uint64(len(self.words))) >> np.uint64(32)]
        return np.where(choice < 0.8, self.mask_token_id, np.where(choice < 0.9, word, ids))


def mask_batch(batch: Batch, rate: float) -> Batch:
    """Mask a batch collated with ``rate=None``, exactly as the collator does with this rate."""
    masked = batch["mask_u"] < rate
    return {
        "input_ids": torch.where(masked, batch["replacement"], batch["input_ids"]),
        "labels": torch.where(masked, batch["input_ids"], IGNORED),
        **{name: x for name, x in batch.items() if name not in ("input_ids", "mask_u", "replacement")},
    }
