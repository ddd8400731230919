"""Files -> checked rows -> ids and batches: every row is kept, and an error names the file and the row."""

import csv
import json
import os
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding

from src.common.errors import DataError
from src.finetune.config import LabelledData
from src.finetune.data import Rows, classes_of, read_set, read_sets
from src.finetune.kinds import Row
from src.masked_lm_loss import IGNORED
from tests.finetune.test_classifier import kind_of

ROWS = [
    {"text": '"no", he said twice', "label": "neg"},
    {"text": "ein schöner Film, 100%", "label": "pos"},
    {"text": "-", "label": "neg"},
    {"text": "NA", "label": "01"},
    {"text": "1.10", "label": "2020-01-01"},
    {"text": "null", "label": "true"},
]
PAIRS = LabelledData(train="", validation="", text="a", text_pair="b")
WORDS = LabelledData(train="", validation="", text="words", label="tags", kind="tokens")


def write(path, rows):
    """The rows as a file of the kind that its name says."""
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".tsv":
        path.write_text("".join("\t".join(map(str, line)) + "\n" for line in (rows[0], *(r.values() for r in rows))))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(["", *map(json.dumps, rows), ""]))  # an empty line is no row
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def data_of(path, **options):
    return LabelledData(**{"train": str(path), "validation": str(path), "text": "text", **options})


def rows_in(path, **options):
    return read_set(str(path), data_of(path, **options))


@pytest.mark.parametrize("form", ["csv", "tsv", "json", "jsonl", "parquet", "csv CSV", "jsonl json"])
def test_each_format_gives_the_same_rows(form, tmp_path):
    """No value is converted. Also with a suffix in capitals, and with an object per line in .json."""
    name = f"b.{form.split()[-1]}"
    os.rename(write(tmp_path / f"a.{form.split()[0]}", ROWS), tmp_path / name)
    assert rows_in(tmp_path / name) == [Row(row["text"], None, row["label"]) for row in ROWS]


def test_files_of_a_pattern_are_read_by_name(tmp_path):
    for i in (2, 0, 3, 5, 1, 4):
        write(tmp_path / f"train-{i}.jsonl", [ROWS[i]])
    write(tmp_path / "other.jsonl", ROWS)
    assert [row.text for row in rows_in(tmp_path / "train-*.jsonl")] == [row["text"] for row in ROWS]


def test_numbers_as_classes_and_as_numbers(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "x", "label": value} for value in (10, 2, -1)])
    assert classes_of(data_of(path), read_sets(data_of(path))) == ["-1", "2", "10"]
    assert [row.label for row in rows_in(path, kind="regression")] == [10.0, 2.0, -1.0]
    assert rows_in(write(tmp_path / "a.csv", [{"text": "x", "label": "2.5"}]), kind="regression")[0].label == 2.5


def test_words_are_lists_or_split_at_white_space(tmp_path):
    rows = [{"words": ["New", "York"], "tags": ["B-LOC", "I-LOC"]}, {"words": ["hi"], "tags": ["O"]}]
    lists = write(tmp_path / "a.parquet", rows)
    texts = write(tmp_path / "a.csv", [{name: " ".join(value) for name, value in row.items()} for row in rows])
    for path in (lists, texts):
        assert read_set(path, WORDS) == [Row(row["words"], None, row["tags"]) for row in rows]


REGRESSION, TOKENS = {"kind": "regression"}, {"kind": "tokens"}


@pytest.mark.parametrize(
    ("suffix", "content", "fault", "options"),
    [
        ("doc", "x", ": expected a file name that ends in .csv, .tsv, .json, .jsonl, .parquet", {}),
        ("csv", "text,lable\nx,1\n", ":1: no column 'label'; did you mean 'lable'?", {}),
        ("csv", "text,text,label\nx,y,1\n", ":1: 2 columns have the name 'text'; rename all but one", {}),
        ("csv", "text,label\n,1\n", ":2: column 'text': expected a text (empty_texts: true accepts", {}),
        ("csv", "text,label\nx,1\n \t,1\n", ":3: column 'text': expected a text", {}),
        ("csv", "text,label\nx,' '\nx, \n", ":3: column 'label': expected a class, got ' '", {}),
        ("csv", "text,label\nx,1\na,b,2\n", ":3: expected 2 values, as in the header, got 3", {}),
        ("csv", "text,label\nx\n", ":2: expected 2 values, as in the header, got 1", {}),
        ("csv", 'text,label\n"x"y,1\n', ":2: ", {}),
        ("csv", "text,label\nx,\n", ":2: column 'label': expected a class, got ''", {}),
        ("csv", "text,label\n", ": no rows", {}),
        ("csv", b"text,label\n\xff,1\n", ": not UTF-8", {}),
        ("csv", "text,label\nx,nan\n", ":2: column 'label': expected a number, got 'nan'", REGRESSION),
        ("csv", "text,label\nx,inf\n", ":2: column 'label': expected a number, got 'inf'", REGRESSION),
        ("csv", "text,label\nx,much\n", ":2: column 'label': expected a number, got 'much'", REGRESSION),
        ("csv", "text,label\nx,1\n", ":1: no column 'pair'", {"text_pair": "pair"}),
        ("csv", "text,pair,label\nx,,1\n", ":2: column 'pair': expected a text", {"text_pair": "pair"}),
        ("csv", 'text,label\n"[EU, a]",O O\n', ":2: column 'text': expected a list, got '[EU, a]': it is in", TOKENS),
        ("csv", "text,label\n\"['a' ... 'b']\",O O\n", ":2: column 'text': expected a list", TOKENS),
        ("csv", "text,label\n\"['a', ' ']\",O O\n", ":2: column 'text': expected words, none of them empty", TOKENS),
        ("jsonl", '{"text": "x", "label": 1}\n{"text": "y"', ":2: not JSON", {}),
        ("jsonl", '{"text": "x", "label": 1}\n[1]\n', ":2: expected an object with columns, got [1]", {}),
        ("jsonl", b'{"text": "\xff", "label": 1}', ": not UTF-8", {}),
        ("jsonl", '{"text": "x", "label": 1, "text": "y"}', ":1: not JSON: an object has the column 'text' twice", {}),
        ("jsonl", '{"text": null, "label": 1}\n', ":1: column 'text': expected a text", {}),
        ("jsonl", '{"text": NaN, "label": 1}\n', ":1: column 'text': expected a text", {}),
        ("jsonl", '{"text": "x", "label": 1, "pair": 2}', ":1: column 'pair': expected a text", {"text_pair": "pair"}),
        ("jsonl", '{"text": "x", "label": null}\n', ":1: column 'label': expected a class, got None", {}),
        ("jsonl", '{"text": "x", "label": 0.5}\n', ":1: column 'label': expected a class, got 0.5", {}),
        ("jsonl", '{"text": ["a", "b"], "label": ["O"]}', ":1: column 'label': expected 2 tags, one for", TOKENS),
        ("jsonl", '{"text": ["a"], "label": [""]}', ":1: column 'label': expected 1 tags, one for", TOKENS),
        ("jsonl", '{"text": [], "label": []}', ":1: column 'text': expected words, none of them empty, got []", TOKENS),
        ("json", "[{]", ": not JSON", {}),
        ("json", '[{"text": "x", "label": 1}, 2]', ":2: expected an object with columns, got 2", {}),
        ("parquet", "x", ": cannot be read as parquet", {}),
        ("json", '{"text": ["x", "y"], "label": [1]}', ": not JSON: its columns have 2, 1 rows", {}),
        ("parquet", ROWS, ": no column 'txt'; did you mean 'text'", {"text": "txt"}),
        ("parquet", [{"text": None, "label": "a"}], ":1: column 'text': expected a text", {}),
        ("csv.gz", "x", ": cannot be decompressed: Not a gzipped file", {}),
        ("conll", "a O\nb\n", ":2: expected 2 columns, as in other lines, got 1", TOKENS),
        ("conll", "a\tO\n\tO\n", ":1: column 'text': expected words, none of them empty", TOKENS),
        ("conll", "a O\n", ": no column '3'", {"label": "3", **TOKENS}),
        ("conll", "a O\n", ": has a word per line, which is for kind tokens", {}),
        ("*", "", ": no such file", {}),
    ],
)
def test_a_fault_names_file_and_row(suffix, content, fault, options, tmp_path):
    path = tmp_path / f"a.{suffix}"
    if isinstance(content, list):
        write(path, content)
    elif content:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=re.escape(f"a.{suffix}{fault}")):
        rows_in(path, **options)


def encode(rows, classes, kind, tokenizer, max_seq_len):
    return kind_of(kind).encode(rows, classes, tokenizer, max_seq_len)


def classes(train, validation="ab", **options):
    sets = {"train": train, "validation": validation}
    data = data_of("train.csv", **options)
    rows = {name: Rows(Row("x", None, label) for label in labels) for name, labels in sets.items()}
    return classes_of(data, rows)


def test_classes_are_those_of_the_training_set_or_as_listed():
    assert classes("bab") == ["a", "b"] and classes("ab", labels=["b", "a", "c"]) == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("train", "validation", "options", "fault"),
    [
        ("ab", "abc", {}, "validation: class 'c' is not in the training set .*; list all classes in labels, or"),
        (
            "ab",
            ["-1"],
            {},
            "class '-1' is not in .*; -1: a set with hidden labels cannot be evaluated; .*predict",
        ),
        ("ab", "ab", {"labels": ["a", "c"]}, "train: class 'b' is not in labels"),
        ("aa", "a", {}, "train.csv: all rows have the class 'a'; expected two"),
        ("abc", "ab", {"metrics": ["f1"]}, "f1 needs 2 classes, got 3"),
        ("ab", "ab", {"kind": "tokens", "metrics": ["entity_f1"]}, "expects tags as B-X, I-X and O, got 'a'"),
    ],
)
def test_classes_that_do_not_fit_are_refused(train, validation, options, fault):
    with pytest.raises(DataError, match=fault):
        classes(train, validation, **options)


def test_validation_sets_by_name(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    sets = read_sets(data_of(path, validation={"near": path, "far": path}, test=path))
    assert list(sets) == ["train", "near", "far", "test"]


def test_pairs_have_segments_and_are_cut(tmp_path, tokenizer):
    """The same ids as the tokenizer's; the number of cut rows."""
    rows = [{"a": "the city " * n, "b": "a river", "label": n % 2} for n in (1, 30)]
    path = write(tmp_path / "a.jsonl", rows)
    encoded = encode(read_set(path, PAIRS), ["0", "1"], "classification", tokenizer, 32)
    for row, example in zip(rows, encoded.examples, strict=True):
        want = tokenizer(row["a"], row["b"], truncation=True, max_length=32)
        assert example["input_ids"].tolist() == want["input_ids"]
        assert example["token_type_ids"].tolist() == want["token_type_ids"]
    assert [example["labels"] for example in encoded.examples] == [1, 0]
    assert [len(example["input_ids"]) for example in encoded.examples][1] == 32 and encoded.cut == 1
    assert {1} < set(encoded.examples[1]["token_type_ids"].tolist())  # the second text keeps a part
    single = encode(rows_in(path, text="a"), ["0", "1"], "classification", tokenizer, 32)
    assert "token_type_ids" not in single.examples[0]


def test_many_rows_are_encoded_in_order(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("src.finetune.kinds.base.ROWS_AT_ONCE", 3)
    path = write(tmp_path / "a.jsonl", [{"text": f"river {i}", "label": i / 7} for i in range(10)])
    encoded = encode(rows_in(path, kind="regression"), [], "regression", tokenizer, 16)
    assert [example["labels"] for example in encoded.examples] == [i / 7 for i in range(10)]
    want = [tokenizer(f"river {i}")["input_ids"] for i in range(10)]
    assert [example["input_ids"].tolist() for example in encoded.examples] == want


def test_a_word_is_labelled_at_its_first_piece(tokenizer):
    words = ["Unbelievableness", "of", "\u200b", "Paris-based", "rivers"]
    rows, classes = [Row(words, None, ["A", "B", "C", "B", "A"])], ["A", "B", "C"]
    encoded = encode(rows, classes, "tokens", tokenizer, 64)
    (example,) = encoded.examples
    pieces = [tokenizer.tokenize(word) for word in words]
    want = [IGNORED]
    for parts, number in zip(pieces, [0, 1, 2, 1, 0], strict=True):
        want += [number, *[IGNORED] * (len(parts) - 1)] if parts else []
    assert example["labels"].tolist() == [*want, IGNORED] and len(pieces[0]) > 1 and not pieces[2]
    assert tokenizer.convert_ids_to_tokens(example["input_ids"])[1:-1] == [p for parts in pieces for p in parts]
    assert (encoded.unread, encoded.cut) == (1, 0)
    short = encode(rows, classes, "tokens", tokenizer, len(pieces[0]) + 3)
    assert (short.unread, short.cut) == (3, 1) and (short.examples[0]["labels"] >= 0).sum() == 2
    with pytest.raises(DataError, match="row 2: the tokenizer makes no word piece"):
        encode([*rows, Row(["\u200b"], None, ["A"])], classes, "tokens", tokenizer, 64)


LABELS = {"classification": 2, "regression": 0.5, "tokens": np.array([IGNORED, 3, 3, 3])}


def examples_of(kind, lengths=(2, 4, 1), pairs=True):
    segments = {"token_type_ids": np.ones(4, dtype=np.int8)} if pairs else {}
    example = {"input_ids": np.arange(1, 5, dtype=np.int32), **segments, "labels": LABELS[kind]}
    return [{name: x[:n] if isinstance(x, np.ndarray) else x for name, x in example.items()} for n in lengths]


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("kind", LABELS)
def test_batches_are_those_of_transformers_collators(kind, pairs, tokenizer):
    collator = DataCollatorForTokenClassification if kind == "tokens" else DataCollatorWithPadding
    want = collator(tokenizer)(examples_of(kind, pairs=pairs))
    got = kind_of(kind).collate(examples_of(kind, pairs=pairs), tokenizer.pad_token_id)
    assert got.keys() == want.keys()
    for name, x in got.items():
        torch.testing.assert_close(x, want[name], rtol=0, atol=0, msg=name)


def test_padding_microbatches_and_counts():
    kind = kind_of("classification")
    batch = kind.collate(examples_of("classification"), 9)
    assert batch["input_ids"].tolist() == [[1, 2, 9, 9], [1, 2, 3, 4], [1, 9, 9, 9]]
    assert kind.count_tokens(batch) == {"total": 7, "loss_generating": 3}
    first, second = kind.split_batch(batch, 2)
    assert first["input_ids"].shape == (2, 4) and second["input_ids"].tolist() == [[1]]
    assert second["labels"].tolist() == [2] and second["token_type_ids"].shape == (1, 1)
    kind = kind_of("tokens")
    words = kind.collate(examples_of("tokens"), 9)
    assert words["labels"].tolist() == [[-100, 3, -100, -100], [-100, 3, 3, 3], [-100] * 4]
    assert kind.count_tokens(words) == {"total": 7, "loss_generating": 4}
    assert [part["labels"].shape for part in kind.split_batch(words, 1)] == [(1, 2), (1, 4), (1, 1)]
