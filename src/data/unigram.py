"""The unigram baseline of masked language models."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from src.data.microbatches import Batch
from src.data.tokenizer import vocab_size, word_ids


def unigram_loss(
    samples: Iterable[NDArray[Any]], batches: Iterable[Batch], tokenizer: PreTrainedTokenizerFast
) -> float:
    """Unigram baseline: nats per masked token, add-one smoothing.

    Args:
        samples: ids (length,) of the training samples. Special tokens are not counted, as they are never masked.
        batches: masked batches of the validation set.
    """
    counts = np.ones(vocab_size(tokenizer))
    for ids in samples:
        counts += np.bincount(ids, minlength=len(counts))
    counts[np.setdiff1d(np.arange(len(counts)), word_ids(tokenizer))] = 0
    targets = np.concatenate([batch["labels"][batch["labels"] >= 0].numpy() for batch in batches])
    return float(-np.log(counts[targets] / counts.sum()).mean())
