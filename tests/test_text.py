import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from src.text import BadText, Counts, iter_documents

TEXTS = ["First document.", "Zweites, mit Umlaut: ä.", "third"]


def json_lines(texts=TEXTS, **extra):
    return "".join(json.dumps({"text": text, **extra}) + "\n" for text in texts).encode()


def read(source, **options):
    return [document["text"] for document in iter_documents(str(source), **options)]


WRITERS = {
    "a.jsonl": lambda path: path.write_bytes(json_lines()),
    "a.json": lambda path: path.write_bytes(json_lines()),
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(json_lines())),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(json_lines())),
    "a.txt": lambda path: path.write_bytes("\r\n".join(TEXTS).encode()),
    "a.txt.gz": lambda path: path.write_bytes(gzip.compress("\n".join(TEXTS).encode())),
    "a.parquet": lambda path: pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "n": [1, 2, 3]}), path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_each_form(name, tmp_path):
    WRITERS[name](tmp_path / name)
    assert read(tmp_path / name) == TEXTS


def test_a_folder_is_read_in_sorted_order_with_its_subfolders(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.txt").write_text("three\n")
    (tmp_path / "a.txt").write_text("one\n\ntwo\n  \n")
    (tmp_path / "notes.md").write_text("not read")
    counts = Counts()
    assert read(tmp_path, counts=counts) == ["one", "two", "three"]
    assert (counts.documents, counts.empty, counts.bad) == (3, 2, 0)


def test_c4_folder_has_splits_and_columns(tmp_path):
    folder = tmp_path / "en"
    folder.mkdir()
    for name, texts in (("train.00001", ["c"]), ("train.00000", ["a", "b"]), ("validation.00000", ["v"])):
        data = json_lines(texts, timestamp="2019-04-25T12:57:54Z", url="u")
        (folder / f"c4-{name}-of-00002.json.gz").write_bytes(gzip.compress(data))
    for source in (tmp_path, folder):
        assert read(source, split="train") == ["a", "b", "c"] and read(source, split="val") == ["v"]
    assert next(iter_documents(str(folder))) == {"text": "a", "timestamp": "2019-04-25T12:57:54Z", "url": "u"}


def test_hub(monkeypatch):
    """The real call, on rows of the hub's form."""
    import datasets

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return iter([{"text": "a", "timestamp": "t", "url": "u"}])

    calls = []
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(iter_documents(split="val")) == [{"text": "a", "timestamp": "t", "url": "u"}]
    assert calls == [(("allenai/c4", "en"), {"split": "validation", "streaming": True})]

    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"cannot be had from the hub \(no route\).*--source"):
        list(iter_documents())


GOOD, GZ = json_lines(["good"]), gzip.compress(json_lines(["good", "lost"] * 2000))
BAD = {
    "x.jsonl": (GOOD + b"{not json}\n" + GOOD, "x.jsonl:2: no JSON", 2),
    "y.jsonl": (GOOD + b'{"txt": 1}\n', "y.jsonl:2: no field 'text'", 1),
    "z.jsonl": (b'["text"]\n' + GOOD, "z.jsonl:1: no field 'text'", 1),
    "half.jsonl": (GOOD + b'{"text": "\\ud800"}\n', "half.jsonl:2: no Unicode text", 1),
    "deep.jsonl": (GOOD + b"[" * 200_000, "deep.jsonl:2: no JSON", 1),
    "u.txt": (b"good\n\xff\xfe\n", "u.txt:2: no UTF-8", 1),
    "n.json.gz": (GOOD, "n.json.gz:1: the rest of the file cannot be unpacked", 0),
    "p.parquet": (b"no parquet", "p.parquet:1: the rest of the file cannot be read as parquet", 0),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_bad_is_named_with_file_and_line_or_counted(name, tmp_path):
    data, message, good = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadText) as error:
        read(tmp_path / name)
    assert message in str(error.value)
    counts = Counts()
    assert read(tmp_path / name, skip_bad=True, counts=counts) == ["good"] * good
    assert counts.bad == 1 and message in counts.first_bad[0]


def test_a_truncated_gzip_gives_its_beginning_and_the_next_file(tmp_path):
    (tmp_path / "a.json.gz").write_bytes(GZ[:-20])
    (tmp_path / "b.txt").write_text("next\n")
    with pytest.raises(BadText, match=r"a.json.gz:\d+: the rest of the file"):
        read(tmp_path)
    counts = Counts()
    texts = read(tmp_path, skip_bad=True, counts=counts)
    assert texts[0] == "good" and texts[-1] == "next" and counts.bad == 1


def test_parquet_with_bad_rows_and_bad_pages(tmp_path):
    """Arrow looks at neither while it reads the footer; both are named, and the next file is read."""
    data = pyarrow.array([b"good", b"\xff\xfe"], pyarrow.binary()).buffers()
    bad_utf8 = pyarrow.StringArray.from_buffers(2, data[1], data[2])
    pyarrow.parquet.write_table(pyarrow.table({"text": bad_utf8}), tmp_path / "a.parquet")
    table = pyarrow.table({"text": [f"page {i}" for i in range(2000)]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet", compression="zstd")
    page = bytearray((tmp_path / "b.parquet").read_bytes())
    page[1000:1500] = bytes(500)
    (tmp_path / "b.parquet").write_bytes(page)
    (tmp_path / "c.txt").write_text("next\n")
    with pytest.raises(BadText, match="a.parquet:2: "):
        read(tmp_path)
    counts = Counts()
    assert read(tmp_path, skip_bad=True, counts=counts) == ["good", "next"]
    assert counts.bad == 2 and "b.parquet:1: the rest of the file" in counts.first_bad[1]


def test_the_suffix_decides_not_the_rest_of_the_name(tmp_path):
    (tmp_path / "my.txt.jsonl").write_bytes(json_lines())
    assert read(tmp_path / "my.txt.jsonl") == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark_is_no_text(name, tmp_path):
    data = "\n".join(TEXTS).encode() if name == "a.txt" else json_lines()
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + data)
    assert read(tmp_path / name) == TEXTS


def test_a_c4_folder_without_the_split(tmp_path):
    (tmp_path / "c4-train.00000-of-00001.json.gz").write_bytes(gzip.compress(GOOD))
    with pytest.raises(ValueError, match=r"c4-validation\.\*\) are not here"):
        read(tmp_path, split="val")


@pytest.mark.parametrize(
    ("name", "message"), [("none", "no such file"), ("a.md", "known are .json.gz"), (".", "known are")]
)
def test_sources_that_cannot_be_read(name, message, tmp_path):
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)
