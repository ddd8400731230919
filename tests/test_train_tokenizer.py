import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import train_tokenizer


@pytest.fixture
def source(tmp_path, documents):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join([*documents[:60], "Naloxone reverses opioids. " * 30, "日本 café Über-naïve"]))
    return str(path)


def train(source, out, *options, size="700"):
    train_tokenizer.main([source, "--out", str(out), "--vocab_size", size, *options])
    return AutoTokenizer.from_pretrained(out)


def test_a_bert_tokenizer(source, tmp_path, capsys):
    tokenizer = train(source, tmp_path / "tokenizer")
    assert tokenizer.is_fast and type(tokenizer).__name__ == "BertTokenizerFast"
    assert tokenizer.convert_tokens_to_ids(train_tokenizer.SPECIAL) == [0, 1, 2, 3, 4]
    assert (tokenizer.cls_token, tokenizer.sep_token, tokenizer.mask_token_id) == ("[CLS]", "[SEP]", 4)
    assert len(tokenizer) == 700
    assert tokenizer.tokenize("Naloxone, [MASK].") == ["naloxone", ",", "[MASK]", "."]
    assert tokenizer.decode(tokenizer("the café")["input_ids"]) == "[CLS] the cafe [SEP]"
    assert set(tokenizer.all_special_tokens) == set(train_tokenizer.SPECIAL)
    pair = tokenizer("a", "b")
    assert pair["token_type_ids"] == [0, 0, 0, 1, 1]
    assert tokenizer.convert_ids_to_tokens(tokenizer("日本")["input_ids"])[1:-1] == ["日", "本"]
    assert tokenizer.tokenize("☃") == ["[UNK]"]
    assert capsys.readouterr().out.startswith("tokenizer vocab_size=700 documents=62 seconds=")


def test_case_is_kept_when_asked(source, tmp_path):
    tokenizer = train(source, tmp_path / "cased", "--no-lowercase")
    assert tokenizer.tokenize("Naloxone") == ["Naloxone"] and not tokenizer.do_lower_case
    assert train(source, tmp_path / "uncased").do_lower_case


def test_the_same_text_gives_the_same_bytes(source, tmp_path):
    """Here and in a process of its own: hash tables are seeded anew."""
    for name in ("a", "b"):
        train(source, tmp_path / name, size="900")
    command = [sys.executable, "train_tokenizer.py", source, "--out", tmp_path / "c", "--vocab_size", "900"]
    subprocess.run(command, check=True, capture_output=True)
    for file in ("tokenizer.json", "vocab.txt"):
        assert len({(tmp_path / name / file).read_bytes() for name in ("a", "b", "c")}) == 1


def test_a_small_text_gives_a_smaller_vocabulary(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some words and some more words\n")
    tokenizer = train(str(tmp_path / "a.txt"), tmp_path / "t")
    assert len(tokenizer) < 100 and "pieces for" in capsys.readouterr().err


def test_continuations_are_what_may_stand_inside_a_word():
    inside = [c for c in "aé1,.日'-" if train_tokenizer.continues_words(c)]
    assert inside == ["a", "é", "1"]


def test_limit(source, tmp_path, capsys):
    train(source, tmp_path / "t", "--limit", "10")
    assert "documents=10" in capsys.readouterr().out


def test_refusals(source, tmp_path):
    out = tmp_path / "t"
    with pytest.raises(ValueError, match="has no room for the text's characters; take "):
        train(source, out, size="20")
    assert not out.exists()
    train(source, out)
    with pytest.raises(ValueError, match="exists; give --overwrite"):
        train(source, out)
    assert len(train(source, out, "--overwrite", size="600")) == 600
    (out / "model.safetensors").write_text("precious")
    with pytest.raises(ValueError, match=r"holds more than a tokenizer \(model.safetensors\)"):
        train(source, out, "--overwrite")
    assert (out / "model.safetensors").exists()
    with pytest.raises(ValueError, match="--limit must be at least 1"):
        train(source, tmp_path / "u", "--limit", "0")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="no document"):
        train(str(tmp_path / "empty.txt"), tmp_path / "u")
    with pytest.raises(ValueError, match="no such file"):
        train(str(tmp_path / "none"), tmp_path / "u")
    assert sorted(p.name for p in Path(tmp_path).iterdir()) == ["empty.txt", "t", "texts.txt"]
