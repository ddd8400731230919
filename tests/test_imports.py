"""Who may import whom, by the import statements of every file, also those within functions."""

import ast
import re
from pathlib import Path

import pytest

TRAINING = {"mosaic_bert", "hf_bert"}
MODEL = {path.stem for path in Path("src").glob("*.py")} - TRAINING - {"data_c4", "__init__"}
BASE = {"common"}
SCRIPTS = {path.stem for path in Path().glob("*.py")}
MAY_IMPORT = {
    **dict.fromkeys(MODEL, MODEL),
    **dict.fromkeys(TRAINING, {"data", *MODEL, *TRAINING}),
    "common": BASE,
    "data": {"data", *BASE, "bert_padding", "masked_lm_loss"},
    "data_c4": {"data", *BASE},
    "convert": {"convert", "data", *BASE},
    "train": {"train", "data_c4", "data", *BASE, *MODEL, *TRAINING},
    "finetune": {"finetune", "train", "data", *BASE, *MODEL},
    "export": {"export", "train", "data", *BASE, *MODEL},
}
"""What each file or folder of src may import from src."""
LIBRARIES = {
    "composer": {"train", "finetune", *TRAINING},
    "streaming": {"data_c4", "data", "convert"},
    "omegaconf": {"train"},
}
"""Libraries that only some of src may import."""


def imported(path):
    """Full names of a file's imports: ``src.data.masking``, ``torch``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join((["src"] if node.level else []) + ([node.module] if node.module else []))
            yield from (f"{base}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", sorted(Path("src").rglob("*.py")), ids=str)
def test_a_file_imports_only_what_it_may(path):
    owner = path.relative_to("src").parts[0].removesuffix(".py")
    for name in imported(path):
        first, *rest = name.split(".")
        assert first not in {"scripts", "benchmarks", "tests", *SCRIPTS}, f"{path} imports {name}"
        assert owner in LIBRARIES.get(first, {owner}), f"{path} imports {name}"
        if first == "src" and owner != "__init__":
            assert rest[0] in MAY_IMPORT[owner], f"{path} imports {name}"


def test_model_files_import_only_siblings_by_name():
    """The trust_remote_code loader of transformers finds only ``from .x import y``, also within functions."""
    for name in MODEL:
        text = Path(f"src/{name}.py").read_text()
        assert not re.search(r"^\s*(from|import) (src|\.\.)", text, re.MULTILINE), name
        assert not re.search(r"^\s*from \.\w+\.", text, re.MULTILINE), name


def test_bert_layers_imports_every_model_file_that_it_needs():
    """In a local folder, that loader follows the imports of the model file, but not those of its siblings."""
    named, needed = set(imported(Path("src/bert_layers.py"))), {"bert_layers"}
    for _ in MODEL:
        needed |= {name.split(".")[1] for file in needed for name in imported(Path(f"src/{file}.py")) if "src." in name}
    assert needed == {"bert_layers", *(name.split(".")[1] for name in named if name.startswith("src."))}


def test_scripts_import_no_benchmark():
    for path in [*Path().glob("*.py"), *Path("scripts").glob("*.py")]:
        assert not any(name.split(".")[0] in ("benchmarks", "tests") for name in imported(path)), path
