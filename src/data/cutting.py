"""Cutting text: a part gets the ids that the whole text has there.

WordPiece, BPE and SentencePiece do not join two words to one token, so cutting at a blank is exact (but not for the few
tokenizers that were trained to join them, such as SuperBPE's). Where a text has no blank, positions are tried: the ids
of the parts must be those of the text around.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedTokenizerFast

PIECE = 1 << 14
"""Characters. Longer documents are tokenized in pieces."""

LONGEST = 1 << 20
"""Characters that a part may be longer than asked for, to end where cutting is exact."""

WINDOW = 128
"""Characters of context before a part. BERT's longest word has 100."""

TRIED = 127
"""Characters on both sides of a position that is tried. A prime number: 128 of one character may be whole tokens of 2,
4 or 8 of them, wherever these begin in the text."""

TRIES = 16
"""Positions that are tried."""


def any_blank(text: str, low: int, high: int, find: Any) -> int:
    """The first (``find`` is str.find) or last (str.rfind) blank or line break in ``text[low:high]``, else -1."""
    found = [i for i in (find(text, " ", low, high), find(text, "\n", low, high)) if i >= 0]
    return (max if find is str.rfind else min)(found, default=-1)


def single_blank(text: str, low: int, high: int, find: Any) -> int:
    """As ``any_blank``, but only a blank between two characters that are none."""
    while (i := find(text, " ", low, high)) >= 0:
        if i and len(text[i - 1 : i + 2].split()) == 2:
            return i
        low, high = (low, i) if find is str.rfind else (i + 1, high)
    return -1


def pieces(text: str) -> Iterator[str]:
    """Consecutive parts of at most ``PIECE`` characters, cut at a blank or line break if there is one."""
    start = 0
    while len(text) - start > PIECE:
        blank = any_blank(text, start + 1, start + PIECE, str.rfind)
        end = blank if blank >= 0 else start + PIECE
        yield text[start:end]
        start = end
    yield text[start:]


@dataclass(frozen=True)
class TextEncoder:
    """Ids of a text or of parts of it, without special tokens. Can be sent to another process."""

    backend: Any
    """The tokenizers.Tokenizer, from ``tokenizer.text_backend``."""
    any_blank: bool
    """Whether white space gives no ids, as in BERT, so that a cut at any blank or line break is exact. Else only a
    single blank between two words is safe: the others join runs of white space to tokens."""
    drops_blank: bool
    """Whether the blank at a cut belongs to no part: the tokenizer puts one before each text (Llama's)."""

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerFast", special_tokens: str = "text") -> "TextEncoder":
        """For a tokenizer from ``load_tokenizer``; ``special_tokens`` as for ``text_backend``."""
        from src.data.tokenizer import text_backend

        encoder = cls(text_backend(tokenizer, special_tokens), False, False)
        ids = encoder.ids
        any_blank = not ids(" \n ") and ids("a \n b") == ids("a b")
        return cls(encoder.backend, any_blank, drops_blank=ids("a b") != ids("a") + ids(" b"))

    def ids(self, text: str) -> list[int]:
        """All ids of a text."""
        return self.backend.encode(text, add_special_tokens=False).ids

    @property
    def blank(self) -> Callable[[str, int, int, Any], int]:
        """Finds a blank at which cutting is exact."""
        return any_blank if self.any_blank else single_blank

    def part(self, text: str, start: int, end: int) -> str:
        """``text[start:end]``, to be tokenized alone."""
        return text[start + (self.drops_blank and start > 0 and text[start] == " ") : end]

    def ids_between(self, text: str, start: int, end: int) -> list[int]:
        """The ids that the text has from ``start``, a ``boundary``, to ``end``."""
        if not start or self.blank(text, start, start + 1, str.find) == start:
            return self.ids(self.part(text, start, end))
        context = min(start, WINDOW)  # a tokenizer may put a blank before its text
        encoding = self.backend.encode(text[start - context : end], add_special_tokens=False)
        return [i for i, (_, last) in zip(encoding.ids, encoding.offsets, strict=True) if last > context]

    def boundary(self, text: str, at: int, low: int, high: int, left_only: bool = False) -> int:
        """Position near ``at`` where cutting is exact: the last blank in ``text[low:at]``, else a line break there or
        one of the ``TRIES`` positions up to ``at``, else the first blank in ``text[at:high]``. Else ``high``, where
        cutting may not be exact. ``left_only``: the part after it is not used.
        """
        if at >= len(text):
            return len(text)
        if (before := self.blank(text, low, at, str.rfind)) >= 0:
            return before
        for position in (text.rfind("\n", low, at), *range(at, max(low, at - TRIES), -1)):
            if position >= 0 and self._is_exact(text, position, left_only):
                return position
        after = self.blank(text, at, high, str.find)
        return after if after >= 0 else min(high, len(text))

    def _is_exact(self, text: str, at: int, left_only: bool) -> bool:
        low, high = max(at - TRIED, 0), at + TRIED
        left, both = self.ids(text[low:at]), self.ids(text[low:high])
        if left_only:
            return both[: len(left)] == left
        return both == left + self.ids(text[at:high])

    def pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """Consecutive parts of about ``PIECE`` characters, each with whether it is the last. Their ids together are
        those of the text, if ``LONGEST`` characters never lack a place to cut."""
        start = 0
        while len(text) - start > PIECE:
            end = self.boundary(text, start + PIECE, start + 1, start + LONGEST)
            yield self.part(text, start, end), end == len(text)
            start = end
        if start < len(text) or not start:
            yield self.part(text, start, len(text)), True

    def prefix_end(self, text: str, characters: int) -> int:
        """End of a prefix of about this length whose ids are the text's first."""
        return self.boundary(text, characters, characters // 2, characters + LONGEST, left_only=True)


def encode_prefix(encoder: TextEncoder, text: str, max_tokens: int) -> list[int]:
    """The first ``max_tokens`` ids of ``text``, no special tokens. Tokenizes only a prefix that is long enough."""
    characters = 6 * max_tokens  # English has 4 to 5 characters per word piece
    while True:
        end = encoder.prefix_end(text, characters)
        ids = encoder.ids(text[:end])
        if len(ids) >= max_tokens or end == len(text):
            return ids[:max_tokens]
        characters *= 2


def encode_crop(encoder: TextEncoder, text: str, max_tokens: int, turn: int) -> list[int]:
    """Random crop: at most ``max_tokens`` consecutive ids of ``text``, no special tokens. Over the turns, every id.

    The text is cut into stretches of 8 characters per token, and the ids of a stretch into windows of ``max_tokens``.
    Only the turn's stretch is tokenized, so the work does not grow with the text. The last stretch and the last window
    overlap the ones before: they are as long as the others.
    """
    size = 8 * max_tokens  # characters: the ids of one or two windows
    stretches = max(1, -(-len(text) // size))
    stop = min((turn % stretches + 1) * size, len(text))
    start, stop = (encoder.boundary(text, at, max(at - size, 0), at, True) for at in (max(stop - size, 0), stop))
    ids = encoder.ids_between(text, start, stop)
    windows = max(1, -(-len(ids) // max_tokens))
    end = min((turn // stretches % windows + 1) * max_tokens, len(ids))
    return ids[max(end - max_tokens, 0) : end]
