"""Datasets of the hub, which folders of this machine replace, and URLs, of which fsspec's memory:// needs no server."""

import gzip
import io
import json
import sys
from types import SimpleNamespace

import datasets
import fsspec
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

import convert_c4
from src.common.errors import DataError
from src.common.hub import is_dataset
from src.convert import hub, reasons
from src.convert.files import BadText, Span
from src.convert.forms import columns_of, read
from src.convert.sources import TextSource, iter_documents, units_of
from src.convert.stats import Stats
from src.convert.walk import Skipped, walk


def texts_of(*places, **options):
    return [document["text"] for document in iter_documents(TextSource(places, **options))]


@pytest.fixture
def hub_of(tmp_path, monkeypatch):
    """A hub with one dataset, a folder, whose commit is ``sha``. Loading is that of datasets, and is recorded."""
    load_dataset, calls = datasets.load_dataset, []

    def load(dataset, name, **options):
        calls.append((dataset, name, options))
        assert options.pop("revision") == "sha"
        return load_dataset(str(tmp_path / "hub" / dataset), name, **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda dataset: SimpleNamespace(sha="sha"))
    folder = tmp_path / "hub" / "owner" / "texts"
    configurations = ""
    for name, column in {"big": "text", "small": "text", "raw": "content"}.items():
        configurations += f"- config_name: {name}\n  data_files:\n"
        for split in ("train", "test"):
            configurations += f'  - split: {split}\n    path: "{name}/{split}-*"\n'
            for part in range(2):
                path = folder / name / f"{split}-{part}.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                table = pa.table({column: [f"{name} {split} {part}", f"{part}"], "url": ["u", "v"]})
                pyarrow.parquet.write_table(table, path)
    (folder / "README.md").write_text(f"---\nconfigs:\n{configurations}---\n")
    for cached in (hub.revision, hub.load):
        cached.cache_clear()
    yield calls
    for cached in (hub.revision, hub.load):
        cached.cache_clear()


def test_a_dataset_is_read_by_name_and_split(hub_of):
    source = TextSource(("hf:owner/texts",), "small", "train")
    assert list(iter_documents(source)) == [
        {"text": text, "url": url} for part in "01" for text, url in ((f"small train {part}", "u"), (part, "v"))
    ]
    assert hub_of == [("owner/texts", "small", {"split": "train", "streaming": True})]
    files = list(hub.files(source, "hf:owner/texts"))
    assert [file.path for file in files] == [f"hf:owner/texts@sha?name=small&split=train#{i}" for i in range(2)]
    assert [len(unit) for unit in units_of(files, 1)] == [1, 1]
    assert columns_of(files[0].path, "text") == ["text", "url"]
    second = list(read(Span(files[1].path), "text", False, Stats()))
    assert second[1] == (f"{files[1].path}:2", {"text": "1", "url": "v"})


def test_a_dataset_may_have_its_text_in_another_column(hub_of):
    options = {"name": "raw", "split": "test"}
    assert texts_of("hf:owner/texts", **options, text_column="content")[::2] == ["raw test 0", "raw test 1"]
    with pytest.raises(BadText, match="#0:1: expected a field 'text' that holds a string; there are: content, url"):
        texts_of("hf:owner/texts", **options)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        (None, "train", r"big.*small.*; choose with --name and --split"),
        ("medium", "train", r"'medium' not found.*big.*small.*; choose with --name"),
        ("big", "validation", r"validation.*(test.*train|train.*test).*; choose with --name and --split"),
        ("big", None, r"--split names one of its splits: test, train"),
    ],
)
def test_configurations_and_splits_are_listed(name, split, message, hub_of):
    with pytest.raises(DataError, match=f"owner/texts: .*{message}") as error:
        texts_of("hf:owner/texts", name=name, split=split)
    assert "\n" not in str(error.value)


class GatedRepoError(OSError):
    """As huggingface_hub's, which needs a response of a server."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError("401 Client Error.\n\nCannot access gated repo"), "needs `hf auth login`"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"), "it does not exist, or"),
        (RuntimeError("Dataset scripts are no longer supported, but found b.py"), "scripts.*; download its files"),
        (ConnectionError("no route"), r"the Hugging Face Hub is unreachable \(no route\); offline, give a --source"),
    ],
)
@pytest.mark.parametrize("function", ["info", "load"])
def test_a_dataset_that_cannot_be_had_is_one_message(error, message, function, hub_of, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    module, name = {"info": (huggingface_hub, "dataset_info"), "load": (datasets, "load_dataset")}[function]
    monkeypatch.setattr(module, name, fail)
    with pytest.raises(DataError, match=f"a/b: .*{message}") as raised:
        texts_of("hf:a/b", split="train")
    assert "\n" not in str(raised.value)


def test_a_dataset_of_one_split_needs_no_name(hub_of, tmp_path):
    (tmp_path / "hub" / "a" / "b").mkdir(parents=True)
    (tmp_path / "hub" / "a" / "b" / "train.jsonl").write_text('{"text": "one"}\n')
    assert texts_of("hf:a/b") == ["one"]


@pytest.fixture
def bucket():
    """memory://bucket, with texts in several forms."""
    memory = fsspec.filesystem("memory")
    parquet = io.BytesIO()
    pyarrow.parquet.write_table(pa.table({"text": ["p1", "p2", "p3"]}), parquet, row_group_size=2)
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in ("one", "two"))
    for name, data in {
        "a.jsonl.zst": zstandard.compress(lines),
        "b.txt": b"three\nfour\n",
        "sub/c.parquet": parquet.getvalue(),
        "sub/d.csv.gz": gzip.compress(b"text\nfive\n"),
    }.items():
        memory.pipe(f"/bucket/{name}", data)
    yield "memory://bucket"
    memory.rm("/bucket", recursive=True)


def test_urls_of_files_folders_and_patterns(bucket):
    assert texts_of(f"{bucket}/a.jsonl.zst", f"{bucket}/sub/*.csv.gz") == ["one", "two", "five"]
    assert texts_of(bucket) == ["one", "two", "three", "four", "p1", "p2", "p3", "five"]
    files = list(hub.remote_files(bucket))
    names = [f"memory:///bucket/{name}" for name in ("a.jsonl.zst", "b.txt", "sub/c.parquet", "sub/d.csv.gz")]
    assert [file.path for file in files] == names
    assert files[1].size == 11 and files[1].changed and files == list(hub.remote_files(bucket))
    units = [
        [d["text"] for span in unit for _, d in read(span, "text", False, Stats())] for unit in units_of(files[1:3], 6)
    ]
    assert units == [["three"], ["four"], ["p1", "p2"], ["p3"]]
    with pytest.raises(BadText, match="/bucket/sub/d.csv.gz:1: expected a field 'no'"):
        list(iter_documents(TextSource((f"{bucket}/sub/d.csv.gz",), text_column="no")))


def test_files_at_urls_are_skipped_as_on_disk(bucket):
    memory = fsspec.filesystem("memory")
    skipped = {
        "README.md": reasons.UNKNOWN,
        "_SUCCESS": reasons.UNKNOWN,
        "config.json": reasons.METADATA,
        "old.ZIP": reasons.ARCHIVE,
        "sub/._d.csv.gz": reasons.HIDDEN,
        ".cache/e.txt": reasons.HIDDEN,
        "sub/_temporary/f.txt": reasons.SYSTEM,
    }
    for name in skipped:
        memory.pipe(f"/bucket/{name}", b"\0")
    for place in (bucket, f"{bucket}/**"):
        entries = list(walk(TextSource((place,)), "train", False))
        left_out = {entry.path: entry.reason for entry in entries if isinstance(entry, Skipped)}
        assert left_out == {f"memory:///bucket/{name}": reason for name, reason in skipped.items()}
        assert texts_of(place) == ["one", "two", "three", "four", "p1", "p2", "p3", "five"]
    assert list(walk(TextSource((f"{bucket}/.cache",)), "train", False)) == list(hub.remote_files(f"{bucket}/.cache"))
    for place in (f"{bucket}/README.md", f"{bucket}/*.md"):
        with pytest.raises(DataError, match=r"no file of a known format .*skipped memory:///bucket/README.md: of no"):
            texts_of(place)


@pytest.mark.parametrize("second", ["", "/b.txt", "/*.txt"])
def test_files_at_urls_are_named_once(second, bucket):
    with pytest.raises(DataError, match="memory:///bucket/.* is in two of the places; name it once"):
        texts_of(bucket, f"{bucket}{second}")


def test_a_file_url_is_a_local_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "README.md").write_text("x")
    args = ["--out_root", str(tmp_path), "--splits", "b", "--source", f"file://{tmp_path}"]
    convert_c4.main(args)
    convert_c4.main([*args, "--overwrite"])
    assert json.loads((tmp_path / "b" / "stats.json").read_text())["files"]["skipped"] == {
        reasons.UNKNOWN: 1,
        reasons.OUTPUT: 1,
    }


def test_a_changed_file_is_seen(bucket):
    before = list(hub.remote_files(bucket))
    fsspec.filesystem("memory").pipe("/bucket/b.txt", b"other\nfour\n")
    after = list(hub.remote_files(bucket))
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True, True]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("memory://nothing/a.jsonl", "memory://nothing/a.jsonl: FileNotFoundError"),
        ("memory://nothing/*.jsonl", "no file"),
        ("s3://bucket/a.jsonl", r"s3fs.*\(pip install s3fs\)"),
        ("gs://bucket/a.jsonl", r"gcsfs.*\(pip install gcsfs\)"),
        ("foo://bucket/a.jsonl", "Protocol not known: foo"),
    ],
)
def test_urls_that_cannot_be_read_are_refused(place, message, monkeypatch):
    for package in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=message):
        list(hub.remote_files(place))


def test_a_server_that_fails_while_it_is_read_is_no_bad_text(bucket, monkeypatch):
    """It stops a conversion that skips what is bad; no message shows a password."""

    def fail(self, *args, **options):
        raise RuntimeError("403 for memory://user:secret@bucket/b.txt")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "_open", fail)
    with pytest.raises(DataError, match=r"memory://bucket/b.txt: 403 for memory://user@bucket/b.txt"):
        list(read(Span("memory://bucket/b.txt"), "text", True, Stats()))


def test_files_of_the_hub_are_urls(monkeypatch, tmp_path):
    """hf://datasets/OWNER/NAME/FILE, by its file system, which one of this machine's folders replaces."""
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem

    class Files(DirFileSystem):
        protocol = "hf"

        def __init__(self, **options):
            super().__init__(str(tmp_path), LocalFileSystem(), **options)

    fsspec.register_implementation("hf", Files, clobber=True)
    (tmp_path / "datasets" / "a" / "b").mkdir(parents=True)
    (tmp_path / "datasets" / "a" / "b" / "c.txt").write_text("one\n")
    try:
        assert texts_of("hf://datasets/a/b/*.txt") == ["one"]
        assert not is_dataset("hf://datasets/a/b")
    finally:
        fsspec.register_implementation("hf", huggingface_hub.HfFileSystem, clobber=True)
