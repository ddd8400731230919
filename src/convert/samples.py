"""Documents -> samples of tokens."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from src.convert.stats import Stats
from src.data.cutting import PIECE, pieces, word_boundary
from src.data.tokenizer import tokenizer_fingerprint

BATCH = 256
"""Texts, or pieces of text, tokenized per call."""


class Tokens:
    """Tokenizes documents and packs them into samples. Can be sent to another process.

    Args:
        name: name or folder of the tokenizer, for the description.
        tokenizer: from ``load_tokenizer``.
        max_seq_len: longest sample in tokens, [CLS] and [SEP] included.
        pack: ``truncate`` keeps the beginning of a document; ``chunk`` cuts all of it into consecutive samples.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerFast, max_seq_len: int, pack: str):
        self.max_seq_len, self.pack = max_seq_len, pack
        # uint16 takes half the bytes on disk and in memory; most vocabularies fit.
        self.dtype = np.dtype("<u2" if len(tokenizer) <= 2**16 else "<u4")
        self.cls: Any = tokenizer.cls_token_id
        self.sep: Any = tokenizer.sep_token_id
        self.backend: Tokenizer = tokenizer.backend_tokenizer
        self.description: dict[str, Any] = {  # training checks it before it reads the shards
            "tokenizer": name,
            "fingerprint": tokenizer_fingerprint(tokenizer),
            "vocab_size": len(tokenizer),
            "max_seq_len": max_seq_len,
            "pack": pack,
            "dtype": self.dtype.name,
        }

    def samples(self, texts: Iterator[str], stats: Stats) -> Iterator[NDArray[Any]]:
        """Samples of shape (length,), [CLS] and [SEP] included. Adds to ``stats.cut_characters``."""
        return self._truncated(texts, stats) if self.pack == "truncate" else self._chunks(texts)

    def _framed(self, ids: Any) -> NDArray[Any]:
        sample = np.empty(len(ids) + 2, self.dtype)
        sample[0], sample[1:-1], sample[-1] = self.cls, ids, self.sep
        return sample

    def _chunks(self, texts: Iterator[str]) -> Iterator[NDArray[Any]]:
        room = self.max_seq_len - 2
        parts = ((piece, last) for text in texts for piece, last in pieces(text))
        left = np.empty(0, self.dtype)
        while batch := list(itertools.islice(parts, BATCH)):
            encodings = self.backend.encode_batch([piece for piece, _ in batch], add_special_tokens=False)
            for encoding, (_, last) in zip(encodings, batch, strict=True):
                ids = np.concatenate([left, np.array(encoding.ids, self.dtype)])
                end = len(ids) if last else len(ids) // room * room
                for start in range(0, end, room):
                    yield self._framed(ids[start : min(start + room, end)])
                left = ids[end:]

    def _truncated(self, texts: Iterator[str], stats: Stats) -> Iterator[NDArray[Any]]:
        while batch := list(itertools.islice(texts, BATCH)):
            for ids, cut in self._beginnings(batch):
                stats.cut_characters += cut
                if ids:
                    yield self._framed(ids)

    def _beginnings(self, texts: list[str]) -> list[tuple[list[int], int]]:
        """For each text: its first ids, and the number of characters after them.

        Tokenizes a prefix only. If that gives too few ids, tries a prefix of twice the length.
        """
        room = self.max_seq_len - 2
        found: list[tuple[list[int], int]] = [([], 0)] * len(texts)
        todo, characters = list(range(len(texts))), 6 * room  # English has 4 to 5 characters per word piece
        while todo:
            ends = [word_boundary(texts[i], characters, 1, max(characters, PIECE)) for i in todo]
            prefixes = [texts[i][:end] for i, end in zip(todo, ends, strict=True)]
            short = []
            encodings = self.backend.encode_batch(prefixes, add_special_tokens=False)
            for i, end, encoding in zip(todo, ends, encodings, strict=True):
                if len(encoding) >= room:
                    found[i] = encoding.ids[:room], len(texts[i]) - encoding.offsets[room - 1][1]
                elif end == len(texts[i]):
                    found[i] = encoding.ids, 0
                else:
                    short.append(i)
            todo, characters = short, 2 * characters
        return found
