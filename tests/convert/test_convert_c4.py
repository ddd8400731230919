import fcntl
import runpy
import sys
from pathlib import Path

import pytest
from streaming import MDSWriter

import convert_c4
from src.convert import conversion
from src.convert.samples import Tokens
from src.convert.stats import Stats
from src.data.cutting import PIECE, TextEncoder, encode_prefix, pieces
from src.data.index import TOKENS_KEY
from src.data.tokenizer import tokenizer_fingerprint
from tests.conftest import TRAIN
from tests.convert.splits import TEXTS, bytes_of, convert, json_of, names_in, rows_of, texts_of, tokens_of


def test_text(tmp_path, source, capsys):
    folder = convert(tmp_path, source)
    assert texts_of(folder) == TEXTS
    index = json_of(folder / "index.json")
    assert TOKENS_KEY not in index and all("sha1" in shard["raw_data"]["hashes"] for shard in index["shards"])
    assert names_in(folder) == ["conversion.json", "files.jsonl", "index.json", "shard.00000.mds", "stats.json"]
    stats = json_of(folder / "stats.json")
    assert "tokens" not in stats and stats["document_characters"]["histogram"] == {"9": 1, "11": 1, "1920": 1}
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("convert split=mine documents=3 samples=3 tokens=0 bytes=")
    assert names_in(tmp_path) == [".mine.lock", "mine", "texts"]


def test_c4_splits(tmp_path, c4_folder, documents):
    names = ["train", "val", "val_small"]
    convert_c4.main(["--out_root", str(tmp_path), "--splits", *names, "--source", str(c4_folder), "--limit", "95"])
    for name, want in zip(names, (documents[:95], documents[TRAIN:], documents[TRAIN:]), strict=True):
        assert texts_of(tmp_path / name) == want


def test_small_splits_are_the_first_documents(monkeypatch, tmp_path, c4_folder, documents):
    assert conversion.FIRST_DOCUMENTS == {"train_small": ("train", 100_000), "val_small": ("val", 10_000)}
    monkeypatch.setitem(conversion.FIRST_DOCUMENTS, "train_small", ("train", 7))
    assert texts_of(convert(tmp_path, c4_folder, split="train_small")) == documents[:7]


def test_known_columns_are_kept(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "url": "u", "other": 1}\n{"text": "y"}\n')
    rows = rows_of(convert(tmp_path, tmp_path / "a.jsonl"))
    assert rows == [{"text": "x", "url": "u"}, {"text": "y", "url": ""}]


def test_truncate_gives_the_ids_of_the_tokenizer(tmp_path, source, tokenizer_folder, tokenizer):
    options = ["--tokenizer", tokenizer_folder, "--max_seq_len", "20", "--pack", "truncate"]
    folder = convert(tmp_path, source, *options)
    assert tokens_of(folder) == [tokenizer(text, truncation=True, max_length=20)["input_ids"] for text in TEXTS]
    assert json_of(folder / "index.json")[TOKENS_KEY] == {
        "tokenizer": tokenizer_folder,
        "fingerprint": tokenizer_fingerprint(tokenizer),
        "vocab_size": len(tokenizer),
        "max_seq_len": 20,
        "pack": "truncate",
        "dtype": "uint16",
    }


def test_chunk_loses_nothing(tmp_path, source, tokenizer_folder, tokenizer, capsys):
    """The default for own text. The chunks of a document, joined, are its ids."""
    folder = convert(tmp_path, source, "--tokenizer", tokenizer_folder, "--max_seq_len", "20")
    assert "--pack chunk" in capsys.readouterr().out
    samples = tokens_of(folder)
    assert all(s[0] == tokenizer.cls_token_id and s[-1] == tokenizer.sep_token_id and len(s) <= 20 for s in samples)
    want = [i for text in TEXTS for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert [i for s in samples for i in s[1:-1]] == want
    assert [len(s) for s in samples[1:-2]] == [20] * len(samples[1:-2])
    assert json_of(folder / "index.json")[TOKENS_KEY]["pack"] == "chunk"


def test_compression(tmp_path, source):
    folder = convert(tmp_path, source, "--compression", "zstd:7")
    assert [path.name for path in folder.glob("shard*")] == ["shard.00000.mds.zstd"]
    assert [row["text"] for row in rows_of(tmp_path / "cache", remote=str(folder))] == TEXTS


def test_existing_split_is_replaced_only_with_overwrite(tmp_path, source):
    folder = convert(tmp_path, source)
    before = bytes_of(folder)
    with pytest.raises(ValueError, match="mine exists; give --overwrite"):
        convert(tmp_path, source, "--limit", "1")
    assert bytes_of(folder) == before
    convert(tmp_path, source, "--limit", "1", "--overwrite")
    assert texts_of(folder) == TEXTS[:1]


def test_a_full_disk_leaves_the_old_split_and_the_command_continues_later(tmp_path, source, monkeypatch):
    folder = convert(tmp_path, source)

    def full_disk(self, sample):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(MDSWriter, "write", full_disk)
        for split, options in (("mine", ["--overwrite"]), ("other", [])):
            with pytest.raises(OSError, match="No space left"):
                convert(tmp_path, source, *options, split=split)
    assert len(rows_of(folder)) == 3 and not (tmp_path / "other").exists()
    convert(tmp_path, source, split="other")
    assert not (tmp_path / "other.partial").exists()


def test_interrupted_replacement_leaves_one_whole_split(tmp_path, source, monkeypatch):
    """Old and new change places by two renames. A split remains, wherever this stops."""
    folder = convert(tmp_path, source)
    rename = Path.rename

    def interrupted(self, target):
        if self.name == "split":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "rename", interrupted)
        convert(tmp_path, source, "--limit", "1", "--overwrite")
    assert texts_of(folder) == TEXTS

    folder.rename(tmp_path / ".mine.replaced")  # as kill -9 between the renames leaves it
    with pytest.raises(ValueError, match="mine exists; give --overwrite"):
        convert(tmp_path, source)
    assert texts_of(folder) == TEXTS
    convert(tmp_path, source, "--limit", "1", "--overwrite")
    assert names_in(tmp_path) == [".mine.lock", "mine", "texts"]


def test_overwrite_replaces_datasets_only(tmp_path, source):
    """A split with the name of the text's folder would replace the text."""
    with pytest.raises(ValueError, match=r"texts is not a dataset \(no index.json\)"):
        convert(tmp_path, source, "--overwrite", split="texts")
    assert names_in(Path(source)) == ["a.txt"]


def test_bad_lines_raise_or_are_skipped(tmp_path, capsys):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "x"}\nbroken\n')
    with pytest.raises(ValueError, match="a.jsonl:2: invalid JSON"):
        convert(tmp_path, source)
    assert not (tmp_path / "mine").exists()
    convert(tmp_path, source, "--skip_bad")
    printed = capsys.readouterr()
    assert "bad=1" in printed.out and "a.jsonl:2" in printed.err


@pytest.mark.parametrize(
    ("text", "tokenize", "message"),
    [
        ("\n \n", False, r"no document \(2 empty, 0 bad\)"),
        ("\u200b\n", True, "no token for any document"),  # no white space, yet BERT's normalizer drops it
    ],
)
def test_a_split_without_samples_is_an_error_that_leaves_nothing(text, tokenize, message, tmp_path, tokenizer_folder):
    (tmp_path / "a.txt").write_text(text)
    options = ["--tokenizer", tokenizer_folder, "--max_seq_len", "8"] if tokenize else []
    with pytest.raises(ValueError, match=message):
        convert(tmp_path, tmp_path / "a.txt", *options)
    assert [name for name in names_in(tmp_path) if name != ".mine.lock"] == ["a.txt"]


def test_lock_is_free_after_a_crash(tmp_path, source):
    with (tmp_path / ".mine.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process"):
            convert(tmp_path, source)
    convert(tmp_path, source)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--splits", "a", "b"], "is one split; expected one name in --splits, got 2"),
        (["--splits", "a", "a"], "a name is given twice"),
        (["--splits", "../a"], "expected a plain folder name, got '../a'"),
        (["--splits", ".a"], "expected a plain folder name"),
        (["--splits", ""], "expected a plain folder name"),
        (["--splits", "a", "--max_seq_len", "8"], "have no effect without --tokenizer"),
        (["--splits", "a", "--decontaminate_column", "x"], "has no effect without --decontaminate"),
        (["--splits", "a", "--text_column", "x"], "has no effect on .txt files"),
        (["--splits", "a", "--tokenizer", "x"], "needs a --max_seq_len"),
        (["--splits", "a", "--compression", "rar"], "expected zstd, gz, .*, got 'rar'"),
        (["--splits", "a", "--limit", "0"], "--limit must be at least 1"),
        (["--splits", "a", "--num_workers", "0"], "--num_workers must be at least 1"),
        (["--splits", "a", "--tokenizer", "x", "--max_seq_len", "65536"], "from 3 to 65,535"),
        (["--splits", "a", "--part", "1/2", "--limit", "5"], "--part cannot be combined with a limit"),
        (["--splits", "a", "--merge"], "omit --source"),
        (["--splits", "a", "--tokenizer", "/none", "--max_seq_len", "8"], "no such folder"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, tmp_path, source):
    with pytest.raises(ValueError, match=message):
        convert_c4.main(["--out_root", str(tmp_path / "out"), "--source", source, *arguments])
    assert not (tmp_path / "out").exists()


def test_unknown_splits_of_c4_are_refused(tmp_path, c4_folder):
    with pytest.raises(ValueError, match="C4 has no split test; it has train, val"):
        convert(tmp_path, c4_folder, split="test")


@pytest.mark.parametrize("part", ["0/2", "3/2", "x", "1/1000"])
def test_wrong_parts_are_refused(part, tmp_path, source, capsys):
    with pytest.raises(SystemExit):
        convert(tmp_path, source, "--part", part)
    assert "expected a part such as 3/16, got" in capsys.readouterr().err


def test_errors_are_one_line_and_an_exit_code(tmp_path, monkeypatch):
    """A text given to sys.exit is printed to stderr, with exit code 1."""
    options = ["--out_root", str(tmp_path), "--splits", "x", "--source", str(tmp_path / "none")]
    monkeypatch.setattr(sys, "argv", ["convert_c4.py", *options])
    with pytest.raises(SystemExit) as end:
        runpy.run_path("convert_c4.py", run_name="__main__")
    assert end.value.code == f"convert_c4.py: {tmp_path / 'none'}: no such file or folder"


# Tokens

ODD = ["word " * 9000, "x" * 40_000 + " end", "tab\tand\nline " * 40, "\u200b", "日本" * 300]
ODD += ["a  b   " * 500, " lead", "é́" * 90 + " y" * 90]


@pytest.mark.parametrize("max_seq_len", [3, 16, 3000])
def test_truncated_samples_are_the_first_ids_of_the_text(max_seq_len, tokenizer):
    """Although only a prefix is tokenized, here and for shards of text."""
    encoder = TextEncoder.of(tokenizer)
    texts, room = [text for text in ODD if tokenizer.tokenize(text)], max_seq_len - 2
    samples = Tokens("x", tokenizer, max_seq_len, "truncate").samples(iter(ODD), Stats())
    for text, sample in zip(texts, samples, strict=True):
        want = tokenizer(text, add_special_tokens=False)["input_ids"][:room]
        assert sample[1:-1].tolist() == want == encode_prefix(encoder, text, room)


@pytest.mark.parametrize("max_seq_len", [16, 17])  # of a piece's 3,276 words, chunks of 14 leave none, of 15 some
def test_long_documents_are_tokenized_in_pieces(max_seq_len, tokenizer):
    samples = list(Tokens("x", tokenizer, max_seq_len, "chunk").samples(iter([ODD[0], ODD[2]]), Stats()))
    together = [i for sample in samples for i in sample[1:-1].tolist()]
    assert together == [i for text in (ODD[0], ODD[2]) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert [len(sample) for sample in samples[:600]] == [max_seq_len] * 600
    assert all("".join(pieces(text)) == text for text in ODD)
    assert [*map(len, pieces(ODD[1]))] == [PIECE, PIECE, len(ODD[1]) - 2 * PIECE]  # without a blank for long
