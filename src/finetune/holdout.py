"""A share of the training rows as a validation set, with the classes in their proportions. Imports no torch."""

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from src.common.errors import DataError

R = TypeVar("R")


def split(
    rows: Sequence[R], share: float, text_of: Callable[[R], Any], classes_of: Callable[[R], Iterable[str]]
) -> tuple[list[R], list[R]]:
    """(training rows, held-out rows), both in the order of the file.

    Rows with one text stay together. A text with several classes belongs to the rarest of them. Of each class, the
    texts with the lowest hashes are held out: ``share`` of them, rounded up or down by the hash of the class, so that
    rare classes add up to their share, too. So every seed holds out the same rows, and a new row moves only rows of its
    class across the border. No class loses its last training text. (Like the iterative stratification of Sechidis et
    al., 2011, section 4, without its running counts, which depend on all rows.)

    Args:
        text_of: what rows have in common that stay together, as JSON can write it.
        classes_of: a row's classes; rows without one are a class of their own.

    Raises:
        DataError: no row is held out.
    """
    texts: dict[float, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        texts[_fraction(text_of(row))].append(i)
    classes = {text: {name for i in group for name in classes_of(rows[i])} or {""} for text, group in texts.items()}
    left = Counter(name for names in classes.values() for name in names)
    strata = defaultdict(list)
    for text in sorted(texts):
        strata[min(classes[text], key=lambda name: (left[name], name))].append(text)
    held_out: set[int] = set()
    for name, members in sorted(strata.items()):
        count = math.floor(share * len(members) + _fraction(name))
        for text in members:
            if count and all(left[other] > 1 for other in classes[text]):
                left.subtract(classes[text])
                held_out.update(texts[text])
                count -= 1
    if not held_out:
        raise DataError(
            f"a share of {share} of {len(texts)} different texts holds out none (each class keeps one for "
            "training); give a larger share, or a file"
        )
    return [row for i, row in enumerate(rows) if i not in held_out], [rows[i] for i in sorted(held_out)]


def _fraction(value: Any) -> float:
    """A number in [0, 1) from the SHA-256 of a value."""
    return int.from_bytes(hashlib.sha256(json.dumps(value).encode()).digest()[:8], "big") / 2**64
