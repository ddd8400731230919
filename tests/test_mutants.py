"""The faults of tests/mutants.py still fit the code, so that the list cannot rot."""

import ast
from pathlib import Path

import pytest

from tests.mutants import MUTANTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_fault_can_be_applied_and_names_tests_that_exist(mutant):
    text = Path(mutant.file).read_text()
    changed = mutant.apply(text)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text))
    for test in mutant.tests.split():
        file, _, name = test.partition("::")
        assert (f"def {name}(" if name else "def test_") in Path("tests", file).read_text(), test


def test_names_are_unique():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
