"""Labelled files as people have them: other forms, folders, the hub, names of classes."""

import bz2
import gzip
import json
import lzma

import datasets
import pytest
import zstandard

from src.common import hub
from src.common.errors import DataError
from src.finetune.cells import read_list
from src.finetune.config import LabelledData
from src.finetune.data import classes_of, hold_out, read_set, read_sets
from src.finetune.files import file_hashes, matching_files, read_records
from src.finetune.kinds import Row

TEXTS = {"text": ["good", "bad", "fine"], "label": [1, 0, 1]}
NAMES = ["neg", "pos"]


def data_of(path, **options):
    return LabelledData(**{"train": str(path), "validation": str(path), **options})


def rows_in(path, **options):
    return read_set(str(path), data_of(path, **options))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A folder with datasets, written by datasets: with names of their class numbers."""
    folder = tmp_path_factory.mktemp("labelled")
    names = datasets.ClassLabel(names=NAMES)
    texts = datasets.Dataset.from_dict(TEXTS, datasets.Features({"text": datasets.Value("string"), "label": names}))
    tags = datasets.ClassLabel(names=["O", "B-LOC", "I-LOC"])
    lists = datasets.Features({"text": datasets.Sequence(datasets.Value("string")), "label": datasets.Sequence(tags)})
    words = datasets.Dataset.from_dict({"text": [["New", "York"], ["hi"]], "label": [[1, 2], [0]]}, lists)
    datasets.DatasetDict({"train": texts, "test": texts.select([0])}).save_to_disk(folder / "saved")
    texts.to_parquet(folder / "texts.parquet")
    words.to_parquet(folder / "words.parquet")
    return folder


# Forms of files


@pytest.mark.parametrize(
    ("cell", "items"),
    [
        ("['EU', 'rejects']", ["EU", "rejects"]),  # pandas
        ("['EU' 'rejects'\n \"it's\" 'a\\'b']", ["EU", "rejects", "it's", "a'b"]),  # numpy
        ("array(['EU', 'is'], dtype=object)", ["EU", "is"]),
        ('["EU", "\\u00e9\\ud83d\\ude00"]', ["EU", "é😀"]),  # JSON
        ("('EU', 'is')", ["EU", "is"]),
        ("[3, 0, 7]", [3, 0, 7]),
        ("[ 3  0 10]", [3, 0, 10]),
        ("[]", []),
        ("(1) is [2]", ["(1)", "is", "[2]"]),
    ],
)
def test_lists_in_a_cell(cell, items):
    assert read_list(cell) == items


@pytest.mark.parametrize("cell", ["[EU, is]", "['a' ... 'b']", "[['a'], ['b']]", "['a''b']", "[ Ah ]", "['a', None]"])
def test_what_looks_like_a_list_and_is_none_is_refused(cell):
    with pytest.raises(ValueError, match="in brackets and no list of texts"):
        read_list(cell)


def test_lists_in_a_csv(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n\"['EU', 'is']\",\"[3, 0]\"\nhi all,O O\n")
    rows = rows_in(tmp_path / "a.csv", kind="tokens")
    assert rows == [Row(["EU", "is"], None, ["3", "0"]), Row(["hi", "all"], None, ["O", "O"])]


@pytest.mark.parametrize(
    "value",
    [
        [{"text": "a", "label": 0}, {"text": "b", "label": 1}],
        {"data": [{"text": "a", "label": 0}, {"text": "b", "label": 1}], "version": 1},
        {"text": ["a", "b"], "label": [0, 1]},
        {"text": {"0": "a", "1": "b"}, "label": {"0": 0, "1": 1}},  # DataFrame.to_json()
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_values_of_json(value, indent, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(value, indent=indent))
    assert rows_in(tmp_path / "a.json") == [Row("a", None, "0"), Row("b", None, "1")]


def test_words_in_columns_of_json(tmp_path):
    """An object with a list of words is a row; with a list of lists it is columns."""
    row = {"text": ["a", "b"], "label": ["O", "B"]}
    path = tmp_path / "a.json"
    for value in (row, {name: [words] for name, words in row.items()}):
        path.write_text(json.dumps(value))
        assert rows_in(path, kind="tokens") == [Row(["a", "b"], None, ["O", "B"])]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zstandard.compress)],
)
def test_compressed_files(suffix, compress, tmp_path):
    path = tmp_path / f"a.csv.{suffix.upper()}"
    path.write_bytes(compress(b"text,label\n" + b"ab,1\n" * 9))
    assert rows_in(path) == [Row("ab", None, "1")] * 9
    path.write_bytes(compress(b"text,label\n" + b"ab,1\n" * 9)[:-6])
    with pytest.raises(DataError, match="cannot be decompressed"):
        rows_in(path)


CONLL = """-DOCSTART- O

# a comment
EU NNP B-ORG
rejects VBZ O
# CD O

  \t
# CD O
. . O
"""


@pytest.mark.parametrize("name", ["a.conll", "a.txt", "a.bio", "a.conll.gz"])
def test_a_word_per_line(name, tmp_path):
    """Documents and comments are skipped; # as a word is kept; columns have numbers."""
    (tmp_path / name).write_bytes(gzip.compress(CONLL.encode()) if "gz" in name else CONLL.encode())
    words = [["EU", "rejects", "#"], ["#", "."]]
    tags = [["B-ORG", "O", "O"], ["O", "O"]]
    assert [row[::2] for row in rows_in(tmp_path / name, kind="tokens")] == list(zip(words, tags, strict=True))
    parts = [row.label for row in rows_in(tmp_path / name, kind="tokens", label="2")]
    assert parts == [["NNP", "VBZ", "CD"], ["CD", "."]]
    places = [place for place, _ in read_records(str(tmp_path / name), ["text"], of_words=True)]
    assert [place.rpartition(":")[2] for place in places] == ["4", "9"]


def test_words_with_tabs(tmp_path):
    (tmp_path / "a.conll").write_text("# id 1\nNew York\tB\nis\tO\r\n\r\n#\ttext of two\tcolumns\n#x\tO")
    assert [row.text for row in rows_in(tmp_path / "a.conll", kind="tokens")] == [["New York", "is"], ["#x"]]
    (tmp_path / "b.txt").write_text("#\n#tag\nis\n")  # words alone
    assert read_set(str(tmp_path / "b.txt"), data_of("", kind="tokens"), labelled=False)[0].text == ["#", "#tag", "is"]


def test_universal_dependencies(tmp_path):
    """Contractions and words that are not in the text are skipped."""
    columns = [("1-2", "vámonos", "_", "_"), ("1", "vamos", "ir", "VERB"), ("2", "nos", "yo", "PRON"), ("2.1", *"x__")]
    lines = ["\t".join([*values, *"______"]) for values in columns]
    (tmp_path / "a.conllu").write_text("\n".join(["# text = vámonos", *lines, ""]))
    rows = rows_in(tmp_path / "a.conllu", kind="tokens", text="form", label="upos")
    assert rows == [Row(["vamos", "nos"], None, ["VERB", "PRON"])]


def test_several_classes_for_each_text(tmp_path):
    """As a text with commas, a list, or a column of 0 and 1 for each class."""
    (tmp_path / "a.csv").write_text("text,label\nx,\"a, b\"\ny,\nz,\"['a', 'c']\"\n")
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": ["a", "b", "a"]}\n{"text": "y", "label": []}')
    (tmp_path / "b.csv").write_text("text,c,a,b\nx,0,1,1.0\ny,False,0.0,0\n")
    for name, options in (("a.csv", {}), ("a.jsonl", {}), ("b.csv", {"label_columns": ["c", "a", "b"]})):
        rows = rows_in(tmp_path / name, kind="multilabel", **options)
        assert rows[:2] == [Row("x", None, ["a", "b"]), Row("y", None, [])]
    data = data_of(tmp_path / "b.csv", kind="multilabel", label_columns=["c", "a", "b"])
    assert classes_of(data, read_sets(data)) == ["c", "a", "b"]
    (tmp_path / "b.csv").write_text("text,a,b\nx,0,2\n")
    with pytest.raises(DataError, match="b.csv:2: column 'b': expected 0 or 1, got '2'"):
        rows_in(tmp_path / "b.csv", kind="multilabel", label_columns=["a", "b"])


# Folders and the hub


def test_a_folder_of_one_set(labelled, tmp_path):
    want = [Row(text, None, NAMES[label]) for text, label in zip(*TEXTS.values(), strict=True)]
    assert rows_in(labelled / "saved" / "train") == want
    with pytest.raises(DataError, match="saved: it has the splits train, test; name one, such as .*saved/train"):
        rows_in(labelled / "saved")
    for i, text in enumerate("ab"):
        (tmp_path / f"part-0000{i}-1f{i}.csv").write_text(f"text,label\n{text},0\n")
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "README.md").touch()
    assert [row.text for row in rows_in(tmp_path)] == ["a", "b"]
    (tmp_path / "test-00000.csv").touch()
    with pytest.raises(DataError, match="files of several sets, such as .*part-.*csv and .*test-00000.csv; name one"):
        rows_in(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no file that ends in .csv"):
        rows_in(tmp_path / "empty")


def test_a_truncated_arrow_file_is_refused(labelled, tmp_path):
    (source,) = matching_files(str(labelled / "saved" / "train"))
    data = open(source, "rb").read()
    for size in (len(data) // 2, len(data) - 8):
        (tmp_path / "a.arrow").write_bytes(data[:size])
        with pytest.raises(DataError, match="a.arrow: cannot be read as arrow"):
            rows_in(tmp_path / "a.arrow")


@pytest.fixture
def hub_of(labelled, tmp_path, monkeypatch):
    """A hub with one dataset, a folder; what datasets loads of it is cached in ``tmp_path``."""
    load_dataset = datasets.load_dataset
    folder = tmp_path / "owner" / "texts"
    for configuration in ("big", "small"):
        (folder / configuration).mkdir(parents=True)
        (folder / configuration / "train.parquet").write_bytes((labelled / "texts.parquet").read_bytes())
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("big", "small"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, *args, **options: load_dataset(str(tmp_path / name), *args, **options, cache_dir=str(tmp_path)),
    )
    monkeypatch.setattr(hub, "FOUND", {})


def test_a_dataset_of_the_hub(hub_of):
    data = data_of("hf:owner/texts:small:train", validation=0.5)
    assert [row.label for row in read_set(data.train, data)] == ["pos", "neg", "pos"]
    assert len(file_hashes(data.train)) == 1
    for place, message in {
        "hf:owner/texts": "expected hf:OWNER/NAME:SPLIT, or hf:OWNER/NAME:CONFIGURATION:SPLIT",
        "hf:owner/texts:train": "owner/texts: .*big.*small.*; choose with hf:OWNER/NAME:SPLIT, or",
        "hf:owner/texts:small:test": "owner/texts: .*split.*train.*; choose with",
    }.items():
        with pytest.raises(DataError, match=message):
            read_set(place, data)


def test_without_a_network_a_dataset_is_named():
    with pytest.raises(DataError, match="no/such: .*name files"):
        matching_files("hf:no/such:train")


def test_a_share_is_held_out_for_a_set_by_name(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(20)))
    data = data_of(tmp_path / "a.csv", validation=0.25)
    assert {name: len(rows) for name, rows in read_sets(data).items()} == {"train": 15, "validation": 5}
    with pytest.raises(DataError, match="other: a share of 0.001 of 20 different texts holds out none"):
        hold_out(rows_in(tmp_path / "a.csv"), 0.001, "other", data)


# Names of classes


def test_classes_have_the_names_that_the_files_give(labelled, tmp_path):
    """In the order of their numbers; another set may have names or numbers."""
    (tmp_path / "a.csv").write_text("text,label\nx,pos\ny,0\n")
    data = data_of(labelled / "texts.parquet", test=str(tmp_path / "a.csv"))
    sets = read_sets(data)
    assert classes_of(data, sets) == NAMES
    assert {name: [row.label for row in rows] for name, rows in sets.items()}["train"] == ["pos", "neg", "pos"]
    words = data_of(labelled / "words.parquet", kind="tokens", metrics=["entity_f1"])
    assert classes_of(words, sets := read_sets(words)) == ["O", "B-LOC", "I-LOC"]
    assert [row.label for row in sets["train"]] == [["B-LOC", "I-LOC"], ["O"]]


def test_labels_of_numbers_stay_numbers(labelled):
    """As the config lists them, such as GLUE's."""
    data = data_of(labelled / "texts.parquet", labels=["1", "0"], label_names=["yes", "no"])
    assert classes_of(data, read_sets(data)) == ["1", "0"]
    data = data_of(labelled / "texts.parquet", labels=["pos", "neg"])
    assert classes_of(data, read_sets(data)) == ["pos", "neg"]


def test_label_names_name_the_numbers(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\nx,1\ny,0\nz,b\n")
    data = data_of(path, label_names=["a", "b", "c"])
    sets = read_sets(data)
    assert [row.label for row in sets["train"]] == ["b", "a", "b"] and classes_of(data, sets) == ["a", "b", "c"]
    path.write_text("text,label\nx,1\ny,3\n")
    with pytest.raises(DataError, match="a.csv:3: class number 3, and there are 3 names: a, b, c"):
        read_sets(data)
    path.write_text("text,label\nx,1\ny,-1\n")
    with pytest.raises(DataError, match="class '-1' is not in .*hidden labels"):
        classes_of(data, read_sets(data))


def test_a_set_without_labels(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,b\nx,y\n")
    data = data_of(path, text_pair="b")
    with pytest.raises(DataError, match="a.csv:1: no column 'label'.*hidden labels cannot be evaluated; .*predict"):
        read_sets(data)
    assert read_set(str(path), data, labelled=False) == [Row("x", "y", None)]
    (tmp_path / "a.txt").write_text("one text\nanother\n")
    assert [row.text for row in read_set(str(tmp_path / "a.txt"), data_of(""), labelled=False)] == [
        "one text",
        "another",
    ]
