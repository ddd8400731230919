"""A tokenizer and shards made from real text, once a session, by the scripts that users run.

What needs Composer or streaming is imported by the fixtures, so that tests of the model run where neither is.
"""

import contextlib
import gc
import gzip
import importlib.util
import itertools
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing may be downloaded at test time
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import yaml

if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses deterministic algorithms
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by Triton when it is first imported

MAX_SEQ_LEN = 32

YAMLS = sorted(path for path in Path("yamls").glob("*.yaml") if not path.stem.startswith("finetune"))
"""Those of pretraining."""

MISSING = [name for name in ("composer", "streaming", "omegaconf", "datasets") if not importlib.util.find_spec(name)]

TESTS = Path(__file__).parent
MODEL = {f"model/{path.name}" for path in TESTS.glob("model/test_*.py")} - {"model/test_mosaic_bert.py"}
MODEL |= {"data/test_microbatches.py"}
"""Files that test the model and its kernels: all that is collected where a package is missing that training needs."""

if MISSING:
    found = {str(path.relative_to(TESTS)) for path in TESTS.rglob("test_*.py")}
    collect_ignore = sorted(found - MODEL)


def pytest_report_header():
    return f"without {', '.join(MISSING)}: only the model and its kernels are tested" if MISSING else None


LONGEST = ("test_resume", "test_main", "test_launch", "test_flash_attn_triton")


def pytest_collection_modifyitems(config, items):
    """With ``-n 2 --dist loadgroup`` a file goes to one process, and the files that take longest come first."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
        items.sort(key=lambda item: item.path.stem not in LONGEST)


OPENED = []
"""Shared memory that tests have opened and that is not released yet."""


@pytest.fixture(autouse=True)
def release_shared_memory(monkeypatch):
    """Streaming keeps a dataset's shared memory until the process ends, and opens all there is for each new dataset."""
    if "streaming" not in sys.modules:  # a test of the model alone
        yield
        return
    from streaming.base.shared.memory import SharedMemory

    from src.data.streaming import alone_on_node

    init = SharedMemory.__init__

    def recorded(self, *args, **kwargs):
        init(self, *args, **kwargs)
        OPENED.append(self)

    monkeypatch.setattr(SharedMemory, "__init__", recorded)
    yield
    if not OPENED:
        return
    gc.collect()
    with alone_on_node():  # tests run in two processes
        for memory in OPENED.copy():
            with contextlib.suppress(BufferError):  # still mapped by a dataset that lives on: after the next test
                memory.cleanup()
                OPENED.remove(memory)


@pytest.fixture(scope="session")
def documents():
    """391 lead paragraphs of Wikipedia: a number that divides by nothing that the tests use."""
    from scripts import quickstart

    return list(itertools.islice(quickstart.default_documents(), 391))


@pytest.fixture(scope="session")
def c4_folder(documents, tmp_path_factory):
    """The documents in C4's own form: 300 to train on, 91 held out."""
    folder = tmp_path_factory.mktemp("c4")
    for name, part in (
        ("c4-train.00000-of-01024.json.gz", documents[:300]),
        ("c4-validation.00000-of-00008.json.gz", documents[300:]),
    ):
        with gzip.open(folder / name, "wt") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in part)
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(c4_folder, tmp_path_factory):
    import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    source = str(c4_folder / "c4-train.00000-of-01024.json.gz")
    train_tokenizer.main([source, "--out", str(folder), "--vocab_size", "1000"])
    return str(folder)


@pytest.fixture
def tokenizer(tokenizer_folder):
    """Each test's own: a call with ``truncation`` leaves it behind in the object."""
    from src.data.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="session")
def text_shards(c4_folder, tmp_path_factory):
    """Shards of text: splits train and val."""
    import convert_c4

    out = tmp_path_factory.mktemp("text_shards")
    convert_c4.main(["--out_root", str(out), "--splits", "train", "val", "--source", str(c4_folder)])
    return str(out)


@pytest.fixture(scope="session")
def token_shards(c4_folder, tokenizer_folder, tmp_path_factory):
    """Shards of tokens of the same documents, truncated to MAX_SEQ_LEN."""
    import convert_c4

    out = tmp_path_factory.mktemp("token_shards")
    tokens = ["--tokenizer", tokenizer_folder, "--max_seq_len", str(MAX_SEQ_LEN), "--pack", "truncate"]
    convert_c4.main(["--out_root", str(out), "--splits", "train", "val", "--source", str(c4_folder), *tokens])
    return str(out)


@pytest.fixture
def opened(tokenizer):
    """Opens a split of a folder as a StreamingC4."""
    from src.data_c4 import StreamingC4

    def opened(folder, split="train", **options):
        return StreamingC4(tokenizer, MAX_SEQ_LEN, str(folder), split=split, **options)

    return opened


@pytest.fixture
def write(tmp_path):
    """Writes a config, given as text or as values, to a YAML and returns its path."""

    def write(tree):
        path = tmp_path / "run.yaml"
        path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree, sort_keys=False))
        return str(path)

    return write


@pytest.fixture
def overrides(token_shards, tokenizer_folder, tmp_path):
    """Options of a run of 4 steps of 16 samples on the CPU."""
    from tests.runs import tiny_run

    return tiny_run(token_shards, tokenizer_folder, tmp_path)


@pytest.fixture(scope="session")
def trained(token_shards, tokenizer_folder, tmp_path_factory):
    """Folder with the checkpoints of a small MosaicBERT after 4 steps."""
    import main
    from tests.runs import QUICKSTART, tiny_run

    folder = tmp_path_factory.mktemp("trained")
    main.main([QUICKSTART, *tiny_run(token_shards, tokenizer_folder, folder), "optimizer.lr=0.01"])
    return folder / "checkpoints"
