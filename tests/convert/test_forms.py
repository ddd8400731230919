"""The forms in which text lies: each gives its documents, and what is damaged is named."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from streaming import CSVWriter, JSONWriter, MDSWriter, TSVWriter

from benchmarks.texts import film_reviews
from scripts.quickstart import default_documents
from src.common import streams
from src.common.errors import DataError
from src.convert import forms, mds, tables
from src.convert.files import BadText, File, Form, Span, form_of
from src.convert.forms import columns_of, read, spans_of
from src.convert.sources import TextSource, iter_documents
from src.convert.stats import Stats
from tests.convert.splits import bytes_of, convert

TEXTS = ["First document.", 'Quotes "here", tab\tand comma', "Zeile eins\nZeile zwei: ä"]
ONE_LINE = [text.replace("\n", " ") for text in TEXTS]


def texts_of(path, column="text", skip_bad=False, stats=None):
    return [document["text"] for _, document in read(Span(str(path)), column, skip_bad, stats or Stats())]


def source_texts(place, column="text"):
    return [document["text"] for document in iter_documents(TextSource((str(place),), text_column=column))]


def bad_of(path, column="text"):
    """Texts, and the message about the only bad line."""
    stats = Stats()
    texts = texts_of(path, column, True, stats)
    assert stats.bad == 1, stats.first_bad
    with pytest.raises(BadText) as error:
        texts_of(path, column)
    assert str(error.value) == stats.first_bad[0]
    return texts, stats.first_bad[0]


def json_lines(texts, column="text"):
    return "".join(json.dumps({column: text, "n": 1}) + "\n" for text in texts).encode()


def separated(texts, delimiter, column="text"):
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows([["n", column], *([i, text] for i, text in enumerate(texts))])
    return out.getvalue().encode()


def zst(data):
    """Two frames between skippable ones, as parallel compressors write them."""
    skippable = b"\x50\x2a\x4d\x18\x05\x00\x00\x00hello"
    half = len(data) // 2
    return skippable + zstandard.compress(data[:half]) + skippable + zstandard.compress(data[half:])


COMPRESSIONS = {
    "": lambda data: data,
    ".gz": lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:]),
    ".bz2": lambda data: bz2.compress(data[:9]) + bz2.compress(data[9:]),
    ".xz": lambda data: lzma.compress(data[:9]) + lzma.compress(data[9:]),
    ".zst": zst,
    ".zstd": zst,
}
CONTENTS = {
    "jsonl": (json_lines(TEXTS), TEXTS),
    "json": (json.dumps([{"text": text} for text in TEXTS]).encode(), TEXTS),
    "ndjson": (json_lines(TEXTS), TEXTS),
    "csv": (separated(TEXTS, ","), TEXTS),
    "tsv": (separated(TEXTS, "\t"), TEXTS),
    "txt": ("\n".join(ONE_LINE).encode(), ONE_LINE),
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", CONTENTS)
def test_text_is_read_under_each_compression(kind, compression, tmp_path):
    content, texts = CONTENTS[kind]
    path = tmp_path / f"A.{kind}{compression}".upper()
    path.write_bytes(COMPRESSIONS[compression](content))
    assert texts_of(path) == texts


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.JSONL.Zst", Form("jsonl", "zst")),
        ("a.b.txt", Form("txt")),
        ("shard.00000.mds.zstd", Form("mds")),
        ("https://host/a.csv.gz?signature=b.txt", Form("csv", "gz")),
        *((name, None) for name in ("a.zst", "a.gz", "a.parquet.gz", "a.arrow.zst", "a.md", "json", "a.csv.zip", "gz")),
    ],
)
def test_the_form_is_in_the_name(name, form):
    assert form_of(name) == form


@pytest.mark.parametrize(
    "damaged", ["cut", "cut at its second frame", "damaged at its second frame", "not compressed", "no bytes"]
)
@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "json"])
def test_damaged_streams_are_named(kind, compression, damaged, tmp_path):
    texts = [f"{i} {'x' * i}" for i in range(500)]
    content = separated(texts, ",") if kind == "csv" else json_lines(texts)
    if kind == "json":
        content = json.dumps([{"text": text} for text in texts]).encode()
    whole = {".gz": gzip, ".bz2": bz2, ".xz": lzma, ".zst": zstandard}[compression].compress(content)
    data = {
        "cut": whole[: len(whole) // 2],
        "cut at its second frame": whole + whole[:9],
        "damaged at its second frame": whole + b"x" + whole[1:],
        "not compressed": content,
        "no bytes": b"",
    }
    (tmp_path / f"a.{kind}{compression}").write_bytes(data[damaged])
    good, message = bad_of(tmp_path / f"a.{kind}{compression}")
    assert "the rest of the file cannot be decompressed" in message
    assert good == texts[: len(good)] and (len(good) == 500) == (
        damaged.endswith("at its second frame") and kind != "json"
    )


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
def test_zeros_between_frames_are_padding(compression, tmp_path):
    compress = {".gz": gzip, ".bz2": bz2, ".xz": lzma, ".zst": zstandard}[compression].compress
    frames = [compress(json_lines([text])) for text in TEXTS]
    (tmp_path / f"a.jsonl{compression}").write_bytes((b"\0" * 2000).join([*frames, b""]))
    assert texts_of(tmp_path / f"a.jsonl{compression}") == TEXTS


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
def test_other_bytes_in_a_stream_are_noticed(compression, tmp_path):
    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(compression)
    if compress is None:  # zstd's checksum is optional
        compress = zstandard.ZstdCompressor(write_checksum=True).compress
    data = bytearray(compress(json_lines(f"{i} {'x' * i}" for i in range(500))))
    data[len(data) // 2] ^= 255
    (tmp_path / f"a.jsonl{compression}").write_bytes(data)
    with pytest.raises(BadText):
        texts_of(tmp_path / f"a.jsonl{compression}")


def test_zstd_of_long_windows(tmp_path):
    """As zstd --long=31 writes; a reader with the usual limit of 128 MB refuses it."""
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    out = io.BytesIO()
    with zstandard.ZstdCompressor(compression_params=parameters).stream_writer(out, closefd=False) as writer:
        writer.write(json_lines(TEXTS))
    assert zstandard.get_frame_parameters(out.getvalue()).window_size == 1 << 31
    (tmp_path / "a.jsonl.zst").write_bytes(out.getvalue())
    assert texts_of(tmp_path / "a.jsonl.zst") == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.json.zst", "a.csv.gz"])
def test_streams_are_read_in_bounded_memory(name, tmp_path):
    texts = [f"{i} {'word ' * 200}" for i in range(8000)]
    if name == "a.json.zst":
        content = json.dumps([{"text": text} for text in texts]).encode()
    else:
        content = separated(texts, ",") if "csv" in name else json_lines(texts)
    compress = gzip.compress if name.endswith("gz") else zstandard.compress
    (tmp_path / name).write_bytes(compress(content))
    tracemalloc.start()
    assert sum(1 for _ in read(Span(str(tmp_path / name)), "text", False, Stats())) == len(texts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20 and len(content) > 8e6


def table_of(array):
    return pa.table({"n": range(len(array)), "text": array})


def parquet(path, table):
    pyarrow.parquet.write_table(table, path)


def arrow_file(path, table):
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def arrow_stream(path, table):
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()]
ARRAYS = {
    **{str(kind): pa.array(TEXTS, pa.string()).cast(kind) for kind in TYPES},
    "dictionary": pa.array(TEXTS).dictionary_encode(),
    "dictionary of bytes": pa.array(TEXTS).cast(pa.binary()).dictionary_encode(),
}


@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.parametrize("write", [parquet, arrow_file, arrow_stream])
def test_tables_hold_strings_in_many_types(write, array, tmp_path):
    path = str(tmp_path / ("a.parquet" if write is parquet else "a.arrow"))
    write(path, table_of(ARRAYS[array]))
    assert texts_of(path) == TEXTS and columns_of(path, "text") == ["text"]


@pytest.mark.parametrize("write", [parquet, arrow_file, arrow_stream])
def test_columns_of_tables_are_named(write, tmp_path):
    path = str(tmp_path / ("a.parquet" if write is parquet else "a.arrow"))
    nested = pa.array([{"text": text, "n": 1} for text in TEXTS])
    write(path, pa.table([TEXTS, TEXTS, nested, TEXTS, [1, 2, 3]], ["twice", "twice", "doc", "url", "n"]))
    assert texts_of(path, "doc.text") == TEXTS and columns_of(path, "doc.text") == ["text", "url"]
    for column, message in {
        "text": "expected a field 'text' that holds a string; there are: twice, twice, doc, url, n (--text_column",
        "twice": "there are 2 columns 'twice'; rename all but one",
        "doc": "expected a field 'doc' that holds a string, got an object",
        "doc.no": "expected a field 'doc.no'",
        "n": "expected a field 'n' that holds a string, got int",
    }.items():
        with pytest.raises(BadText, match=r"a\.(parquet|arrow):1: ") as error:
            texts_of(path, column)
        assert message in str(error.value)


def test_one_bad_string_of_a_table_is_one_bad_row(tmp_path):
    offsets, data = pa.array([b"good", b"\xff\xfe", b"last"]).buffers()[1:]
    bad = pa.StringArray.from_buffers(3, offsets, data)
    for write, name in ((parquet, "a.parquet"), (arrow_stream, "a.arrow")):
        write(str(tmp_path / name), table_of(bad))
        good, message = bad_of(tmp_path / name)
        assert good == ["good", "last"] and f"{name}:2: invalid UTF-8" in message


def test_damaged_arrow_files_are_named(tmp_path):
    arrow_stream(str(tmp_path / "a.arrow"), table_of(pa.array(TEXTS)))
    (tmp_path / "a.arrow").write_bytes((tmp_path / "a.arrow").read_bytes()[:-60])
    good, message = bad_of(tmp_path / "a.arrow")
    assert good == TEXTS[:2] and "a.arrow:3: the rest of the file cannot be read as arrow" in message
    arrow_stream(str(tmp_path / "c.arrow"), table_of(pa.array(TEXTS)))
    (tmp_path / "c.arrow").write_bytes((tmp_path / "c.arrow").read_bytes()[:-8])
    good, message = bad_of(tmp_path / "c.arrow")
    assert good == TEXTS and "c.arrow:4: the file ends without the mark of its end" in message
    (tmp_path / "b.arrow").write_bytes(b"")
    assert "b.arrow:1: the rest" in bad_of(tmp_path / "b.arrow")[1]


SEPARATED = {
    "bom": (b"\xef\xbb\xbftext,n\r\none,1\r\ntwo,2\r\n", ["one", "two"], None),
    "blank line": (b"text\none\n\ntwo\n", ["one", "two"], None),
    "long field": (b"text\n" + b"x" * 200_000 + b"\n", ["x" * 200_000], None),
    "nul": (b"text\na\0b\n", ["a\0b"], None),
    "too many": (
        b'text,n\n"one\n\n",1\ntwo,2,3\nthree,3\n',
        ["one\n\n", "three"],
        ":5: expected 2 fields as in the header, got 3",
    ),
    "too few": (b"n,text\n1\n2,two\n", ["two"], ":2: expected 2 fields as in the header, got 1"),
    "quote": (b'text,n\n"on"e,1\ntwo,2\n', ["two"], ":2: the row is not CSV"),
    "open quote": (
        b'text,n\n"one,1\ntwo,2\nthe "third",3\nfour,4\n',
        ["four"],
        ":2: the row is not CSV (',' expected after '\"'; 3 lines)",
    ),
    "not closed": (b'text,n\none,1\n"two,2\n', ["one"], ":3: the row is not CSV (unexpected end of data)"),
    "utf-8": (b"text,n\n\xff\xfe,1\ntwo,2\n", ["two"], ":2: invalid U"),
    "no text": (b"a;b\none;1\n", [], ":1: expected a field 'text' that holds a string; there are: a;b"),
    "twice": (b"text,text\none,1\n", [], ":1: there are 2 columns 'text'"),
    "no header": (b"one\n", [], ":1: expected a field 'text' that holds a string; there are: one"),
    "empty": (b"", [], None),
}


@pytest.mark.parametrize("name", SEPARATED)
def test_rows_of_csv(name, tmp_path):
    content, texts, message = SEPARATED[name]
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    if message is None:
        assert texts_of(path) == texts
    else:
        good, found = bad_of(path)
        assert good == texts and f"a.csv{message}" in found


def test_too_long_fields_and_values_are_bad(tmp_path, monkeypatch):
    monkeypatch.setattr(forms, "MAX_VALUE", 1 << 16)
    (tmp_path / "a.csv").write_text(f"text\n{'x' * 70_000}\ngood\n")
    good, message = bad_of(tmp_path / "a.csv")
    assert good == ["good"] and "a.csv:2: the row is not CSV (field larger than field limit (65536))" in message
    (tmp_path / "a.json").write_text(json.dumps(["x" * 300_000, "lost"]))
    assert "a value longer than 65,536 characters" in bad_of(tmp_path / "a.json")[1]
    monkeypatch.undo()
    assert texts_of(tmp_path / "a.json") == ["x" * 300_000, "lost"]


OBJECTS = [{"text": 'a [ " , } ä, and more', "n": -1.5e3}, {"text": "two", "deep": [{"text": "no"}]}]
JSON = {
    "array": json.dumps(OBJECTS),
    "array over lines": json.dumps(OBJECTS, indent=2),
    "array, an object per line": "[\n" + ",\n".join(map(json.dumps, OBJECTS)) + "\n]\n",
    "objects over lines": "\n".join(json.dumps(row, indent=4) for row in OBJECTS),
    "strings": json.dumps([row["text"] for row in OBJECTS]),
    "white space": "\n \t" + json.dumps(OBJECTS) + "\n\n",
}


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("layout", JSON)
@pytest.mark.parametrize("chunk", [1, 1 << 16])
def test_json_over_several_lines_is_read(layout, bom, chunk, tmp_path, monkeypatch):
    """However the pieces that are read divide it."""
    monkeypatch.setattr(forms, "CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text(bom + JSON[layout], encoding="utf-8")
    assert texts_of(path) == [row["text"] for row in OBJECTS]
    assert [span for span, _ in spans_of(File(str(path), path.stat().st_size, 0), 5)] == [Span(str(path))]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson"])
@pytest.mark.parametrize("layout", ["array", "array over lines", "objects over lines"])
def test_the_name_does_not_hide_such_json(name, layout, tmp_path):
    (tmp_path / name).write_text(JSON[layout])
    assert texts_of(tmp_path / name) == [row["text"] for row in OBJECTS]


BAD_JSON = {
    "not closed": ('[{"text": "one"}', ["one"], "a.json:2: the rest of the file cannot be read as JSON (the a"),
    "cut": ('[{"text": "one"}, {"text": "tw', ["one"], "a.json:2: the rest of the file cannot be read as JSON (Unt"),
    "more": ('[{"text": "one"}] {"text": "two"}', ["one"], "a.json:2: the rest of the file cannot be read as JSON (t"),
    "no JSON": ('[{"text": "one"}, {text: 1}, {"text": "three"}]', ["one"], "a.json:2: the rest of the file cannot be"),
    "utf-8": (b'[{"text": "one"}, {"text": "\xff"}]', [], "a.json:1: the rest of the file cannot be read as JSON ("),
    "number": ('[{"text": "one"}, 12]', ["one"], "a.json:2: expected a field 'text' of an object, got int"),
    "digits": (f'{{"text": "one"}}\n{{"n": {"1" * 5000}}}', ["one"], "a.json:2: invalid JSON (Exceeds"),
    "data": ('{"version": 1, "data": [{"text": "one"}]}', [], "there are: version, data"),
    "data over lines": ('{\n"version": 1,\n"data": []}', [], "there are: version, data"),
}  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.csv", "a.jsonl", "a.json"])
def test_utf16_is_not_taken_for_other_words(name, encoding, tmp_path):
    content = CONTENTS[form_of(name).kind][0].decode().encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert bad_of(tmp_path / name) == (
        [],
        f"{tmp_path}/{name}:1: the file is in UTF-16 or UTF-32 (iconv -f UTF-16 -t UTF-8), or no text",
    )
    for start in (0, 9):
        assert not list(read(Span(str(tmp_path / name), start, 99), "text", True, Stats()))


def test_a_field_that_occurs_twice_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "\\"text\\"", "x": {"text": 1}, "y": "text"}\n{"text": "1", "text": "2"}\n'
    )
    good, message = bad_of(tmp_path / "a.jsonl")
    assert good == ['"text"'] and "a.jsonl:2: the field 'text' occurs twice in one object; rename one" in message


@pytest.mark.parametrize("name", BAD_JSON)
def test_damaged_json_is_named(name, tmp_path):
    content, texts, message = BAD_JSON[name]
    (tmp_path / "a.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    good, found = bad_of(tmp_path / "a.json")
    assert good == texts and message in found


def write(path, column, values):
    """The values in a column, by the form that the path says."""
    if path.suffix == ".parquet":
        parquet(path, pa.table({column: pa.array(values), "n": [0] * len(values)}))
    elif path.suffix == ".arrow":
        arrow_stream(str(path), pa.table({column: pa.array(values), "n": [0] * len(values)}))
    elif path.suffix == ".json":
        path.write_text(json.dumps([{column: value, "n": 0} for value in values]))
    elif path.suffix == ".jsonl":
        path.write_bytes(json_lines(values, column))
    elif path.suffix == ".mds":
        with MDSWriter(out=str(path.parent / "mds"), columns={column: "str", "n": "int"}) as writer:
            for value in values:
                writer.write({column: value or "", "n": 0})
        (path.parent / "mds" / "shard.00000.mds").rename(path)
    else:
        path.write_bytes(separated([value or "" for value in values], "," if path.suffix == ".csv" else "\t", column))


NAMES = ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.parquet", "a.arrow", "a.mds"]


@pytest.mark.parametrize("name", NAMES)
def test_the_text_may_have_another_name_and_be_null(name, tmp_path):
    path = tmp_path / name
    write(path, "content", ["one", None, "three"])
    stats = Stats()
    assert texts_of(path, "content", stats=stats) == ["one", "three"] and stats.empty == 1
    assert columns_of(str(path), "content") == ["text"]
    with pytest.raises(BadText, match="expected a field 'text' that .*there are: .*content.*--text_column"):
        texts_of(path)


def test_objects_within_objects_have_names_with_dots(tmp_path):
    rows = [{"a": {"b": "one"}, "a.b": "by name"}, {"a": {"b": "two"}}, {"a": {"c": 1}}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    good, message = bad_of(tmp_path / "a.jsonl", "a.b")
    assert good == ["by name", "two"] and "a.jsonl:3: expected a field 'a.b'" in message


@pytest.mark.parametrize("encoding", ["str", "bytes"])
def test_mds_holds_text_as_strings_or_bytes(encoding, tmp_path):
    with MDSWriter(out=str(tmp_path), columns={"text": encoding, "url": encoding}) as writer:
        for text in TEXTS:
            value = text.encode() if encoding == "bytes" else text
            writer.write({"text": value, "url": value})
    documents = [document for _, document in read(Span(str(tmp_path / "shard.00000.mds")), "text", False, Stats())]
    assert documents == [{"text": text, "url": text} for text in TEXTS]


@pytest.mark.parametrize(
    ("writer", "compression"), [(JSONWriter, None), (JSONWriter, "zstd"), (CSVWriter, None), (TSVWriter, "gz")]
)
def test_other_shards_of_streaming_are_read(writer, compression, tmp_path):
    """Each as its writer means it: without quotes in CSV. They are one part each, however large."""
    texts = [f'"quotes" {i} " ä' for i in range(200)]
    columns = {"text": "str", "url": "str"}
    with writer(out=str(tmp_path), columns=columns, compression=compression, size_limit=1000) as out:
        for text in texts:
            out.write({"text": text, "url": "u"})
    assert source_texts(tmp_path) == texts
    paths = mds.files(tmp_path, "text")
    assert [span for span, _ in spans_of(File(str(paths[0]), 1000, 0), 9)] == [Span(str(paths[0]))]
    if compression is None:
        paths[0].write_bytes(paths[0].read_bytes()[:-3])
        assert "the rest of the shard cannot be read (the sample does not end" in bad_of(paths[0])[1]


def test_shards_of_an_index_lie_in_its_folder_or_below(tmp_path):
    shards = []
    for name in ("b", "a"):
        with MDSWriter(out=str(tmp_path / name), columns={"text": "str"}) as out:
            out.write({"text": name})
        shard = json.loads((tmp_path / name / "index.json").read_text())["shards"][0]
        shard["raw_data"]["basename"] = f"{name}/{shard['raw_data']['basename']}"
        shards.append(shard)
    (tmp_path / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    assert source_texts(tmp_path) == ["b", "a"]
    with pytest.raises(DataError, match=r"no column 'content' \(text\); --text_column names"):
        source_texts(tmp_path, "content")


def test_a_folder_of_save_to_disk_is_a_source(tmp_path):
    """Of several splits, one has to be named."""
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict(train=rows, test=rows.select([2])).save_to_disk(tmp_path / "two")
    assert source_texts(tmp_path / "two" / "train" / "*.arrow") == TEXTS
    with pytest.raises(DataError, match="two: a DatasetDict; name one of its splits .*/two/train, .*/two/test"):
        source_texts(tmp_path / "two")
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "one")
    assert source_texts(tmp_path / "one" / "*" / "*.arrow") == TEXTS
    for content in ("{}", "[]", "no JSON"):  # another program's
        (tmp_path / "dataset_dict.json").write_text(content)
        assert tables.splits_of(tmp_path) == []


def test_errors_of_the_disk_are_no_bad_text(tmp_path, monkeypatch):
    """They stop a conversion that skips what is bad."""
    with pytest.raises(FileNotFoundError):
        texts_of(tmp_path / "gone.jsonl.zst", skip_bad=True)
    with pytest.raises(FileNotFoundError):
        texts_of(tmp_path / "gone.parquet", skip_bad=True)

    def read(self, size=-1):
        raise OSError(5, "Input/output error")

    (tmp_path / "a.jsonl.zst").write_bytes(zst(json_lines(TEXTS)))
    monkeypatch.setattr(streams._Frames, "readinto", read)
    with pytest.raises(OSError, match="Input/output error"):
        texts_of(tmp_path / "a.jsonl.zst", skip_bad=True)


def test_a_column_may_have_a_dot_in_its_name(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a.b": ["one"], "url": ["u"]}), path)
    assert columns_of(str(path), "a.b") == ["text", "url"]
    assert texts_of(path, "a.b") == ["one"]


def same_shards(texts, names, folder, *options):
    """Write the texts in each form, convert them, and compare documents and shards."""
    shards = {}
    for name in names:
        source = folder / "sources" / name / name
        source.parent.mkdir(parents=True)
        kind, _, compression = name.removeprefix("a.").partition(".")
        write(source if not compression else source.with_suffix(""), "text", texts)
        if compression:
            plain = source.with_suffix("")
            source.write_bytes(COMPRESSIONS[f".{compression}"](plain.read_bytes()))
            plain.unlink()
        assert texts_of(source) == texts, name
        out = convert(folder / "out" / name, source, *options)
        shards[name] = {file: data for file, data in bytes_of(out).items() if file.startswith(("shard.", "index.json"))}
    first, *others = shards.values()
    assert len(first) > 1
    for name, other in zip(names[1:], others, strict=True):
        assert {file: hash(data) for file, data in other.items()} == {f: hash(d) for f, d in first.items()}, name


def test_three_forms_of_film_reviews_give_the_same_shards(tmp_path):
    reviews = [row.text for row, _ in zip(film_reviews("imdb"), range(300), strict=False)]
    same_shards(reviews, ["a.jsonl.zst", "a.csv", "a.parquet"], tmp_path)


@pytest.mark.slow
def test_all_forms_of_the_quickstart_give_the_same_shards(tmp_path):
    compressed = [f"{name}{suffix}" for name in ("a.jsonl", "a.csv", "a.tsv", "a.json") for suffix in COMPRESSIONS]
    texts = [text for text in default_documents() if text.strip()]
    same_shards(texts, [*compressed, "a.parquet", "a.arrow"], tmp_path, "--size_limit", "1mb")
