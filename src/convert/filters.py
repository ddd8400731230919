"""Filters that drop documents: duplicates of earlier ones, and those that share words with an evaluation set.

Both compare texts in one form (``normalised``), so neither sees a difference that the other ignores.
"""

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]

Hashes = NDArray[np.uint64]

Grams = dict[int, Hashes]
"""Sorted hashes of the word sequences of evaluation sets, by their size in ``QUARTERS`` of a word."""

BUCKET = 1 << 24
"""Hashes sorted at a time; each takes about 40 bytes of memory."""

GRAM, SHORTEST = 13, 8
"""Length in words of the sequences that --decontaminate compares; a shorter text of at least ``SHORTEST`` words is
compared as a whole. Brown et al. (2020), appendix C: 8 to 13, because fewer words occur by chance."""

SHINGLE, BANDS, ROWS = 5, 11, 11
"""--dedup near: MinHash (Broder, 1997) of all sequences of ``SHINGLE`` words, in bands (Lee et al., 2022). Documents
whose sequences have the Jaccard similarity s share a band with probability 1 - (1 - s^ROWS)^BANDS: 98% at 0.9, 63% at
0.8, 0.5% at 0.5."""

NEAR = f"near: {SHINGLE} words, {BANDS} bands of {ROWS}, rensa's algorithm {RMinHash.ALGORITHM_VERSION}"
"""All that decides the hashes of --dedup near."""

QUARTERS = 4
"""The unit of lengths is a quarter of a word, see ``WITHOUT_BLANKS``."""

WITHOUT_BLANKS = {
    **dict.fromkeys(("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "BOPOMOFO"), 2),
    **dict.fromkeys(("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"), 1),
}
"""Scripts without blanks between words, by the first word of their characters' names: each character is a word of its
own, and counts as this many quarters. Words have about two characters in Chinese and Japanese, four in the others."""


def normalised(text: str) -> str:
    """A text without the differences that do not count: Unicode form (NFKC) and case."""
    return unicodedata.normalize("NFKC", text).lower()


def text_hash(text: str) -> bytes:
    """Hash (16 bytes) of the text's words; ignores case, white space and Unicode form."""
    return hashlib.blake2b(" ".join(normalised(text).split()).encode(), digest_size=16).digest()


# ----------------------------------------------------------------------------------------------------------------------
# Sequences of words
# ----------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1 << 16)
def _script(character: str) -> str:
    return unicodedata.name(character, "").split(" ", 1)[0]


class _Letters(dict[int, str | None]):
    """For str.translate: keeps white space, letters, digits and the marks on them, and drops the rest."""

    def __missing__(self, code: int) -> str | None:
        character = chr(code)
        kept = character.isspace() or unicodedata.category(character) in ("Mn", "Mc") or character.isalnum()
        kept = kept and "VARIATION SELECTOR" not in unicodedata.name(character, "")  # a mark on emoji
        alone = f" {character} " if _script(character) in WITHOUT_BLANKS else character
        self[code] = alone if kept else None  # an empty text would be slow
        return self[code]


_LETTERS = _Letters()


def words_of(text: str) -> list[str]:
    """Words as for GPT-3 (appendix C): no case, no punctuation. Characters of ``WITHOUT_BLANKS`` are words."""
    return normalised(text).translate(_LETTERS).split()


@lru_cache(maxsize=1 << 20)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def _quarters(word: str) -> int:
    return WITHOUT_BLANKS.get(_script(word), QUARTERS) if len(word) == 1 else QUARTERS


_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)


class Words:
    """The words of a text, ready for hashes of their sequences. ``size`` is the text's length in quarters of a word."""

    def __init__(self, text: str):
        self.words = words_of(text)
        n = len(self.words)
        quarters = np.fromiter(map(_quarters, self.words), np.int64, n)
        self._ends = np.cumsum(quarters)
        self._begins = self._ends - quarters
        self.size = int(self._ends[-1]) if n else 0
        hashes = np.fromiter(map(_word_hash, self.words), np.uint64, n)
        self._powers = np.cumprod(np.full(n, _BASE, np.uint64))  # all of it modulo 2^64
        shares = hashes * np.cumprod(np.full(n, _INVERSE, np.uint64))
        self._sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(shares)])

    def grams(self, size: int) -> tuple[Hashes, NDArray[np.int64]]:
        """The shortest sequence of at least ``size`` quarters from each word on: its polynomial hash, and its end."""
        ends = np.searchsorted(self._ends, self._begins + size) + 1
        ends = ends[ends <= len(self.words)]
        return (self._sums[ends] - self._sums[: len(ends)]) * self._powers[ends - 1], ends


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation sets
# ----------------------------------------------------------------------------------------------------------------------


def gram_set(texts: Iterable[str]) -> tuple[Grams, int]:
    """All sequences of ``GRAM`` words, or the whole text; and how many texts have fewer than ``SHORTEST`` words."""
    found: dict[int, list[Hashes]] = {}
    short = 0
    for words in map(Words, texts):
        if words.size < SHORTEST * QUARTERS:
            short += 1
            continue
        size = min(GRAM * QUARTERS, words.size)
        found.setdefault(size, []).append(words.grams(size)[0])
    return {size: np.unique(np.concatenate(hashes)) for size, hashes in sorted(found.items())}, short


def overlap(text: str, grams: Grams) -> str | None:
    """The first of the longest sequences of words that ``text`` shares with the evaluation sets, or None."""
    words = Words(text)
    for size in sorted(grams, reverse=True):
        (own, ends), known = words.grams(size), grams[size]
        at = np.searchsorted(known, own)
        hits = np.flatnonzero(known[np.minimum(at, len(known) - 1)] == own)
        if len(hits):
            return " ".join(words.words[hits[0] : ends[hits[0]]])
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Duplicates
# ----------------------------------------------------------------------------------------------------------------------


def band_keys(text: str) -> bytes:
    """``BANDS`` hashes of 8 bytes. Texts that share one in the same place are near duplicates."""
    words = Words(text)
    if not words.size:  # punctuation only
        return text_hash(text)[:8] * BANDS
    shingles, _ = words.grams(min(SHINGLE * QUARTERS, words.size))
    offsets = np.array([0, len(shingles)], np.uint64)
    minima = RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets, num_perm=BANDS * ROWS, seed=17)
    bands = np.array(minima.to_rows(), "<u4").reshape(BANDS, ROWS)
    return b"".join(hashlib.blake2b(band.tobytes(), digest_size=8).digest() for band in bands)


class Method(NamedTuple):
    """How --dedup compares documents: those that share one of their keys are duplicates."""

    keys: Callable[[str], bytes]
    """The keys of a text, one after another."""
    widths: tuple[int, ...]
    """Length of each key, in words of 8 bytes."""

    @property
    def bytes(self) -> int:
        """Length of a document's keys."""
        return 8 * sum(self.widths)


METHODS = {"exact": Method(text_hash, (2,)), "near": Method(band_keys, (1,) * BANDS)}


def find_duplicates(files: Sequence[Path], method: Method, out: Path, bucket: int = BUCKET) -> None:
    """Mark every document that shares a key with an earlier one.

    Sorts the first keys of all documents, then the second ones; each in parts, by their first bits, so memory stays at
    about 40 * ``bucket`` bytes. Reads these keys once for each part.

    Args:
        files: the documents' keys, in order. In each file, all first keys come before all second ones.
        out: file to write: one bool (a byte) per document, true for a duplicate.
        bucket: keys per part, on average at most.
    """
    counts = [file.stat().st_size // method.bytes for file in files]
    bits = max(0, (sum(counts) - 1) // bucket).bit_length()
    duplicate = np.memmap(out, dtype=bool, mode="w+", shape=(sum(counts),))
    for i, width in enumerate(method.widths):
        before = 8 * sum(method.widths[:i])
        for part in range(1 << bits):
            found, ordinals, start = [], [], 0
            for file, count in zip(files, counts, strict=True):
                keys = np.fromfile(file, "<u8", count * width, offset=count * before).reshape(count, width)
                here = np.flatnonzero(keys[:, 0] >> np.uint64(64 - bits) == part) if bits else np.arange(count)
                found.append(keys[here])
                ordinals.append(start + here)
                start += count
            keys, positions = np.concatenate(found), np.concatenate(ordinals)
            order = np.lexsort(keys.T[::-1])  # stable: the earliest of equal keys comes first
            again = np.flatnonzero((keys[order[1:]] == keys[order[:-1]]).all(axis=1)) + 1
            duplicate[positions[order[again]]] = True
    duplicate.flush()
