import resource
import subprocess
import sys
from collections import Counter

import pytest
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import AutoTokenizer

import train_tokenizer
from src.convert import sources
from src.convert.forms import File
from src.convert.sources import TextSource, iter_documents


@pytest.fixture
def source(tmp_path, documents):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join([*documents[:60], "Naloxone reverses opioids. " * 30, "日本 café Über-naïve"]))
    return str(path)


def train(source, out, *options, size="700"):
    train_tokenizer.main([source, "--out", str(out), "--vocab_size", size, *options])
    return AutoTokenizer.from_pretrained(out)


def test_result_is_a_bert_tokenizer(source, tmp_path, capsys):
    tokenizer = train(source, tmp_path / "tokenizer")
    assert tokenizer.is_fast and type(tokenizer).__name__.removesuffix("Fast") == "BertTokenizer"
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


def test_no_lowercase_keeps_case(source, tmp_path, capsys):
    tokenizer = train(source, tmp_path / "cased", "--no-lowercase", "--limit", "61")
    assert "documents=61" in capsys.readouterr().out
    assert tokenizer.tokenize("Naloxone") == ["Naloxone"] and not tokenizer.do_lower_case
    assert train(source, tmp_path / "uncased").do_lower_case


def test_the_same_text_gives_the_same_bytes(source, tmp_path):
    """Also in another process, whose hash tables have another seed."""
    for name in ("a", "b"):
        train(source, tmp_path / name, size="900")
    command = [sys.executable, "train_tokenizer.py", source, "--out", tmp_path / "c", "--vocab_size", "900"]
    subprocess.run(command, check=True, capture_output=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert len({(tmp_path / name / file).read_bytes() for name in ("a", "b", "c")}) == 1


def test_a_small_text_gives_a_smaller_vocabulary(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some words and some more words\n")
    tokenizer = train(str(tmp_path / "a.txt"), tmp_path / "t")
    assert len(tokenizer) < 100 and "gives only" in capsys.readouterr().err


def test_continuing_characters_do_not_split_words():
    inside = [c for c in "aé1,.日'-" if train_tokenizer.continues_words(c)]
    assert inside == ["a", "é", "1"]


def test_c4_from_the_hub_is_the_default(tmp_path, monkeypatch):
    asked = []

    def walk(source, *options):
        asked.append((source, *options))
        (tmp_path / "a.txt").write_text("some words and some more")
        yield File(str(tmp_path / "a.txt"), 24, 0)

    monkeypatch.setattr(sources, "walk", walk)
    train_tokenizer.main(["--out", str(tmp_path / "t"), "--vocab_size", "100"])
    assert asked == [(TextSource(), "train", False, None)] and (tmp_path / "t" / "tokenizer.json").exists()


def test_words_are_counted_in_bounded_memory(monkeypatch):
    """Rare words are dropped, frequent ones keep their counts, too long ones are never counted."""
    monkeypatch.setattr(train_tokenizer, "MAX_WORDS", 10)
    normalizer = BertNormalizer()
    texts = [f"The the cat, rare{i} sat " + "x" * 101 for i in range(100)]
    counts, too_long = train_tokenizer.count_words(texts, normalizer)
    assert len(counts) == 10 and (counts["the"], counts["cat"], counts["sat"]) == (200, 100, 100)
    assert max(map(len, counts)) < 10 and too_long == 100 * 101
    assert train_tokenizer.count_words(["b a", "a b b"], normalizer) == ({"a": 2, "b": 3}, 0)


def test_repeated_words_have_their_counts(monkeypatch):
    words = Counter({"often": 2500, "twice": 2, "once": 1})
    text = " ".join(train_tokenizer.repeated(words)).split()
    assert Counter(text) == words
    monkeypatch.setattr(train_tokenizer, "MAX_OCCURRENCES", 1300)
    assert Counter(" ".join(train_tokenizer.repeated(words)).split()) == {"often": 1250, "twice": 1}


def test_compare_prints_tokens_per_word_and_gains(source, tmp_path, capsys):
    """The word of this domain comes first: one piece here, several there."""
    (tmp_path / "other.txt").write_text("nana lolo xonxon ee the cat " * 9)
    train(str(tmp_path / "other.txt"), tmp_path / "other", size="60")
    capsys.readouterr()
    tokenizer = train(source, tmp_path / "t", "--compare", str(tmp_path / "other"))
    lines = capsys.readouterr().out.splitlines()
    texts = [document["text"].replace("日本", "日 本") for document in iter_documents(TextSource((source,)))]
    words = [word for text in texts for word, _ in BertPreTokenizer().pre_tokenize_str(text)]
    pieces = sum(len(tokenizer.tokenize(word)) for word in words)
    unknown = sum("[UNK]" in tokenizer.tokenize(word) for word in words)
    assert lines[0] == (
        f"this tokenizer: {pieces / len(words):.3f} tokens per word, "
        f"{unknown / len(words):.3%} of {len(words):,} words unknown"
    )
    assert lines[1].startswith(f"{tmp_path / 'other'}: ") and lines[2].split()[:3] == ["times", "this", "tokenizer"]
    table = {line.split()[1]: line.split() for line in lines[3:-1]}
    other = AutoTokenizer.from_pretrained(tmp_path / "other")
    assert table["naloxone"] == ["30", "naloxone", *other.tokenize("naloxone")] and len(table["naloxone"]) > 5


def test_existing_folders_are_replaced_only_with_overwrite(source, tmp_path):
    out = tmp_path / "t"
    train(source, out)
    with pytest.raises(ValueError, match="exists; give --overwrite"):
        train(source, out)
    assert len(train(source, out, "--overwrite", size="600")) == 600
    for folder in (tmp_path / "t.partial", out):
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_text("precious")
        with pytest.raises(ValueError, match=rf"{folder} holds more than a tokenizer \(model.safetensors\)"):
            train(source, out, "--overwrite")
        assert (folder / "model.safetensors").exists()
        (folder / "model.safetensors").unlink()


def chinese(characters, count):
    """Each of ``characters`` from U+4E00 on ``count`` times, in lines without blanks."""
    text = "".join(chr(0x4E00 + i) for i in range(characters)) * count
    return "\n".join(text[i : i + 90] for i in range(0, len(text), 90))


def test_a_link_to_a_tokenizer_stays(source, tmp_path, monkeypatch):
    train(source, tmp_path / "t", size="600")
    (tmp_path / "link").symlink_to("t")
    assert len(train(source, tmp_path / "link", "--overwrite", size="500")) == 500
    assert (tmp_path / "link").is_symlink() and len(list(tmp_path.iterdir())) == 3
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="holds more than a tokenizer"):
        train(source, ".", "--overwrite")


@pytest.mark.parametrize(
    ("common", "rare", "size", "kept"),
    [
        (900, 40, 2000, 940),  # coverage alone would stop at 914
        (1500, 30, 2000, 1500),
        (1500, 30, 1200, 1195),  # as many as fit
    ],
)
def test_the_alphabet_grows_with_the_text(common, rare, size, kept, tmp_path, capsys):
    """Chinese has thousands of characters. The first 1,000 are kept however rare."""
    text = chinese(common, 60) + "\n" + "".join(chr(0x8000 + i) for i in range(rare))
    (tmp_path / "zh.txt").write_text(text)
    tokenizer = train(str(tmp_path / "zh.txt"), tmp_path / "t", size=str(size))
    printed = capsys.readouterr()
    total = common * 60 + rare
    covered = min(kept, common) * 60 + max(kept - common, 0)
    assert f" characters={kept} coverage={covered / total:.5f}" in printed.out
    assert len(tokenizer) == kept + 5
    left = common + rare - kept
    assert (f"{left:,} rare characters, {1 - covered / total:.3%} of the text, are not in" in printed.err) == (left > 0)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids.count(tokenizer.unk_token_id) == total - covered


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            "がんばれ がんばれ あ a",
            [],
            "50.0% of the words lose accents or vowel signs, as がんばれ becomes かんはれ;",
        ),
        ("हिन्दी में " * 9, [], "100.0% of the words lose accents or vowel signs, as "),
        ("the CAFÉ " * 9, [], "50.0% of the words lose accents or vowel signs, as café becomes cafe; "),
        ("がんばれ हिन्दी café", ["--no-lowercase"], None),
        ("The 한국어 ß 日本 " * 9, ["--limit", "1"], None),
        (
            f"a river {'ก' * 101}{'ก' * 92}",
            [],
            "96.985% of the text is words of over 100 characters, ",
        ),
    ],
)
def test_what_the_tokenizer_does_not_keep_is_said(text, options, message, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(text)
    train(str(tmp_path / "a.txt"), tmp_path / "t", *options)
    printed = capsys.readouterr().err
    assert message in printed if message else "lose" not in printed and "over" not in printed


def test_compare_takes_each_chinese_character_as_a_word(tmp_path, capsys):
    (tmp_path / "zh.txt").write_text(chinese(30, 40))
    train(str(tmp_path / "zh.txt"), tmp_path / "a", size="100")
    train(str(tmp_path / "zh.txt"), tmp_path / "b", "--compare", str(tmp_path / "a"), size="100")
    lines = [line for line in capsys.readouterr().out.splitlines() if "tokens per word" in line]
    assert all("1.000 tokens per word, 0.000% of 1,200 words unknown" in line for line in lines) and len(lines) == 2


@pytest.mark.parametrize("limit", [10, 4000])
def test_full_disk_is_one_message_and_leaves_nothing(limit, source, tmp_path):
    """Where the library writes, and where Python does. An old tokenizer is as it was."""
    train(source, tmp_path / "t", size="600")
    before = {path.name: path.read_bytes() for path in (tmp_path / "t").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match=r"(?i)file too large"):
            train_tokenizer.main([source, "--out", str(tmp_path / "t"), "--vocab_size", "700", "--overwrite"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t", "texts.txt"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "t").iterdir()} == before


@pytest.mark.parametrize(
    ("name", "options", "size", "message"),
    [
        ("texts.txt", [], "20", "is too small for the text's characters; use at least "),
        ("texts.txt", [], "5", "--vocab_size must be more than the 5 special tokens"),
        ("texts.txt", ["--limit", "0"], "700", "--limit must be at least 1"),
        ("texts.txt", ["--compare", "/none"], "700", "there is no such folder"),
        ("empty.txt", [], "700", "no document"),
        ("thai.txt", [], "700", "no word of at most 100 characters; WordPiece needs blanks"),
        ("none", [], "700", "no such file"),
    ],
)
def test_wrong_arguments_and_sources_leave_nothing(name, options, size, message, source, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "thai.txt").write_text("ก" * 101)
    with pytest.raises(ValueError, match=message):
        train(str(tmp_path / name), tmp_path / "t", *options, size=size)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "texts.txt", "thai.txt"]
