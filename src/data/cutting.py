"""Cutting text between words: a part gets the ids that the whole text has there.

WordPiece and byte-level BPE never join two words to one token, so cutting at a blank is exact.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedTokenizerFast

PIECE = 1 << 14
"""Characters. Longer documents are tokenized in pieces."""


def word_boundary(text: str, at: int, low: int, high: int) -> int:
    """Position near ``at`` between two words: the last blank or line break in ``text[low:at]``, else the first in
    ``text[at:high]``, else ``high``; the text's length if ``at`` is past its end."""
    if at >= len(text):
        return len(text)
    before = max(text.rfind(" ", low, at), text.rfind("\n", low, at))
    if before >= 0:
        return before
    after = (text.find(" ", at, high), text.find("\n", at, high))
    return min([found for found in after if found >= 0], default=min(high, len(text)))


def pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Consecutive parts of at most ``PIECE`` characters, each with whether it is the last."""
    start = 0
    while len(text) - start > PIECE:
        end = word_boundary(text, start + PIECE, start + 1, start + PIECE)
        yield text[start:end], False
        start = end
    yield text[start:], True


def encode_prefix(tokenizer: "PreTrainedTokenizerFast", text: str, max_tokens: int) -> list[int]:
    """The first ``max_tokens`` ids of ``text``, no special tokens. Tokenizes only a prefix that is long enough."""
    characters = 6 * max_tokens  # English has 4 to 5 characters per word piece
    while True:
        end = word_boundary(text, characters, 1, len(text))
        ids = tokenizer.backend_tokenizer.encode(text[:end], add_special_tokens=False).ids
        if len(ids) >= max_tokens or end == len(text):
            return ids[:max_tokens]
        characters *= 2


def encode_crop(tokenizer: "PreTrainedTokenizerFast", text: str, max_tokens: int, turn: int) -> list[int]:
    """Random crop: at most ``max_tokens`` consecutive ids of ``text``, no special tokens. Over the turns, every id.

    The text is cut into stretches of 8 characters per token, and the ids of a stretch into windows of ``max_tokens``.
    Only the turn's stretch is tokenized, so the work does not grow with the text. The last stretch and the last window
    overlap the ones before: they are as long as the others.
    """
    size = 8 * max_tokens  # characters: the ids of one or two windows
    stretches = max(1, -(-len(text) // size))
    stop = min((turn % stretches + 1) * size, len(text))
    start, stop = (word_boundary(text, at, max(at - size, 0), at) for at in (max(stop - size, 0), stop))
    ids = tokenizer.backend_tokenizer.encode(text[start:stop], add_special_tokens=False).ids
    windows = max(1, -(-len(ids) // max_tokens))
    end = min((turn // stretches % windows + 1) * max_tokens, len(ids))
    return ids[max(end - max_tokens, 0) : end]
