import gzip
import io
import json
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from streaming import MDSWriter

from src.common.errors import DataError
from src.convert import forms, hub
from src.convert.forms import BadText, Span, read
from src.convert.sources import Inventory, TextSource, iter_documents, units_of
from src.convert.stats import Stats

TEXTS = ["First document.", "Zweites, mit Umlaut: ä.", "third"]


def json_lines(texts=TEXTS, **extra):
    return "".join(json.dumps({"text": text, **extra}) + "\n" for text in texts).encode()


def documents_of(source, **options):
    return list(iter_documents(TextSource((str(source),)), **options))


def texts_of(source, **options):
    return [document["text"] for document in documents_of(source, **options)]


def parquet_of(table, **options):
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(table), out, **options)
    return out.getvalue()


def write_mds(folder, columns, rows, **options):
    with MDSWriter(out=str(folder), columns=columns, **options) as writer:
        for row in rows:
            writer.write(row)


BOM = b"\xef\xbb\xbf"
FORMS = {
    "a.jsonl": json_lines(),
    "a.json": json_lines(),
    "a.json.gz": gzip.compress(json_lines()),
    "a.jsonl.gz": gzip.compress(json_lines()),
    "a.txt": "\r\n".join(TEXTS).encode(),
    "a.txt.gz": gzip.compress("\n".join(TEXTS).encode()),
    "a.parquet": parquet_of({"text": TEXTS, "n": [1, 2, 3]}),
    "not.txt.jsonl": json_lines(),
    "bom.txt": BOM + "\n".join(TEXTS).encode(),
    "bom.jsonl": BOM + json_lines(),
}


@pytest.mark.parametrize("name", FORMS)
def test_each_form_of_file_gives_its_texts(name, tmp_path):
    (tmp_path / name).write_bytes(FORMS[name])
    assert texts_of(tmp_path / name) == TEXTS


def test_folder_is_read_in_sorted_order_with_its_subfolders(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.txt").write_text("three\n")
    (tmp_path / "a.txt").write_text("one\n\ntwo\n  \n")
    (tmp_path / "notes.md").write_text("not read")
    stats = Stats()
    assert texts_of(tmp_path, stats=stats) == ["one", "two", "three"]
    assert (stats.documents, stats.empty, stats.bad) == (3, 2, 0)


def test_c4_folder_has_splits_and_columns(tmp_path):
    folder = tmp_path / "en"
    folder.mkdir()
    for name, texts in (("train.00001", ["c"]), ("train.00000", ["a", "b"]), ("validation.00000", ["v"])):
        data = json_lines(texts, timestamp="2019-04-25T12:57:54Z", url="u")
        (folder / f"c4-{name}-of-00002.json.gz").write_bytes(gzip.compress(data))
    for source in (tmp_path, folder):
        assert texts_of(source, split="train") == ["a", "b", "c"] and texts_of(source, split="val") == ["v"]
    assert documents_of(folder)[0] == {"text": "a", "timestamp": "2019-04-25T12:57:54Z", "url": "u"}


def test_c4_is_read_from_the_hub(monkeypatch):
    """At the revision that the hub has then. A dataset of two files replaces the hub's."""
    import datasets
    import huggingface_hub

    def rows(files):
        for file in files:
            yield from ({"text": f"{file}{i}", "timestamp": "t", "url": "u"} for i in range(2))

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.IterableDataset.from_generator(rows, gen_kwargs={"files": ["a", "b"]})

    calls = []
    hub.revision.cache_clear()
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda name: SimpleNamespace(sha=f"sha of {name}"))
    want = [{"text": text, "timestamp": "t", "url": "u"} for text in ("a0", "a1", "b0", "b1")]
    assert list(iter_documents(TextSource(), split="val")) == want
    revision = "sha of allenai/c4"
    assert calls == [(("allenai/c4", "en"), {"split": "validation", "streaming": True, "revision": revision})]
    second = list(units_of(Inventory(TextSource(), "val"), 1))[1]
    part = f"hf:allenai/c4@{revision}?name=en&split=validation#1"
    assert second == [Span(part)]
    places = [f"{part}:{i}" for i in (1, 2)]
    assert list(read(second[0], "text", False, Stats())) == list(zip(places, want[2:], strict=True))

    def offline(*args, **kwargs):
        raise Exception("no route")  # such as httpx.ConnectError, which is no OSError

    for module, name in ((datasets, "load_dataset"), (huggingface_hub, "dataset_info")):
        monkeypatch.setattr(module, name, offline)
        with pytest.raises(DataError, match=r"Hub is unreachable \(no route\); offline, give a --source"):
            list(iter_documents(TextSource(), split="train"))
        hub.revision.cache_clear()
    hub.load.cache_clear()


GOOD, GZ = json_lines(["good"]), gzip.compress(json_lines(["good", "lost"] * 2000))
BAD = {
    "x.jsonl": (GOOD + b"{not json}\n" + GOOD, "x.jsonl:2: invalid JSON", 2),
    "y.jsonl": (GOOD + b'{"txt": 1}\n', "y.jsonl:2: expected a field 'text'", 1),
    "z.jsonl": (b'["text"]\n' + GOOD, "z.jsonl:1: expected a field 'text'", 1),
    "half.jsonl": (GOOD + b'{"text": "\\ud800"}\n', "half.jsonl:2: invalid Unicode", 1),
    "deep.jsonl": (GOOD + b"[" * 200_000, "deep.jsonl:2: invalid JSON", 1),
    "u.txt": (b"good\n\xff\xfe\n", "u.txt:2: invalid UTF-8", 1),
    "n.json.gz": (GOOD, "n.json.gz:1: the rest of the file cannot be decompressed", 0),
    "p.parquet": (b"no parquet", "p.parquet:1: the rest of the file cannot be read as parquet", 0),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lines_are_named_with_file_and_line_or_counted(name, tmp_path):
    data, message, good = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadText) as error:
        texts_of(tmp_path / name)
    assert message in str(error.value)
    stats = Stats()
    assert texts_of(tmp_path / name, skip_bad=True, stats=stats) == ["good"] * good
    assert stats.bad == 1 and message in stats.first_bad[0]


def test_a_truncated_gzip_gives_its_beginning_and_the_next_file(tmp_path):
    (tmp_path / "a.json.gz").write_bytes(GZ[:-20])
    (tmp_path / "b.txt").write_text("next\n")
    with pytest.raises(BadText, match=r"a.json.gz:\d+: the rest of the file"):
        texts_of(tmp_path)
    stats = Stats()
    texts = texts_of(tmp_path, skip_bad=True, stats=stats)
    assert texts[0] == "good" and texts[-1] == "next" and stats.bad == 1


def test_parquet_with_bad_rows_and_bad_pages(tmp_path):
    """Arrow does not see them in the footer. Both are named, and the next file is read."""
    data = pyarrow.array([b"good", b"\xff\xfe"], pyarrow.binary()).buffers()
    bad_utf8 = pyarrow.StringArray.from_buffers(2, data[1], data[2])
    (tmp_path / "a.parquet").write_bytes(parquet_of({"text": bad_utf8}))
    page = bytearray(parquet_of({"text": [f"page {i}" for i in range(2000)]}, compression="zstd"))
    page[1000:1500] = bytes(500)
    (tmp_path / "b.parquet").write_bytes(page)
    (tmp_path / "c.txt").write_text("next\n")
    with pytest.raises(BadText, match="a.parquet:2: "):
        texts_of(tmp_path)
    stats = Stats()
    assert texts_of(tmp_path, skip_bad=True, stats=stats) == ["good", "next"]
    assert stats.bad == 2 and "b.parquet:1: the rest of the file" in stats.first_bad[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "no such file"),
        ("a.md", "no file of a known format"),
        ("other", "known format"),
        (".", r"c4-validation\.\*\) are missing"),
    ],
)
def test_sources_without_files_are_refused(name, message, tmp_path):
    (tmp_path / "c4-train.00000-of-00001.json.gz").write_bytes(GZ)
    (tmp_path / "other").mkdir()
    for folder in (tmp_path, tmp_path / "other"):
        (folder / "a.md").write_text("x")
    with pytest.raises(DataError, match=message):
        texts_of(tmp_path / name, split="val")


def of_units(source, size):
    """Texts of the source, one list per unit."""
    stats = Stats()
    spans = units_of(Inventory(TextSource((str(source),))), size)
    return [[d["text"] for span in unit for _, d in read(span, "text", False, stats)] for unit in spans]


@pytest.mark.parametrize("size", [1, 2, 7, 10, 1000])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_parts_of_a_large_file_lose_and_repeat_nothing(size, ending, tmp_path):
    """Parts begin anywhere: within a line, at its beginning, at its end."""
    texts = ["one", "x" * 25, "zwölf", "y", "last"]
    (tmp_path / "a.txt").write_bytes(ending.join(texts).encode())
    units = of_units(tmp_path, size)
    assert [text for unit in units for text in unit] == texts
    assert len(units) == -(-(tmp_path / "a.txt").stat().st_size // size)


def test_places_in_parts_are_bytes(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\nthree\n")
    assert list(read(Span(str(path), 2, 99), "text", False, Stats())) == [
        (f"{path}:byte 4", {"text": "two"}),
        (f"{path}:byte 8", {"text": "three"}),
    ]
    assert [place for place, _ in read(Span(str(path)), "text", False, Stats())] == [f"{path}:{i}" for i in (1, 2, 3)]


def test_units_group_small_files_and_leave_gzip_whole(tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text(f"text {i}\n")
    assert [len(unit) for unit in units_of(Inventory(TextSource((str(tmp_path),))), 3 * 4096)] == [3, 3, 3]
    folder = tmp_path / "gz"
    folder.mkdir()
    (folder / "a.json.gz").write_bytes(GZ)
    assert of_units(folder, 1) == [["good", "lost"] * 2000]


def test_parquet_is_read_by_row_groups(tmp_path):
    table = {"text": [f"row {i}" for i in range(10)]}
    (tmp_path / "a.parquet").write_bytes(parquet_of(table, row_group_size=4))
    assert [len(unit) for unit in of_units(tmp_path, 1)] == [4, 4, 2]
    places = [place for place, _ in read(Span(str(tmp_path / "a.parquet"), 1, 2), "text", False, Stats())]
    assert places == [f"{tmp_path / 'a.parquet'}:{i}" for i in (5, 6, 7, 8)]


def test_too_long_lines_are_bad(tmp_path, monkeypatch):
    monkeypatch.setattr(forms, "MAX_LINE", 10)
    (tmp_path / "a.txt").write_text("short\n" + "x" * 35 + "\nnine byte\nlast")
    with pytest.raises(BadText, match="a.txt:2: line longer than 10 bytes"):
        texts_of(tmp_path)
    stats = Stats()
    assert texts_of(tmp_path, skip_bad=True, stats=stats) == ["short", "nine byte", "last"] and stats.bad == 1


@pytest.mark.parametrize("compression", [None, "zstd", "gz"])
def test_mds_shards_are_a_source(compression, tmp_path):
    rows = [{"text": f"{text} {i}", "url": "u" * i, "n": i} for i, text in enumerate(TEXTS * 20)]
    columns = {"text": "str", "url": "str", "n": "int"}
    write_mds(tmp_path / "s", columns, rows, compression=compression, size_limit=500)
    assert documents_of(tmp_path / "s") == [{"text": r["text"], "url": r["url"]} for r in rows]
    assert len(of_units(tmp_path / "s", 1)) == len(list((tmp_path / "s").glob("shard*"))) > 3


def test_mds_shards_without_text_are_refused(tmp_path):
    write_mds(tmp_path / "s", {"tokens": "bytes"}, [{"tokens": b"1234"}])
    with pytest.raises(DataError, match=r"no column 'text' \(tokens\)"):
        texts_of(tmp_path / "s")
    (tmp_path / "s" / "index.json").write_text("{}")
    with pytest.raises(DataError, match="is not an index of MDS shards"):
        texts_of(tmp_path / "s")


@pytest.mark.parametrize("name", ["../shard.00000.mds", "/etc/hostname", "a/../../b.mds", ".."])
@pytest.mark.parametrize("kind", ["raw_data", "zip_data"])
def test_index_that_names_files_outside_its_folder_is_refused(name, kind, tmp_path):
    write_mds(tmp_path / "s", {"text": "str"}, [{"text": text} for text in TEXTS], compression="zstd")
    index = json.loads((tmp_path / "s" / "index.json").read_text())
    index["shards"][0][kind]["basename"] = name
    (tmp_path / "s" / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"index.json names .*, outside its folder"):
        texts_of(tmp_path / "s")


def test_damaged_mds_shards_are_named_and_pickles_are_not_loaded(tmp_path):
    write_mds(tmp_path / "a", {"text": "str"}, [{"text": text} for text in TEXTS])
    shard = tmp_path / "a" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(BadText, match=f"{shard}:3: the rest of the shard cannot be read"):
        texts_of(tmp_path / "a")
    assert texts_of(tmp_path / "a", skip_bad=True) == TEXTS[:2]
    write_mds(tmp_path / "b", {"text": "pkl"}, [{"text": "harmless"}])
    with pytest.raises(BadText, match="shard.00000.mds:1: expected a field 'text'"):
        texts_of(tmp_path / "b")
