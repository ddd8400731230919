"""Entities in the schemes of tags that labelled files have."""

import pytest

from src.common.errors import DataError
from src.finetune.tags import check_schemes, entities, is_tag


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O B-PER I-PER O", {("PER", 1, 3)}),
        ("B-PER B-PER I-PER", {("PER", 0, 1), ("PER", 1, 3)}),
        ("B-PER I-LOC", {("PER", 0, 1), ("LOC", 1, 2)}),  # conlleval: another type begins an entity
        ("O I-LOC I-LOC O I-PER", {("LOC", 1, 3), ("PER", 4, 5)}),
        ("O O", set()),
        ("I-PER I-PER B-PER I-PER", {("PER", 0, 2), ("PER", 2, 4)}),  # IOB1
        ("S-PER B-PER I-PER E-PER S-PER E-PER", {("PER", 0, 1), ("PER", 1, 4), ("PER", 4, 5), ("PER", 5, 6)}),
        ("B-PER E-LOC I-LOC", {("PER", 0, 1), ("LOC", 1, 2), ("LOC", 2, 3)}),  # conlleval: I after E begins one
        ("U-PER B-PER L-PER U-PER", {("PER", 0, 1), ("PER", 1, 3), ("PER", 3, 4)}),  # BILOU
        ("B-PER M-PER E-PER W-PER", {("PER", 0, 3), ("PER", 3, 4)}),  # BMEWO
        ("B I O B B", {("", 0, 2), ("", 3, 4), ("", 4, 5)}),  # without types
        ("B-a-b I-a-b", {("a-b", 0, 2)}),
    ],
)
def test_entities(tags, found):
    assert entities(tags.split()) == found


def test_what_is_a_tag():
    assert all(map(is_tag, ["O", "B", "B-PER", "S-a-b"])) and not any(map(is_tag, ["", "NOUN", "OO", "B-", "X-PER"]))


def test_sets_of_different_schemes_are_refused():
    """A wrong tag, or a set without an entity, is no other scheme."""
    iob2, iob1 = [["O", "B-A", "I-A", "B-A"], ["O"]], [["O", "I-A", "I-A", "B-A"]]
    for train, other in ((iob2, iob2), (iob1, iob1), (iob2, [*iob1, *iob2]), (iob2, [["O"]]), ([*iob1, *iob2], iob1)):
        check_schemes({"train": train, "validation": other})
    with pytest.raises(DataError, match="validation: its entities begin with I- as in IOB1 .O I-A I-A., those"):
        check_schemes({"train": iob2, "validation": iob1})
    with pytest.raises(DataError, match="validation: its entities begin with B- as in IOB2"):
        check_schemes({"train": iob1, "validation": iob2})
