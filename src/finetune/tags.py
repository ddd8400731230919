"""Entities in sequences of tags, as conlleval counts them (Tjong Kim Sang and De Meulder, 2003). Imports no torch.

A tag is O, or the place of a word in an entity and the entity's type, such as B-PER; a type may be missing (B, I, O).

    IOB2          B- begins an entity, I- continues it
    IOB1          I- begins and continues it; B- begins one that follows another of its type at once
    IOBES, BILOU  also the last word (E- or L-) and the only one (S- or U-); BMEWO has M- and W-

One rule reads all of them: it depends on two tags at a time, and not on the scheme.
"""

import re
from collections.abc import Iterable, Sequence

from src.common.errors import DataError

TAG = re.compile(r"O|([BIELSUMW])(?:-(.+))?")
SAME = {"M": "I", "L": "E", "U": "S", "W": "S"}
"""Letters of the schemes that mean the same."""

Entity = tuple[str, int, int]
"""Type, first word, word after the last."""


def is_tag(text: str) -> bool:
    """Whether a class can be counted: O, or one of the schemes' letters with or without a type."""
    return TAG.fullmatch(text) is not None


def _parts(tag: str) -> tuple[str, str]:
    """Letter (B, I, E, S or O) and type."""
    if tag == "O":
        return "O", ""
    letter, kind = tag[0], tag[2:]
    return SAME.get(letter, letter), kind


def entities(tags: Iterable[str]) -> set[Entity]:
    """The entities of a sentence. A word that cannot continue the entity before it begins one."""
    found: set[Entity] = set()
    first, before, kind = None, "O", ""
    for i, tag in enumerate([*tags, "O"]):
        letter, its_kind = _parts(tag)
        continues = letter in "IE" and before in "BI" and its_kind == kind
        if first is not None and not continues:
            found.add((kind, first, i))
            first = None
        if letter != "O" and not continues:
            first = i
        before, kind = letter, its_kind
    return found


def first_letters(sentences: Iterable[Sequence[str]]) -> dict[str, str]:
    """Letters that begin an entity which does not follow another one of its type, each with an example."""
    examples: dict[str, str] = {}
    for tags in sentences:
        spans = sorted(entities(tags), key=lambda entity: entity[1])
        ends = {(kind, after) for kind, _, after in spans}
        for kind, first, after in spans:
            if (kind, first) not in ends:
                examples.setdefault(tags[first][0], " ".join(tags[max(first - 1, 0) : after]))
    return examples


def check_schemes(sets: dict[str, Iterable[Sequence[str]]]) -> None:
    """Raises DataError if one set is in IOB1 and another in IOB2: a model that learned one is wrong about the other.

    A set counts as in one of them if all its entities begin so; single wrong tags in a set are not refused.
    """
    schemes = {name: first_letters(sentences) for name, sentences in sets.items()}
    train = schemes["train"]
    for name, letters in schemes.items():
        for mine, other, scheme in (("B", "I", "IOB1"), ("I", "B", "IOB2")):
            if set(train) == {mine} and set(letters) == {other}:
                raise DataError(
                    f"{name}: its entities begin with {other}- as in {scheme} ({letters[other]}), those of train with "
                    f"{mine}- ({train[mine]}); write both in one scheme"
                )
