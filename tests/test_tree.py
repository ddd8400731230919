"""Docstrings and docs name what exists, and no file of the product is long."""

import ast
import re
from pathlib import Path

import pytest

PACKAGES = sorted(p.parent for top in ("src", "scripts", "benchmarks") for p in Path(top).rglob("__init__.py"))


@pytest.mark.parametrize("folder", PACKAGES, ids=str)
def test_a_folder_names_its_files(folder):
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    words = set(re.findall(r"\w+", text))
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in folder.glob("*/__init__.py")}
    if folder.name == "benchmarks":
        files -= {"report", "texts", "timing", "variants"}  # helpers of the measurements
    assert files | folders <= words, files | folders - words


def test_no_file_of_the_product_is_long():
    for path in [*Path().glob("*.py"), *Path("src").rglob("*.py"), *Path("scripts").glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 600, path


def test_every_test_that_a_page_or_docstring_names_exists():
    tests = list(Path("tests").rglob("test_*.py"))
    known = {path.name for path in tests} | {path.stem for path in tests}
    known |= {name for path in tests for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}
    for path in [Path("README.md"), *Path("docs").glob("*.md"), *Path("src").rglob("*.py")]:
        named = set(re.findall(r"\btest_\w+(?:\.py)?", path.read_text()))
        assert named <= known, (path, named - known)
