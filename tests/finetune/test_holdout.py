"""The share of the training rows that is held out."""

from collections import Counter

import pytest

from src.common.errors import DataError
from src.finetune import holdout


def split(rows, share):
    """Rows are pairs: text, classes."""
    return holdout.split(rows, share, lambda row: row[0], lambda row: row[1])


def test_each_class_has_its_share():
    """Within one row; rare classes add up to theirs, too; a class of one row stays in the training set."""
    sizes = {"a": 1000, "b": 95, "c": 30, "d": 2, "e": 1, **{f"rare {i}": 4 for i in range(200)}}
    rows = [(f"{name} {i}", [name]) for name, size in sizes.items() for i in range(size)]
    train, held_out = split(rows, 0.1)
    assert sorted(train + held_out) == sorted(rows) and [row for row in rows if row in train] == train
    kept, found = (Counter(row[1][0] for row in part) for part in (train, held_out))
    assert all(abs(found[name] - 0.1 * size) < 1 for name, size in sizes.items())
    assert set(kept) == set(sizes) and found["e"] == 0
    assert 60 < sum(found[name] for name in sizes if "rare" in name) < 100


def test_copies_stay_together_and_a_new_row_moves_few():
    rows = [(f"text {i % 400}", "ab"[i % 2]) for i in range(800)]
    train, held_out = split(rows, 0.25)
    assert len(held_out) == 200 and not {row[0] for row in train} & {row[0] for row in held_out}
    assert split(rows[::-1], 0.25)[1] == held_out[::-1]
    _, others = split([("new", "a"), *rows], 0.25)
    assert len(set(others) ^ set(held_out)) <= 2
    assert [row for row in others if row[1] == "b"] == [row for row in held_out if row[1] == "b"]


def test_no_class_is_held_out_altogether():
    """Rows of several classes, of which each pair occurs once: a class is in two rows only."""
    names = [f"class {i}" for i in range(40)]
    rows = [(f"{one} {other}", [one, other]) for one, other in zip(names, names[1:] + names[:1], strict=True)]
    train, held_out = split([*rows, ("without", [])], 0.5)
    assert len(held_out) >= 10 and {name for row in train for name in row[1]} == set(names)


def test_a_task_without_classes():
    train, held_out = split([(i, ()) for i in range(100)], 0.1)
    assert (len(train), len(held_out)) == (90, 10)


def test_a_share_that_holds_out_nothing_is_refused():
    with pytest.raises(DataError, match="a share of 0.5 of 2 different texts holds out none .*; give a larger"):
        split([("x", "a"), ("x", "a"), ("y", "b")], 0.5)


def test_a_class_of_one_text_is_no_part_of_a_large_share():
    train, held_out = split([(i, "ab"[i // 5]) for i in range(6)], 0.99)
    assert {row[1] for row in train} == {"a", "b"} and {row[1] for row in held_out} == {"a"}
