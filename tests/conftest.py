"""A tokenizer, shards and a checkpoint from real text, made once per session by the scripts that users run.

Fixtures import what needs Composer or streaming, because tests of the model run without them.
"""

import contextlib
import gc
import gzip
import importlib.util
import itertools
import json
import os
import sys
import tempfile
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

TRAIN, VALIDATION = 307, 89
"""Training and validation samples: primes, so every last batch, part of a rank and part of a worker is ragged."""

YAMLS = sorted(path for path in Path("yamls").glob("*.yaml") if not path.stem.startswith("finetune"))
"""Of pretraining."""

MISSING = [name for name in ("composer", "streaming", "omegaconf", "datasets") if not importlib.util.find_spec(name)]

TESTS = Path(__file__).parent
MODEL = {f"model/{path.name}" for path in TESTS.glob("model/test_*.py")} - {"model/test_mosaic_bert.py"}
MODEL |= {"data/test_microbatches.py"}
"""Tests of the model and its kernels: only these are collected if a package that training needs is missing."""

if MISSING:
    found = {str(path.relative_to(TESTS)) for path in TESTS.rglob("test_*.py")}
    collect_ignore = sorted(found - MODEL)


def pytest_report_header():
    return f"without {', '.join(MISSING)}: only the model and its kernels are tested" if MISSING else None


LONGEST = ("test_resume", "test_main", "test_launch", "test_flash_attn_triton")


def pytest_collection_modifyitems(config, items):
    """With ``-n 2 --dist loadgroup``, a file runs in one process, and the longest files first."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
        items.sort(key=lambda item: item.path.stem not in LONGEST)


OPENED = []
"""Shared memory that tests opened and did not release yet."""


@pytest.fixture(autouse=True)
def release_shared_memory(monkeypatch):
    """After each test. Streaming would keep it until the process ends, and reopen all of it for each new dataset."""
    if "streaming" not in sys.modules:  # a test of the model alone
        yield
        return
    from streaming.base.shared.memory import SharedMemory

    from src.data import shared_memory
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
            with contextlib.suppress(BufferError):  # still mapped by a living dataset: retried after the next test
                memory.cleanup()
                OPENED.remove(memory)
        # Streaming looks at the lock files of all datasets before, of earlier sessions too, and never removes one.
        for lock in Path(tempfile.gettempdir()).glob("[0-9]*_filelock"):
            if not (shared_memory.SHARED / f"{lock.name[:6]}_locals").exists():
                lock.unlink(missing_ok=True)


def awkward(i, text, more):
    """Every third document cut to a few words, and 4 of 23 of one character, one word, no known word, many words."""
    kinds = {
        5: chr(ord("a") + i // 23),
        9: max(text.split(), key=len),
        14: "".join(filter(str.isalnum, text))[:150],  # WordPiece gives [UNK] for words of more than 100 characters
        19: " ".join(more),
    }
    return kinds.get(i % 23, " ".join(text.split()[: i % 11 + 2]) if i % 3 == 1 else text)


@pytest.fixture(scope="session")
def documents():
    """Lead paragraphs of Wikipedia, some made ``awkward``; the training samples first. No two are equal."""
    from scripts import quickstart

    size = TRAIN + VALIDATION
    leads = list(itertools.islice(quickstart.default_documents(), size + 8))
    documents = [awkward(i, leads[i], leads[i : i + 8]) for i in range(size)]
    assert len(set(documents)) == size
    return documents


@pytest.fixture(scope="session")
def c4_folder(documents, tmp_path_factory):
    """The documents in C4's format, and a text of nothing or of blanks, which conversion drops, after every 50th."""
    folder = tmp_path_factory.mktemp("c4")
    parts = {"train.00000-of-01024": documents[:TRAIN], "validation.00000-of-00008": documents[TRAIN:]}
    for name, part in parts.items():
        dropped = {i: " \n" * (i // 50) for i in range(9, len(part), 50)}
        texts = [text for i in range(len(part)) for text in (part[i], dropped.get(i)) if text is not None]
        with gzip.open(folder / f"c4-{name}.json.gz", "wt") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
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
    """A new one for each test: a call with ``truncation`` leaves it set in the object."""
    from src.data.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer_folder)


def converted(c4_folder, out, *options):
    import convert_c4

    convert_c4.main(["--out_root", str(out), "--splits", "train", "val", "--source", str(c4_folder), *options])
    return str(out)


@pytest.fixture(scope="session")
def text_shards(c4_folder, tmp_path_factory):
    """Shards of text: splits train and val."""
    return converted(c4_folder, tmp_path_factory.mktemp("text_shards"))


@pytest.fixture(scope="session")
def token_shards(c4_folder, tokenizer_folder, tmp_path_factory):
    """Shards of tokens of the same documents, truncated to MAX_SEQ_LEN."""
    options = ["--tokenizer", tokenizer_folder, "--max_seq_len", str(MAX_SEQ_LEN), "--pack", "truncate"]
    return converted(c4_folder, tmp_path_factory.mktemp("token_shards"), *options)


@pytest.fixture
def opened(tokenizer):
    """Opens a split of a folder as a StreamingC4."""
    from src.data_c4 import StreamingC4

    def opened(folder, split="train", **options):
        return StreamingC4(tokenizer, MAX_SEQ_LEN, str(folder), split=split, **options)

    return opened


@pytest.fixture
def write(tmp_path):
    """Writes a config, as text or as values, to a YAML file and returns its path."""

    def write(tree):
        path = tmp_path / "run.yaml"
        path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree, sort_keys=False))
        return str(path)

    return write


@pytest.fixture
def overrides(token_shards, tokenizer_folder, tmp_path):
    """Options of a run of 4 steps of 16 samples on the CPU."""
    from tests.runs import ADAMW, tiny_run

    return [*tiny_run(token_shards, tokenizer_folder, tmp_path), *ADAMW]


@pytest.fixture(scope="session")
def trained(token_shards, tokenizer_folder, tmp_path_factory):
    """Folder with the checkpoints of a small MosaicBERT after 4 steps."""
    import main
    from tests.runs import ADAMW, QUICKSTART, tiny_run

    folder = tmp_path_factory.mktemp("trained")
    main.main([QUICKSTART, *tiny_run(token_shards, tokenizer_folder, folder), *ADAMW, "optimizer.lr=0.01"])
    return folder / "checkpoints"


@pytest.fixture
def poisoned(monkeypatch):
    """``torch.empty`` gives NaN, or -1 for integers, between guards. At the end: all was written, and no guard.

    Yields the memory given so far.
    """
    empty, made = torch.empty, []

    def poison(*shape, dtype=torch.float32, device="cpu"):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        size = int(torch.Size(shape).numel())
        memory = torch.full((size + 128,), 7.0, dtype=dtype, device=device)
        view = memory[64 : 64 + size].view(shape)
        view.fill_(float("nan") if dtype.is_floating_point else -1)
        made.append((memory, size))
        return view

    monkeypatch.setattr(torch, "empty", poison)
    yield made
    monkeypatch.setattr(torch, "empty", empty)
    assert made
    for memory, size in made:
        assert (memory[:64] == 7.0).all() and (memory[64 + size :] == 7.0).all()
        unwritten = memory.isnan() if memory.is_floating_point() else memory == -1
        assert not unwritten.any(), "elements that were never written, or NaN"
