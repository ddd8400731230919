"""Documents -> samples of tokens."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from src.convert.stats import Stats
from src.data.cutting import TextEncoder
from src.data.index import token_dtype
from src.data.tokenizer import special_words, tokenizer_fingerprint, vocab_size

BATCH = 256
"""Texts, or pieces of text, tokenized per call."""


class Tokens:
    """Tokenizes documents and packs them into samples. Can be sent to another process.

    Args:
        name: name or folder of the tokenizer, for the description.
        tokenizer: from ``load_tokenizer``.
        max_seq_len: longest sample in tokens, [CLS] and [SEP] included.
        pack: ``truncate`` keeps the beginning of a document; ``chunk`` cuts all of it into consecutive samples.
        special_tokens: what a word such as [MASK] in a text becomes (``text_backend``).
    """

    def __init__(
        self, name: str, tokenizer: PreTrainedTokenizerFast, max_seq_len: int, pack: str, special_tokens: str = "text"
    ):
        self.max_seq_len, self.pack, self.special_tokens = max_seq_len, pack, special_tokens
        self.dtype = np.dtype(token_dtype(vocab_size(tokenizer))).newbyteorder("<")
        self.cls: Any = tokenizer.cls_token_id
        self.sep: Any = tokenizer.sep_token_id
        self.unk = tokenizer.unk_token_id
        self.encoder = TextEncoder.of(tokenizer, special_tokens)
        self.special_words = special_words(tokenizer)
        self.description: dict[str, Any] = {  # training checks it before it reads the shards
            "tokenizer": name,
            "fingerprint": tokenizer_fingerprint(tokenizer),
            "vocab_size": vocab_size(tokenizer),
            "max_seq_len": max_seq_len,
            "pack": pack,
            "dtype": self.dtype.name,
        }

    def samples(self, texts: Iterator[str], stats: Stats) -> Iterator[NDArray[Any]]:
        """Samples of shape (length,), [CLS] and [SEP] included. Counts ``cut_characters``, ``special_in_text`` and
        ``unknown_characters``."""
        texts = self._counted(texts, stats)
        return self._truncated(texts, stats) if self.pack == "truncate" else self._chunks(texts, stats)

    def _counted(self, texts: Iterator[str], stats: Stats) -> Iterator[str]:
        for text in texts:
            stats.special_in_text += sum(map(text.count, self.special_words))
            yield text

    def _unknown(self, ids: list[int], encoding: Any) -> int:
        """Characters of the first ids, all or some of an encoding's, that are unknown."""
        if self.unk not in ids:
            return 0
        return sum(end - begin for i, (begin, end) in zip(ids, encoding.offsets, strict=False) if i == self.unk)

    def _framed(self, ids: list[int]) -> NDArray[Any]:
        return np.array([self.cls, *ids, self.sep], self.dtype)

    def _chunks(self, texts: Iterator[str], stats: Stats) -> Iterator[NDArray[Any]]:
        room = self.max_seq_len - 2
        parts = (part for text in texts for part in self.encoder.pieces(text))
        left: list[int] = []
        while batch := list(itertools.islice(parts, BATCH)):
            encodings = self.encoder.backend.encode_batch([piece for piece, _ in batch], add_special_tokens=False)
            for encoding, (_, last) in zip(encodings, batch, strict=True):
                found = encoding.ids
                stats.unknown_characters += self._unknown(found, encoding)
                ids = left + found
                end = len(ids) if last else len(ids) // room * room
                for start in range(0, end, room):
                    yield self._framed(ids[start : min(start + room, end)])
                left = ids[end:]

    def _truncated(self, texts: Iterator[str], stats: Stats) -> Iterator[NDArray[Any]]:
        """Tokenizes only a prefix of each text. If it gives too few ids, tries a prefix of twice the length."""
        room = self.max_seq_len - 2
        while batch := list(itertools.islice(texts, BATCH)):
            found: list[list[int]] = [[]] * len(batch)
            todo, characters = list(range(len(batch))), 6 * room  # English has 4 to 5 characters per word piece
            while todo:
                ends = [self.encoder.prefix_end(batch[i], characters) for i in todo]
                prefixes = [batch[i][:end] for i, end in zip(todo, ends, strict=True)]
                encodings = self.encoder.backend.encode_batch(prefixes, add_special_tokens=False)
                short = []
                for i, end, encoding in zip(todo, ends, encodings, strict=True):
                    found[i] = encoding.ids[:room]
                    if len(encoding) >= room:
                        stats.cut_characters += len(batch[i]) - encoding.offsets[room - 1][1]
                    elif end < len(batch[i]):
                        short.append(i)
                        continue
                    stats.unknown_characters += self._unknown(found[i], encoding)
                todo, characters = short, 2 * characters
            yield from (self._framed(ids) for ids in found if ids)
