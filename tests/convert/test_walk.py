"""What the places of a source name: every file is read, skipped with the reason, or refused."""

import pickle

import pytest

import convert_c4
import train_tokenizer
from src.convert.sources import TextSource, iter_documents
from tests.convert.splits import convert, texts_of


def texts(*places, **options):
    return [document["text"] for document in iter_documents(TextSource(tuple(map(str, places))), **options)]


def test_several_places_and_patterns_are_read_in_their_order(tmp_path):
    for name in ("b.txt", "sub/a1.txt", "sub/deep/a2.txt", "c[1].txt", "c1.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n")
    pattern = tmp_path / "sub" / "**" / "*.txt"
    assert texts(tmp_path / "c[1].txt", tmp_path / "b.txt", pattern) == [
        "c[1].txt",  # a name that exists is no pattern
        "b.txt",
        "sub/a1.txt",
        "sub/deep/a2.txt",
    ]
    assert texts_of(convert(tmp_path / "out", tmp_path / "b.txt", str(pattern))) == [
        "b.txt",
        "sub/a1.txt",
        "sub/deep/a2.txt",
    ]
    with pytest.raises(ValueError, match=r"x\*\.txt: no file matches this pattern"):
        texts(tmp_path / "b.txt", tmp_path / "x*.txt")


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
    assert pickle.loads(pickle.dumps(source)) == source
