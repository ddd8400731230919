"""What the places of a source name: every file is read, skipped with the reason, or refused."""

import contextlib
import json
import os
import pickle
import shutil
import socket
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from streaming import MDSWriter

import convert_c4
import train_tokenizer
from src.convert import conversion, reasons
from src.convert.sources import Inventory, TextSource, documents
from tests.convert.splits import bytes_of, convert, json_of, names_in, rows_of, texts_of

DOCUMENT = '{"text": "one"}\n'
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 318000000\n"


def make(folder, tree):
    """Write files: a text, bytes, or ("->", target) for a link. None makes a folder."""
    for name, content in tree.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir()
        elif isinstance(content, tuple):
            path.symlink_to(content[1])
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


def inventory(*places, **options):
    text_column = options.pop("text_column", "text")
    return Inventory(TextSource(tuple(map(str, places)), text_column=text_column), **options)


def found(folder, *places, **options):
    """Names of the files that are read, in their order, and of those skipped, with the reasons."""
    files = inventory(*(places or [folder]), **options)
    files.save(folder.parent / "list.jsonl")
    records = [json.loads(line) for line in (folder.parent / "list.jsonl").read_text().splitlines()]
    names = {os.path.relpath(record["path"], folder): record.get("skipped") for record in records}
    read = [name for name, reason in names.items() if reason is None]
    assert [os.path.relpath(file.path, folder) for file in files] == read and files.report.read == len(read)
    return read, {name: reason for name, reason in names.items() if reason is not None}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "s").mkdir()
    return tmp_path / "s"


INDENTED = json.dumps({"default": {"features": {"text": {}}}}, indent=1)
READ_AND_SKIPPED = {
    "any case": ({"a.JSONL": DOCUMENT, "b.Txt": "x", "c.json": DOCUMENT}, {}),
    "unknown": (
        {"a.jsonl": DOCUMENT, "LICENSE": "x", "README.md": "x", "b.jsonl.old": DOCUMENT},
        {"LICENSE": reasons.UNKNOWN, "README.md": reasons.UNKNOWN, "b.jsonl.old": reasons.UNKNOWN},
    ),
    "archives": (
        {"a.txt": "x", "b.ZIP": "x", "c.tar.gz": "x", "d.7z": "x"},
        {"b.ZIP": reasons.ARCHIVE, "c.tar.gz": reasons.ARCHIVE, "d.7z": reasons.ARCHIVE},
    ),
    "a suffix twice": ({"a.txt": "x", "a.txt.txt": "x", "b.jsonl": DOCUMENT, "b.jsonl.txt": "x"}, {}),
    "hidden": (
        {"a.txt": "x", ".b.txt": "x", "._a.txt": b"\0\5", ".ipynb_checkpoints/a.txt": "x", "sub/.git/c.txt": "x"},
        {
            ".b.txt": reasons.HIDDEN,
            "._a.txt": reasons.HIDDEN,
            ".ipynb_checkpoints": reasons.HIDDEN,
            "sub/.git": reasons.HIDDEN,
        },
    ),
    "system": (
        {"a.txt": "x", "__MACOSX/a.txt": "x", "Thumbs.db": "x", "desktop.ini": "x"},
        {"__MACOSX": reasons.SYSTEM, "Thumbs.db": reasons.SYSTEM, "desktop.ini": reasons.SYSTEM},
    ),
    "metadata": (
        {
            "data/a.jsonl": DOCUMENT,
            "dataset_infos.json": INDENTED,
            "config.json": '{"a": 1}',
            "vocab.json": '{"text": 5}',
        },
        {name: reasons.METADATA for name in ("dataset_infos.json", "config.json", "vocab.json")},
    ),
    "tokenizer": (
        {
            "a.txt": "x",
            "vocab.txt": "a line",
            "t/tokenizer.json": "{\n}",
            "t/vocab.txt": "[PAD]",
            "t/merges.txt": "a b",
        },
        {name: reasons.METADATA for name in ("t/tokenizer.json", "t/vocab.txt", "t/merges.txt")},
    ),
    "documents named as metadata": ({"config.json": DOCUMENT * 2, "stats.json": '{\n"text": "x"\n}'}, {}),
    "what a conversion dropped": (
        {"a.txt": "x", "dropped.jsonl": '{"reason": "duplicate", "place": "a:1", "text": "x"}\n'},
        {"dropped.jsonl": reasons.OUTPUT},
    ),
    "a record of DVC, fetched": (
        {"a.txt": "x", "a.txt.dvc": "outs:", "model.pt.dvc": "outs:"},
        {"a.txt.dvc": reasons.UNKNOWN, "model.pt.dvc": reasons.UNKNOWN},
    ),
    "a list of no dataset": ({"a.jsonl": DOCUMENT, "sub/index.json": '{"a": 1}'}, {"sub/index.json": reasons.METADATA}),
    "empty files": ({"a.txt": "", "b.json": "", "c.txt": "x"}, {}),
    "links to files": (
        {
            "../blobs/1": DOCUMENT,
            "../blobs/2": "x",
            "a.jsonl": ("->", "../blobs/1"),
            "b.jsonl": ("->", "../blobs/1"),
            "c.jsonl": ("->", "d.jsonl"),
            "d.jsonl": DOCUMENT,
            "e.md": ("->", "../blobs/2"),
            "f.md": ("->", "nowhere"),
        },
        {"b.jsonl": reasons.LINKED, "c.jsonl": reasons.LINKED, "e.md": reasons.UNKNOWN, "f.md": reasons.UNKNOWN},
    ),
    "a cache of the hub": (
        {"blobs/1": "x", "snapshots/r1/a.txt": ("->", "../../blobs/1"), "snapshots/r2/a.txt": ("->", "../../blobs/1")},
        {"blobs/1": reasons.UNKNOWN, "snapshots/r2/a.txt": reasons.LINKED},
    ),
    "links to folders": (
        {
            "../other/a.txt": "x",
            "../other/back": ("->", "../s"),
            "../other/self": ("->", "."),
            "a": ("->", "../other"),
            "b": ("->", "../other"),
            "c/d.txt": "x",
            "e": ("->", "c"),
            "f": ("->", ".."),
            "g": ("->", "."),
        },
        {
            "a/back": reasons.LINKED,
            "a/self": reasons.LINKED,
            "b": reasons.LINKED,
            "e": reasons.LINKED,
            "f": reasons.AROUND,
            "g": reasons.LINKED,
        },
    ),
    "files that map() of datasets left": (
        {"x-train.arrow": "x", "cache-1f.arrow": "x", "dataset_info.json": "{}", "cache-1f.txt": "x"},
        {"cache-1f.arrow": reasons.COPY, "dataset_info.json": reasons.METADATA},
    ),
    "a hidden folder by a link": ({".h/a.txt": "x", "b": ("->", ".h")}, {".h": reasons.HIDDEN}),
    "a link into a folder that a link reads": (
        {"../o/p/a.txt": "x", "a": ("->", "../o/p"), "b": ("->", "../o"), "c.txt": ("->", "../o/p/a.txt")},
        {"b/p": reasons.LINKED, "c.txt": reasons.LINKED},
    ),
}


@pytest.mark.parametrize("name", READ_AND_SKIPPED)
def test_each_file_is_read_or_skipped_with_its_reason(name, folder):
    tree, skipped = READ_AND_SKIPPED[name]
    make(folder, tree)
    reached = {name for name in tree if not name.startswith("..") and (folder / name).is_file()}
    within = {name for name in reached if any(name.startswith(f"{folder}/") for folder in skipped)}
    read, left_out = found(folder)
    assert left_out == skipped and read == sorted(read)
    linked = {"a/a.txt"} if (folder / "a").is_dir() else {"b/a.txt"} if (folder / "b").is_dir() else set()
    assert set(read) == reached - within - set(skipped) | linked


def test_tables_whose_names_are_not_utf8(folder):
    name = os.fsencode(folder) + b"/caf\xe9.parquet"
    with open(name, "wb") as file:
        pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), file)
    assert texts_of(convert(folder.parent, folder)) == ["one"]


def test_a_file_that_is_named_is_read_whatever_its_name_says(folder):
    make(folder, {".vocab.txt": "x", "vocab.txt": "x", "tokenizer.json": DOCUMENT, "config.json": '{"a": 1}'})
    names = [".vocab.txt", "vocab.txt", "config.json"]
    assert found(folder, *(folder / name for name in names)) == (names, {})


def test_second_names_of_a_file_are_skipped(folder):
    make(folder, {"a.txt": "x", "c.txt": "y"})
    os.link(folder / "a.txt", folder / "b.txt")
    assert found(folder) == (["a.txt", "c.txt"], {"b.txt": reasons.LINKED})


def test_pipes_and_sockets_are_skipped_or_refused_by_name(folder):
    make(folder, {"a.txt": "x"})
    os.mkfifo(folder / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(folder):
        server.bind("socket.txt")
    assert found(folder) == (["a.txt"], {"pipe.txt": reasons.SPECIAL, "socket.txt": reasons.SPECIAL})
    with pytest.raises(ValueError, match="pipe.txt: no regular file; write the text to a file"):
        inventory(folder / "pipe.txt")


def test_only_listed_files_of_a_saved_dataset_are_read(folder):
    table = pyarrow.table({"text": ["one"]})
    for name in ("data-00000-of-00001.arrow", "cache-1f.arrow"):  # map() leaves the second one
        with pyarrow.ipc.new_stream(str(folder / name), table.schema) as out:
            out.write_table(table)
    make(folder, {"a.txt": "x", "state.json": '{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}'})
    skipped = found(folder)[1]
    assert skipped["state.json"] == reasons.METADATA
    assert skipped["cache-1f.arrow"] in (reasons.UNINDEXED, reasons.UNKNOWN)


NOT_FETCHED = {
    "annexed.jsonl": (("->", ".git/annex/objects/x/y"), "a link to .git/annex/.* does not exist; run git annex get"),
    "cached.jsonl": (("->", "../blobs/0f"), "does not exist; download the dataset again"),
    "folder": (("->", "/mnt/none"), "does not exist; fetch it, or remove the link"),
    "loop.txt": (("->", "loop.txt"), "does not exist"),
    "lfs.txt": (LFS, "not fetched; run git lfs pull"),
    "lfs.parquet": (LFS, "not fetched; run git lfs pull"),
    "unlocked.jsonl": ("/annex/objects/SHA256E-s5--0.jsonl\n", "not fetched; run git annex get"),
    "flat.jsonl": ("../.git/annex/objects/x\n", "not fetched; run git annex get"),
    "b.jsonl.dvc": ("outs:\n", r"b.jsonl is not fetched; run dvc pull"),
    "corpus.dvc": ("outs:\n", "corpus is not fetched; run dvc pull"),
}


@pytest.mark.parametrize("name", NOT_FETCHED)
def test_what_is_not_fetched_is_refused_or_skipped(name, folder):
    content, message = NOT_FETCHED[name]
    make(folder, {"a.jsonl": DOCUMENT, name: content})
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        inventory(folder)
    assert found(folder, skip_bad=True) == (["a.jsonl"], {name: reasons.NOT_FETCHED})
    if not name.endswith(".dvc") and name != "folder":
        with pytest.raises(ValueError, match=message):
            inventory(folder / name)


def test_what_is_unreadable_is_refused_or_skipped(folder, monkeypatch):
    """Also for a superuser, whom no permission stops."""
    make(folder, {"a.txt": "x", "b.txt": "x", "sub/c.txt": "x"})
    listdir = os.listdir

    def denied(path):
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", denied)
    with pytest.raises(ValueError, match=r"s/sub: .*permission denied"):
        inventory(folder)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "b.txt")
    with pytest.raises(ValueError, match=r"s/b.txt: .*permission denied"):
        inventory(folder)
    unreadable = {"b.txt": reasons.UNREADABLE, "sub": reasons.UNREADABLE}
    assert found(folder, skip_bad=True) == (["a.txt"], unreadable)


def mds(folder, **columns):
    with MDSWriter(out=str(folder), columns=dict.fromkeys(columns, "str")) as writer:
        writer.write(columns)


REFUSED = {
    "a described object": (
        {"a.jsonl": DOCUMENT, "b.json": '{\n"n": 1\n}'},
        ["."],
        r"b.json: one JSON object .*\(it has n\)",
    ),
    "an unknown suffix by name": ({"a.md": "x"}, ["a.md"], "a.md: no file of a known format"),
    "an archive by name": ({"a.zip": "x"}, ["a.zip"], "a.zip: an archive, unpack it"),
    "a pattern of unknown suffixes": ({"a.md": "x"}, ["*.md"], r"\*.md: no file .*skipped .*a.md: of no known format"),
    "nothing": ({"sub": None}, ["."], "no file of a known format"),
    "an empty place among others": ({"a.txt": "x", "b/c.md": "x"}, ["a.txt", "b"], "b: no file of a known format"),
    "a place twice": ({"a.txt": "x"}, ["a.txt", "./a.txt"], "are the same; name it once"),
    "a link and its target": ({"a.txt": "x", "b.txt": ("->", "a.txt")}, ["a.txt", "b.txt"], "are the same"),
    "two patterns of one file": ({"a.txt": "x"}, ["*.txt", "a*"], "are the same; name it once"),
    "a place in another": ({"b/a.txt": "x"}, ["b/a.txt", "."], "a.txt lies in .*; name one of them"),
    "unfinished work": (
        {"x.partial/plan.json": "{}", "x.partial/units": None},
        ["."],
        "unfinished work of a conversion",
    ),
    "a DatasetDict": (
        {"d/dataset_dict.json": '{"splits": ["test", "train"]}', "d/test/a.txt": "x"},
        ["."],
        "s/d: a DatasetDict; name one of its splits (.*s/d/test, .*s/d/train)",
    ),
    "a file and its compressed copy": (
        {"a.jsonl": DOCUMENT, "a.jsonl.zst": "x"},
        ["."],
        r"s/a.jsonl.zst: beside it lies a.jsonl, .*; remove one, or name one",
    ),
    "a shard and its compressed copy": ({"a.mds": "x", "a.mds.zstd": "x"}, ["*.mds*"], "s/a.mds.zstd: beside it lies"),
    "both by a pattern": ({"a.txt": "x", "a.txt.gz": "x"}, ["*"], "s/a.txt.gz: beside it lies a.txt"),
    "revisions of a dataset of the hub": (
        {"d/blobs/1": "x", "d/refs/main": "2", "d/snapshots/1/a.txt": "x", "d/snapshots/2/a.txt": "y"},
        ["."],
        "s/d: several revisions of a dataset of the hub; name one of the folders in snapshots",
    ),
    "a saved dataset without one of its files": (
        {"a.arrow": "x", "state.json": '{"_data_files": [{"filename": "a.arrow"}, {"filename": "b.arrow"}]}'},
        ["."],
        "s/b.arrow is missing; .*s/state.json names it",
    ),
    "C4 beside others": (
        {"c4/c4-train.00000-of-00001.json.gz": "x", "a.txt": "x"},
        ["c4", "a.txt"],
        r"name C4's files themselves: '.*c4-train.\*.json.gz'",
    ),
}


def test_a_compressed_copy_is_read_by_name_and_skipped_otherwise(folder):
    make(folder, {"a.txt": "x", "a.txt.gz": "x", "cache-1f.arrow": "x", "b.arrow": "x", "dataset_info.json": "{}"})
    assert found(folder, folder / "a.txt.gz") == found(folder, folder / "*.gz") == (["a.txt.gz"], {})
    assert found(folder, folder / "*.arrow") == (["b.arrow"], {"cache-1f.arrow": reasons.COPY})
    assert found(folder, folder / "a*", skip_bad=True) == (["a.txt"], {"a.txt.gz": reasons.COPY})


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_refused(name, folder):
    tree, places, message = REFUSED[name]
    make(folder, tree)
    with pytest.raises(ValueError, match=message):
        inventory(*(folder / place if place != "./a.txt" else f"{folder}/./a.txt" for place in places))


def test_a_text_column_decides_what_is_a_document(folder):
    make(folder, {"a.json": '{\n"content": "x"\n}', "b.json": '{\n"meta": {"text": "x"}\n}'})
    with pytest.raises(ValueError, match=r"a.json: one JSON object without 'text' \(it has content\).*--text_column"):
        inventory(folder)
    assert found(folder, folder / "a.json", text_column="content") == (["a.json"], {})
    assert found(folder, folder / "b*.json", text_column="meta.text") == (["b.json"], {})
    assert found(folder, skip_bad=True, text_column="content") == (["a.json"], {"b.json": reasons.NO_TEXT})


def test_shards_inside_a_place_are_refused_and_read_by_name(folder, tmp_path):
    make(folder, {"a.txt": "x"})
    for split in ("train", "val"):
        mds(folder / split, text="shard")
    with pytest.raises(ValueError, match=r"s/train: a dataset of shards .*name it itself \(.*s/train, .*s/val\)"):
        inventory(folder)
    make(folder, {"train/stats.json": "{}", "train/shard.00001.mds": "left over"})
    unlisted = {"train/shard.00001.mds": reasons.UNINDEXED, "train/stats.json": reasons.UNINDEXED}
    assert found(folder, folder / "train", folder / "a.txt") == (["train/shard.00000.mds", "a.txt"], unlisted)
    (folder / "train" / "shard.00000.mds").unlink()
    with pytest.raises(ValueError, match="shard.00000.mds is missing; .*index.json names it"):
        inventory(folder / "train")


def test_the_output_inside_the_source_is_skipped(folder):
    """The first conversion and one that continues give the same lists. Other splits in the folder are skipped, too."""
    make(folder, {"a.txt": "x\n", "train.part1.txt": "y\n"})
    mds(folder / "val", text="of an earlier conversion")
    (folder / "test.partial").mkdir()
    first = bytes_of(convert(folder, folder, split="train"))
    assert texts_of(folder / "train") == ["x", "y"]
    output = {name: reasons.OUTPUT for name in ("test.partial", "train", "val")}
    assert found(folder, output=folder / "train") == (["a.txt", "train.part1.txt"], output)
    convert(folder, folder, "--overwrite", split="train")
    assert bytes_of(folder / "train") == first
    with pytest.raises(ValueError, match=r"train lies in .*, which is written"):
        convert(folder, folder / "train", "--overwrite", split="train")


@pytest.mark.parametrize("pattern", ["*", "**/*", "**/*.*"])
def test_the_output_that_a_pattern_matches_is_skipped(pattern, folder):
    make(folder, {"a.txt": "x\n", "sub/b.txt": "y\n", "__MACOSX/c.txt": "no"})
    mds(folder / "val", text="of an earlier conversion")
    place = f"{folder}/{pattern}"
    first = bytes_of(convert(folder, place, split="train"))
    for part in ("1/2", "2/2", "2/2"):
        convert(folder, place, "--part", part, split="parts")
    convert_c4.main(["--out_root", str(folder), "--splits", "parts", "--merge"])
    assert texts_of(folder / "train") == texts_of(folder / "parts") == ["x", "y"]
    shutil.rmtree(folder / "parts")
    assert bytes_of(convert(folder, place, "--overwrite", split="train")) == first
    read, skipped = found(folder, place, output=folder / "train")
    assert read == ["a.txt", "sub/b.txt"] and reasons.OUTPUT in skipped.values()


def test_a_pattern_may_name_hidden_files(folder):
    make(folder, {".a/b.txt": "x", ".c.txt": "y", "d.txt": "z"})
    assert found(folder, folder / ".*" / "*", folder / ".*.txt") == ([".a/b.txt", ".c.txt"], {})


def test_second_names_that_a_pattern_matches_are_skipped(folder):
    make(folder, {"a.txt": "x"})
    os.link(folder / "a.txt", folder / "b.txt")
    assert found(folder, folder / "*.txt") == (["a.txt"], {"b.txt": reasons.LINKED})


def test_a_folder_of_c4_skips_what_is_not_of_its_split(folder):
    names = ["c4-train.00000-of-00002.json.gz", "c4-train.00001-of-00002.json.gz"]
    make(folder, {**dict.fromkeys(names, "x"), "c4-validation.00000-of-00001.json.gz": "x", "mine.jsonl": DOCUMENT})
    make(folder, {"sub/a.txt": "x", ".x": "x"})
    left_out = {"mine.jsonl": reasons.NOT_C4, "sub": reasons.NOT_C4, ".x": reasons.HIDDEN}
    train = {**left_out, "c4-validation.00000-of-00001.json.gz": reasons.NOT_C4}
    assert found(folder, split="train") == (names, train)
    read, skipped = found(folder, split="val", output=folder / "out" / "val")
    assert read == ["c4-validation.00000-of-00001.json.gz"] and set(names) < set(skipped)
    (folder / "en").mkdir()
    for name in names:
        (folder / name).rename(folder / "en" / name)
    (folder / "c4-validation.00000-of-00001.json.gz").rename(folder / "en" / "v.json.gz")
    read, skipped = found(folder)
    assert read == [f"en/{name}" for name in names] and skipped == {**left_out, "en/v.json.gz": reasons.NOT_C4}
    (folder / "en" / names[0]).write_text(LFS)
    with pytest.raises(ValueError, match="run git lfs pull"):
        inventory(folder)


def test_names_that_are_not_utf8(folder, capsys):
    """They are converted, and printed with escapes."""
    name = os.fsdecode(b"caf\xe9.jsonl")
    make(folder, {name: DOCUMENT + DOCUMENT + "bad\n", os.fsdecode(b"\xe9.md"): "x"})
    split = convert(folder.parent, folder, "--skip_bad", "--dedup")
    assert texts_of(split) == ["one"]
    for file in ("stats.json", "files.jsonl", "dropped.jsonl"):
        assert r"\\xe9" in (split / file).read_text(encoding="utf-8")
    assert r"\xe9.md" in capsys.readouterr().err


def test_several_places_and_patterns_are_read_in_their_order(folder):
    make(folder, {name: f"{name}\n" for name in ("b.txt", "sub/a1.txt", "sub/deep/a2.txt", "c[1].txt", "c1.txt")})
    pattern = folder / "sub" / "**"
    files = inventory(folder / "c[1].txt", folder / "b.txt", pattern)
    want = ["c[1].txt", "b.txt", "sub/a1.txt", "sub/deep/a2.txt"]  # a name that exists is no pattern
    assert [document["text"] for document in documents(files)] == want
    assert texts_of(convert(folder.parent, folder / "b.txt", str(pattern / "*.txt"))) == want[1:]
    with pytest.raises(ValueError, match=r"x\*\.txt: no file matches this pattern"):
        inventory(folder / "b.txt", folder / "x*.txt")


def test_brackets_in_the_name_of_a_folder_are_no_pattern(folder):
    make(folder, {"d[1]/a.txt": "x", "d1/a.txt": "y", "d2/a.txt": "z"})
    assert found(folder, folder / "d[1]" / "*") == (["d[1]/a.txt"], {})
    assert found(folder, folder / "d[12]" / "*") == (["d1/a.txt", "d2/a.txt"], {})


def test_what_a_pattern_matches_may_be_links(folder):
    make(folder, {"../blobs/1": "x", "a.txt": ("->", "../blobs/1"), "b.md": "x"})
    assert found(folder, folder / "*") == (["a.txt"], {"b.md": reasons.UNKNOWN})


@pytest.mark.parametrize("limit", [["--limit", "1"], []])
def test_first_files_without_a_document_do_not_decide_the_columns(limit, folder):
    make(folder, {"a.jsonl": "\n", "b.jsonl": "", "c.jsonl": '{"text": "one", "url": "u"}\n', "d.txt": "two"})
    rows = rows_of(convert(folder.parent, folder, *limit))
    assert rows == [{"text": "one", "url": "u"}, {"text": "two", "url": ""}][: 1 if limit else 2]


@pytest.mark.parametrize("options", [["--name", "en"], ["--split", "train"]])
def test_options_of_hub_datasets_are_refused_without_one(options, tmp_path):
    for main, given in (
        (convert_c4.main, ["--out_root", str(tmp_path), "--splits", "a", "--source", "hf://datasets/a/b"]),
        (train_tokenizer.main, ["x.txt", "--out", str(tmp_path / "t"), "--vocab_size", "100"]),
    ):
        with pytest.raises(ValueError, match="--name and --split have no effect without a source hf:OWNER/NAME"):
            main([*given, *options])


def test_a_source_can_be_sent_to_another_process():
    source = TextSource(("a", "hf:b/c"), "name", "split", "content")
    assert pickle.loads(pickle.dumps(source)) == source and str(source) == "a, hf:b/c"


# Reports


def test_the_split_and_both_scripts_say_what_is_skipped(folder, capsys):
    make(folder, {**{f"{i}.md": "x" for i in range(5)}, "a.txt": "a word and some words more\n", ".x": "x"})
    split = convert(folder.parent, folder)
    said = f"skipped 5 (of no known format): {folder}/0.md, {folder}/1.md, {folder}/2.md, ...\n"
    assert said in capsys.readouterr().err
    assert json_of(split / "stats.json")["files"] == {
        "read": 1,
        "skipped": {"hidden": 1, "of no known format": 5},
        "first_skipped": {"hidden": [f"{folder}/.x"], "of no known format": [f"{folder}/{i}.md" for i in range(3)]},
    }
    lines = [json.loads(line) for line in (split / "files.jsonl").read_text().splitlines()]
    assert len(lines) == 7 and lines[0] == {"path": f"{folder}/.x", "skipped": "hidden"}
    assert lines[-1] == {"path": f"{folder}/a.txt", "bytes": 27, "changed": (folder / "a.txt").stat().st_mtime_ns}
    train_tokenizer.main([str(folder), "--out", str(folder.parent / "t"), "--vocab_size", "100"])
    assert said in capsys.readouterr().err


def test_the_tokenizer_counts_bad_lines(folder, capsys):
    make(folder, {"a.jsonl": '{"text": "a word and some words more"}\nbad\n'})
    options = ["--out", str(folder.parent / "t"), "--vocab_size", "100"]
    with pytest.raises(ValueError, match="a.jsonl:2: "):
        train_tokenizer.main([str(folder), *options])
    train_tokenizer.main([str(folder), *options, "--skip_bad"])
    assert "1 bad ones skipped: " in capsys.readouterr().err


def test_columns_of_later_files_are_kept(folder, capsys):
    make(folder, {"a.jsonl": DOCUMENT, "b.jsonl": DOCUMENT + '{"text": "two", "timestamp": "t"}\n'})
    make(folder, {"c.jsonl": '{"text": "three", "url": "u"}\n'})
    split = convert(folder.parent, folder)
    assert [row["url"] for row in rows_of(split)] == ["", "", "", "u"]
    assert json_of(split / "stats.json")["columns_not_kept"] == {"timestamp": 1}
    assert "the column timestamp of 1 documents is not kept" in capsys.readouterr().err
    limited = convert(folder.parent, folder, "--limit", "2", split="limited")
    assert "url" not in rows_of(limited)[0]  # no file is looked at that is not read
    beyond = {"beyond the limit of documents": 1}
    files = json_of(limited / "stats.json")["files"]
    assert files == {"read": 2, "skipped": beyond, "first_skipped": dict.fromkeys(beyond, [f"{folder}/c.jsonl"])}


@pytest.mark.parametrize("options", [[], ["--part", "1/1"]])
@pytest.mark.parametrize("after", ["x\nmore\n", "y\n"])  # longer, or of the same size
def test_a_file_that_changes_while_it_is_read_is_named(options, after, folder, monkeypatch):
    make(folder, {"a.txt": "x\n"})
    convert_unit = conversion.convert_unit

    def changing(*args):
        convert_unit(*args)
        (folder / "a.txt").write_text(after)

    monkeypatch.setattr(conversion, "convert_unit", changing)
    with pytest.raises(ValueError, match="a.txt changed while it was read"):
        convert(folder.parent, folder, *options)
    assert not (folder.parent / "mine").exists()


# Options and folders


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size_limit", "big"], "--size_limit: expected a size below 4gb, for example 64mb, got 'big'"),
        (["--size_limit", "0"], "--size_limit: expected"),
        (["--size_limit", "5gb"], "--size_limit: expected"),
        (["--compression", "zstd:99"], "--compression: expected"),
        (["--out_root", "s3://bucket/c4"], "s3://bucket/c4 is no folder of this machine; .*aws s3 sync"),
        (["--out_root", "a.txt"], "a.txt is a file; name a folder"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(arguments, message, folder, monkeypatch):
    make(folder, {"a.txt": "x\n"})
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=message):
        convert_c4.main(["--out_root", "out", "--splits", "mine", "--source", "a.txt", *arguments])
    assert names_in(folder) == ["a.txt"]


def test_work_without_a_complete_unit_does_not_block_other_settings(folder, monkeypatch):
    make(folder, {"a.txt": "x\n"})
    with monkeypatch.context() as patched, pytest.raises(OSError, match="no codec"):
        patched.setattr(MDSWriter, "write", lambda *args: (_ for _ in ()).throw(OSError("no codec")))
        convert(folder.parent, folder, "--compression", "br")
    assert texts_of(convert(folder.parent, folder)) == ["x"]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"mine.partial/precious.txt": "x"}, r"mine.partial is not the work of a conversion \(precious.txt\)"),
        ({"mine/index.json": "{}", "mine/notes/a.md": "x"}, r"mine holds more than a dataset \(notes\)"),
    ],
)
def test_folders_of_others_are_never_replaced(tree, message, folder, tmp_path):
    make(folder, {"a.txt": "x\n"})
    make(tmp_path, tree)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path, folder, "--overwrite")
    assert all((tmp_path / name).exists() for name in tree)
