"""Files become checked rows, rows become ids and batches; nothing is dropped, and what is wrong is named."""

import csv
import dataclasses
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from src.common.errors import ConfigError
from src.finetune.config import LabelledData
from src.finetune.data import Collator, classes_of, counts, encode, hold_out, read_set, read_sets, split_batch
from src.masked_lm_loss import IGNORED

ROWS = [
    {"text": '"no", he said twice', "label": "neg"},
    {"text": "ein schöner Film, 100%", "label": "pos"},
    {"text": "", "label": "neg"},
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
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def data_of(path, **options):
    return LabelledData(**{"train": str(path), "validation": str(path), "text": "text", **options})


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.parquet", "A.CSV"])
def test_each_form_gives_the_same_rows(name, tmp_path):
    path = write((tmp_path / name).with_suffix(".csv"), ROWS) if name == "A.CSV" else write(tmp_path / name, ROWS)
    rows = read_set(path, data_of(path))
    assert rows.texts == [row["text"] for row in ROWS] and rows.labels == ["neg", "pos", "neg"] and rows.pairs == []


def test_json_with_an_object_a_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("\n".join(["", *map(json.dumps, ROWS)]))
    assert read_set(str(path), data_of(path)).texts == [row["text"] for row in ROWS]


def test_a_pattern_is_read_by_name(tmp_path):
    for i in (2, 0, 1):
        write(tmp_path / f"train-{i}.jsonl", [ROWS[i]])
    write(tmp_path / "other.jsonl", ROWS)
    pattern = str(tmp_path / "train-*.jsonl")
    assert read_set(pattern, data_of(pattern)).texts == [row["text"] for row in ROWS]


def test_numbers_as_classes_and_as_numbers(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "x", "label": value} for value in (10, 2, -1)])
    sets = read_sets(data_of(path))
    assert classes_of(data_of(path), sets) == ["-1", "2", "10"]
    assert read_set(path, data_of(path, kind="regression")).labels == [10.0, 2.0, -1.0]
    table = write(tmp_path / "a.csv", [{"text": "x", "label": "2.5"}])
    assert read_set(table, data_of(table, kind="regression")).labels == [2.5]


def test_words_are_lists_or_split_at_white_space(tmp_path):
    rows = [{"words": ["New", "York"], "tags": ["B-LOC", "I-LOC"]}, {"words": ["hi"], "tags": ["O"]}]
    lists = write(tmp_path / "a.parquet", rows)
    texts = write(tmp_path / "a.csv", [{name: " ".join(value) for name, value in row.items()} for row in rows])
    for path in (lists, texts):
        found = read_set(path, WORDS)
        assert found.texts == [["New", "York"], ["hi"]] and found.labels == [["B-LOC", "I-LOC"], ["O"]]


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.txt", "x", ".csv, .tsv, .json, .jsonl, .parquet are read"),
        ("a.csv", "text,lable\nx,1\n", "a.csv:2: no column 'label'; did you mean 'lable'?"),
        ("a.csv", "text,label\nx,1\na,b,2\n", "a.csv:3: 3 values for the 2 columns"),
        ("a.csv", 'text,label\n"x"y,1\n', "a.csv:2: "),
        ("a.csv", "text,label\nx,\n", "a.csv:2: column 'label' holds no class but ''"),
        ("a.csv", "text,label\n", "holds no row"),
        ("a.csv", b"text,label\n\xff,1\n", "no UTF-8"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "y"', "a.jsonl:2: no JSON"),
        ("a.jsonl", '{"text": "x", "label": 1}\n[1]\n', "a.jsonl:2: an object with columns"),
        ("a.jsonl", '{"text": null, "label": 1}\n', "a.jsonl:1: column 'text' holds no text but None"),
        ("a.jsonl", '{"text": "x", "label": null}\n', "a.jsonl:1: column 'label' holds no class but None"),
        ("a.jsonl", '{"text": "x", "label": 0.5}\n', "column 'label' holds no class but 0.5"),
        ("a.json", "[{]", "no JSON"),
        ("a.parquet", "x", "cannot be read as parquet"),
    ],
)
def test_what_is_wrong_is_named(name, content, fault, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as error:
        read_set(str(path), data_of(path))
    assert fault in str(error.value)


def test_more_that_is_wrong(tmp_path):
    with pytest.raises(ConfigError, match="there is no such file"):
        read_set(str(tmp_path / "*.csv"), data_of("x"))
    parquet = write(tmp_path / "a.parquet", ROWS)
    with pytest.raises(ConfigError, match="no column 'txt'; did you mean 'text'"):
        read_set(parquet, data_of(parquet, text="txt"))
    for value in ("nan", "inf", "much"):
        path = write(tmp_path / "a.csv", [{"text": "x", "label": value}])
        with pytest.raises(ConfigError, match=f"a.csv:2: column 'label' holds no number but '{value}'"):
            read_set(path, data_of(path, kind="regression"))
    path = write(tmp_path / "a.jsonl", [{"words": ["a", "b"], "tags": ["O"]}])
    with pytest.raises(ConfigError, match="a.jsonl:1: column 'tags' holds not a tag for each of 2 words but 1"):
        read_set(path, WORDS)
    path = write(tmp_path / "a.jsonl", [{"words": [], "tags": []}])
    with pytest.raises(ConfigError, match="holds no words"):
        read_set(path, WORDS)


def test_classes(tmp_path):
    def classes(train, validation="ab", **options):
        paths = [
            write(tmp_path / f"{name}.jsonl", [{"text": "x", "label": label} for label in labels])
            for name, labels in (("train", train), ("validation", validation))
        ]
        data = LabelledData(train=paths[0], validation=paths[1], text="text", **options)
        return classes_of(data, read_sets(data))

    assert classes("bab") == ["a", "b"] and classes("ab", labels=["b", "a", "c"]) == ["b", "a", "c"]
    with pytest.raises(ConfigError, match="validation: the class 'c' is none of the training rows"):
        classes("ab", "abc")
    with pytest.raises(ConfigError, match="train: the class 'b' is none of labels"):
        classes("ab", labels=["a", "c"])
    with pytest.raises(ConfigError, match="all rows have the class 'a'"):
        classes("aa", "a")
    with pytest.raises(ConfigError, match="f1 is of two classes, and here are 3"):
        classes("abc", metrics=["f1"])
    with pytest.raises(ConfigError, match="entity_f1 reads tags"):
        classes("ab", metrics=["entity_f1"])


def test_held_out_rows(tmp_path):
    """A share of them, the same at each call, copies on one side, none lost."""
    texts = [f"text {i % 400}" for i in range(800)]
    path = write(tmp_path / "a.jsonl", [{"text": text, "label": i % 2} for i, text in enumerate(texts)])
    sets = read_sets(data_of(path, validation=0.25))
    train, held_out = sets["train"], sets["validation"]
    assert 60 < len(set(held_out.texts)) < 140 and not set(train.texts) & set(held_out.texts)
    assert sorted(train.texts + held_out.texts) == sorted(texts)
    again = read_sets(data_of(path, validation=0.25))
    assert again == sets
    with pytest.raises(ConfigError, match="leaves nothing on one side"):
        hold_out(held_out.take([True] + [False] * (len(held_out.texts) - 1)), 0.5)


def test_sets_by_name(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    assert list(read_sets(data_of(path, validation={"near": path, "far": path}, test=path))) == [
        *("train", "near", "far", "test")
    ]


def test_encoding(tmp_path, tokenizer):
    """The tokenizer's own ids; pairs have segments; what is too long is cut, and counted."""
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
    single = encode(
        read_set(path, dataclasses.replace(PAIRS, text_pair=None)), ["0", "1"], "classification", tokenizer, 32
    )
    assert "token_type_ids" not in single.examples[0]


def test_many_rows_are_encoded_in_order(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "a.jsonl", [{"text": f"river {i}", "label": i / 7} for i in range(10)])
    rows = read_set(path, data_of(path, kind="regression"))
    want = encode(rows, [], "regression", tokenizer, 16)
    monkeypatch.setattr("src.finetune.data.PIECE", 3)
    got = encode(rows, [], "regression", tokenizer, 16)
    assert [e["labels"] for e in got.examples] == [i / 7 for i in range(10)] == [e["labels"] for e in want.examples]
    for a, b in zip(want.examples, got.examples, strict=True):
        np.testing.assert_array_equal(a["input_ids"], b["input_ids"])


def test_a_word_is_labelled_at_its_first_piece(tmp_path, tokenizer):
    words = ["Unbelievableness", "of", "\u200b", "Paris-based", "rivers"]
    path = write(tmp_path / "a.jsonl", [{"words": words, "tags": ["A", "B", "C", "B", "A"]}])
    encoded = encode(read_set(path, WORDS), ["A", "B", "C"], "tokens", tokenizer, 64)
    (example,) = encoded.examples
    pieces = [tokenizer.tokenize(word) for word in words]
    want = [IGNORED]
    for parts, number in zip(pieces, [0, 1, 2, 1, 0], strict=True):
        want += [number, *[IGNORED] * (len(parts) - 1)] if parts else []
    assert example["labels"].tolist() == [*want, IGNORED] and len(pieces[0]) > 1 and not pieces[2]
    assert tokenizer.convert_ids_to_tokens(example["input_ids"])[1:-1] == [p for parts in pieces for p in parts]
    assert (encoded.unread, encoded.cut) == (1, 0)
    short = encode(read_set(path, WORDS), ["A", "B", "C"], "tokens", tokenizer, len(pieces[0]) + 3)
    assert (short.unread, short.cut) == (3, 1) and (short.examples[0]["labels"] >= 0).sum() == 2


def test_a_row_without_any_piece(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"words": ["\u200b"], "tags": ["A"]}])
    with pytest.raises(ConfigError, match="row 1: the tokenizer makes no piece"):
        encode(read_set(path, WORDS), ["A"], "tokens", tokenizer, 64)


def test_batches():
    examples = [
        {"input_ids": np.arange(1, n + 1), "token_type_ids": np.ones(n, dtype=np.int8), "labels": n} for n in (2, 4, 1)
    ]
    batch = Collator(pad_token_id=9)(examples)
    assert batch["input_ids"].tolist() == [[1, 2, 9, 9], [1, 2, 3, 4], [1, 9, 9, 9]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [2, 4, 1] == batch["token_type_ids"].sum(dim=1).tolist()
    assert batch["labels"].tolist() == [2, 4, 1] and batch["labels"].dtype == torch.int64
    assert counts(batch) == {"total": 7, "loss_generating": 3}
    first, second = split_batch(batch, 2)
    assert first["input_ids"].shape == (2, 4) and second["input_ids"].tolist() == [[1]]
    assert second["labels"].tolist() == [1] and second["token_type_ids"].shape == (1, 1)
    numbers = Collator(0)([{**example, "labels": 0.5} for example in examples])
    assert numbers["labels"].dtype == torch.float32
    words = Collator(0)(
        [
            {**example, "labels": np.array([IGNORED, 3, 3, 3])[:n]}
            for example, n in zip(examples, (2, 4, 1), strict=True)
        ]
    )
    assert words["labels"].tolist() == [[-100, 3, -100, -100], [-100, 3, 3, 3], [-100] * 4]
    assert counts(words) == {"total": 7, "loss_generating": 4}
    assert [part["labels"].shape for part in split_batch(words, 1)] == [(1, 2), (1, 4), (1, 1)]
