"""Filters that drop documents: duplicates of earlier ones, and those that share words with an evaluation set."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

HASH_BYTES = 16

BUCKET = 1 << 24
"""Hashes sorted at a time; each takes about 40 bytes of memory."""

GRAM = 13
"""Length in words of the sequences that are compared."""


def text_hash(text: str) -> bytes:
    """Hash of the text's words; ignores case, white space and Unicode form (NFKC)."""
    words = " ".join(unicodedata.normalize("NFKC", text).lower().split())
    return hashlib.blake2b(words.encode(), digest_size=HASH_BYTES).digest()


def find_duplicates(files: Sequence[Path], out: Path, bucket: int = BUCKET) -> None:
    """Mark every document that has the hash of an earlier one.

    Sorts the hashes in parts, by their first bits, so memory stays at about 40 * ``bucket`` bytes. Reads the files once
    for each part.

    Args:
        files: files of hashes from ``text_hash``, the documents in order.
        out: file to write: one bool (a byte) per document, true for a duplicate.
        bucket: hashes per part, on average at most.
    """
    total = sum(file.stat().st_size for file in files) // HASH_BYTES
    bits = max(0, (total - 1) // bucket).bit_length()
    duplicate = np.memmap(out, dtype=bool, mode="w+", shape=(total,))
    for part in range(1 << bits):
        hashes, ordinals, start = [], [], 0
        for file in files:
            pairs = np.fromfile(file, dtype="<u8").reshape(-1, 2)  # (documents, 2)
            here = np.flatnonzero(pairs[:, 0] >> np.uint64(64 - bits) == part) if bits else np.arange(len(pairs))
            hashes.append(pairs[here])
            ordinals.append(start + here)
            start += len(pairs)
        pairs, positions = np.concatenate(hashes), np.concatenate(ordinals)
        order = np.lexsort((pairs[:, 1], pairs[:, 0]))  # stable: the earliest of equal hashes comes first
        again = np.flatnonzero((pairs[order[1:]] == pairs[order[:-1]]).all(axis=1)) + 1
        duplicate[positions[order[again]]] = True
    duplicate.flush()


def words_of(text: str) -> list[str]:
    """Words as for GPT-3 (Brown et al., 2020, appendix C): lower case, no punctuation, split at white space."""
    return re.sub(r"[^\w\s]|_", "", text.lower()).split()


@lru_cache(maxsize=1 << 20)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def gram_hashes(words: Sequence[str]) -> Hashes:
    """A 64-bit hash of every ``GRAM`` consecutive words, shape (max(0, len(words) - GRAM + 1),)."""
    count = len(words) - GRAM + 1
    if count < 1:
        return np.empty(0, dtype=np.uint64)
    hashes = np.fromiter(map(_word_hash, words), dtype=np.uint64, count=len(words))
    grams = np.zeros(count, dtype=np.uint64)
    for i in range(GRAM):
        grams = grams * np.uint64(0x9E3779B97F4A7C15) + hashes[i : i + count]
    return grams


def gram_set(texts: Iterable[str]) -> tuple[Hashes, int]:
    """Sorted hashes of all ``GRAM``-word sequences of the texts, and how many texts are too short to have one."""
    grams = [gram_hashes(words_of(text)) for text in texts]
    return np.unique(np.concatenate([np.empty(0, np.uint64), *grams])), sum(not len(own) for own in grams)


def overlap(text: str, grams: Hashes) -> str | None:
    """The first ``GRAM`` consecutive words of ``text`` whose hash is in ``grams`` (sorted), or None."""
    words = words_of(text)
    own = gram_hashes(words)
    if not len(own) or not len(grams):
        return None
    at = np.searchsorted(grams, own)
    hits = np.flatnonzero(grams[np.minimum(at, len(grams) - 1)] == own)
    return " ".join(words[hits[0] : hits[0] + GRAM]) if len(hits) else None
