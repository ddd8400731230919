"""Documents to leave out: copies of earlier ones, and those that share words with an evaluation set."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

BUCKET = 1 << 24
"""Hashes sorted at once; about 40 bytes of memory each."""

GRAM = 13
"""Words in a row that mark an overlap."""

# ----------------------------------------------------------------------------------------------------------------------
# Duplicates
# ----------------------------------------------------------------------------------------------------------------------


def text_hash(text: str) -> bytes:
    """16 bytes of the text's words, whatever their case, white space and Unicode form (NFKC)."""
    words = " ".join(unicodedata.normalize("NFKC", text).lower().split())
    return hashlib.blake2b(words.encode(), digest_size=16).digest()


def find_duplicates(files: Sequence[Path], out: Path, bucket: int = BUCKET) -> int:
    """Mark every document whose hash an earlier one has.

    Sorted in parts by the first bits of the hash, so that memory stays at about 40 * ``bucket`` bytes; the files are
    read once for each part.

    Args:
        files: of 16-byte hashes, the documents in order.
        out: written: a bool (one byte) for each document, true for a duplicate.

    Returns:
        How many.
    """
    total = sum(file.stat().st_size for file in files) // 16
    bits = max(0, (total - 1) // bucket).bit_length()
    duplicate = np.memmap(out, dtype=bool, mode="w+", shape=(total,))
    found = 0
    for part in range(1 << bits):
        hashes, ordinals, start = [], [], 0
        for file in files:
            pairs = np.fromfile(file, dtype="<u8").reshape(-1, 2)  # (documents, 2)
            here = np.flatnonzero(pairs[:, 0] >> np.uint64(64 - bits) == part) if bits else np.arange(len(pairs))
            hashes.append(pairs[here])
            ordinals.append(start + here)
            start += len(pairs)
        pairs, positions = np.concatenate(hashes), np.concatenate(ordinals)
        order = np.lexsort((pairs[:, 1], pairs[:, 0]))  # stable: of equal hashes the earliest document comes first
        again = np.flatnonzero((pairs[order[1:]] == pairs[order[:-1]]).all(axis=1)) + 1
        duplicate[positions[order[again]]] = True
        found += len(again)
    duplicate.flush()
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Contamination
# ----------------------------------------------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """Words as GPT-3 counts them (Brown et al., 2020, appendix C): lower case, between white space, no punctuation."""
    return re.sub(r"[^\w\s]|_", "", text.lower()).split()


@lru_cache(maxsize=1 << 20)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def gram_hashes(words: Sequence[str]) -> Hashes:
    """A 64-bit hash for each ``GRAM`` words in a row: (max(0, words - GRAM + 1),)."""
    count = len(words) - GRAM + 1
    if count < 1:
        return np.empty(0, dtype=np.uint64)
    hashes = np.fromiter(map(_word_hash, words), dtype=np.uint64, count=len(words))
    grams = np.zeros(count, dtype=np.uint64)
    for i in range(GRAM):
        grams = grams * np.uint64(0x9E3779B97F4A7C15) + hashes[i : i + count]
    return grams


def gram_set(texts: Iterable[str]) -> tuple[Hashes, int]:
    """The sorted hashes of all ``GRAM``-word sequences of the texts, and how many texts are too short to have one."""
    grams = [gram_hashes(words_of(text)) for text in texts]
    return np.unique(np.concatenate([np.empty(0, np.uint64), *grams])), sum(not len(own) for own in grams)


def overlap(text: str, grams: Hashes) -> str | None:
    """The first ``GRAM`` words of ``text`` that are among ``grams`` (sorted), or None."""
    words = words_of(text)
    own = gram_hashes(words)
    if not len(own) or not len(grams):
        return None
    at = np.searchsorted(grams, own)
    hits = np.flatnonzero(grams[np.minimum(at, len(grams) - 1)] == own)
    return " ".join(words[hits[0] : hits[0] + GRAM]) if len(hits) else None
