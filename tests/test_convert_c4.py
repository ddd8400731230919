import fcntl
import json
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from streaming import MDSWriter, StreamingDataset

import convert_c4
from src.data_c4 import TOKENS_KEY, tokenizer_fingerprint

LONG = "the cat sat on the mat and looked at the moon . " * 40


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("\n".join(["a short one", LONG, "the album", ""]))
    return str(folder)


def convert(out, source, *options, split="mine"):
    convert_c4.main(["--out_root", str(out), "--splits", split, "--source", source, *options])
    return Path(out) / split


def tokens_of(folder):
    dtype = json.loads((folder / "index.json").read_text())[TOKENS_KEY]["dtype"]
    return [np.frombuffer(s["tokens"], dtype).tolist() for s in StreamingDataset(local=str(folder), batch_size=1)]


def test_text(tmp_path, source, capsys):
    folder = convert(tmp_path, source)
    dataset = StreamingDataset(local=str(folder), batch_size=1)
    assert [s["text"] for s in dataset] == ["a short one", LONG, "the album"]
    index = json.loads((folder / "index.json").read_text())
    assert TOKENS_KEY not in index and all("sha1" in shard["raw_data"]["hashes"] for shard in index["shards"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("convert split=mine documents=3 samples=3 tokens=0 bytes=")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine.lock", "mine", "texts"]


def test_c4_splits_and_columns(tmp_path, c4_folder, documents):
    """C4's own files, with what columns they have; small splits are their beginnings."""
    names = ["train", "val", "val_small"]
    convert_c4.main(["--out_root", str(tmp_path), "--splits", *names, "--source", str(c4_folder), "--limit", "95"])
    for name, want in zip(names, (documents[:95], documents[300:], documents[300:]), strict=True):
        assert [s["text"] for s in StreamingDataset(local=str(tmp_path / name), batch_size=1)] == want


def test_small_splits_have_their_size(monkeypatch, tmp_path, c4_folder):
    assert convert_c4.SMALL == {"train_small": ("train", 100_000), "val_small": ("val", 10_000)}
    monkeypatch.setattr(convert_c4, "SMALL", {"train_small": ("train", 7)})
    convert(tmp_path, str(c4_folder), split="train_small")
    assert StreamingDataset(local=str(tmp_path / "train_small"), batch_size=1).size == 7


def test_columns_where_present(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "url": "u", "other": 1}\n{"text": "y"}\n')
    samples = list(StreamingDataset(local=str(convert(tmp_path, str(tmp_path / "a.jsonl"))), batch_size=1))
    assert samples == [{"text": "x", "url": "u"}, {"text": "y", "url": ""}]


def test_truncate_keeps_what_the_tokenizer_would(tmp_path, source, tokenizer_folder, tokenizer):
    options = ["--tokenizer", tokenizer_folder, "--max_seq_len", "20", "--pack", "truncate"]
    folder = convert(tmp_path, source, *options)
    want = [tokenizer(t, truncation=True, max_length=20)["input_ids"] for t in ("a short one", LONG, "the album")]
    assert tokens_of(folder) == want
    assert json.loads((folder / "index.json").read_text())[TOKENS_KEY] == {
        "tokenizer": tokenizer_folder,
        "fingerprint": tokenizer_fingerprint(tokenizer),
        "vocab_size": len(tokenizer),
        "max_seq_len": 20,
        "pack": "truncate",
        "dtype": "uint16",
    }


def test_chunk_loses_nothing(tmp_path, source, tokenizer_folder, tokenizer, capsys):
    """Own text is cut into chunks unless told otherwise; put together again they are the document."""
    folder = convert(tmp_path, source, "--tokenizer", tokenizer_folder, "--max_seq_len", "20")
    assert "--pack chunk" in capsys.readouterr().out
    samples = tokens_of(folder)
    assert all(s[0] == tokenizer.cls_token_id and s[-1] == tokenizer.sep_token_id and len(s) <= 20 for s in samples)
    together = [i for s in samples for i in s[1:-1]]
    want = [i for t in ("a short one", LONG, "the album") for i in tokenizer(t, add_special_tokens=False)["input_ids"]]
    assert together == want
    assert [len(s) for s in samples[1:-2]] == [20] * len(samples[1:-2])
    assert json.loads((folder / "index.json").read_text())[TOKENS_KEY]["pack"] == "chunk"


def test_large_vocabularies_take_32_bits(tokenizer_folder, monkeypatch):
    class Large:
        def __len__(self):
            return 2**16 + 1

    monkeypatch.setattr(convert_c4, "load_tokenizer", lambda name: Large())
    assert convert_c4.Tokens("x", 8, "chunk").dtype == np.uint32


def test_compression(tmp_path, source):
    folder = convert(tmp_path, source, "--compression", "zstd:7")
    assert [p.name for p in folder.glob("shard*")] == ["shard.00000.mds.zstd"]
    cache = tmp_path / "cache"
    samples = list(StreamingDataset(local=str(cache), remote=str(folder), batch_size=1))
    assert samples[1]["text"] == LONG


def test_existing_output_is_not_overwritten_unless_asked(tmp_path, source):
    folder = convert(tmp_path, source)
    before = (folder / "shard.00000.mds").read_bytes()
    with pytest.raises(ValueError, match="mine exists; give --overwrite"):
        convert(tmp_path, source, "--limit", "1")
    assert (folder / "shard.00000.mds").read_bytes() == before
    convert(tmp_path, source, "--limit", "1", "--overwrite")
    assert StreamingDataset(local=str(folder), batch_size=1).size == 1


def test_a_failure_leaves_the_old_split_and_no_new_one(tmp_path, source, monkeypatch):
    folder = convert(tmp_path, source)

    def full_disk(self, sample):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(MDSWriter, "write", full_disk)
        for options in (["--overwrite"], []):
            with pytest.raises(OSError, match="No space left"):
                convert(tmp_path, source, *options, split="mine" if options else "other")
    assert StreamingDataset(local=str(folder), batch_size=1).size == 3
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob("*.partial"))
    convert(tmp_path, source, split="other")


def test_an_interrupted_replacement_leaves_one_whole_split(tmp_path, source, monkeypatch):
    """Old and new change places by two renames; whatever stops them, a split is there afterwards."""
    folder = convert(tmp_path, source)
    rename = Path.rename

    def interrupted(self, target):
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path, source, "--limit", "1", "--overwrite")
    assert StreamingDataset(local=str(folder), batch_size=1).size == 3

    folder.rename(tmp_path / ".mine.replaced")  # as kill -9 between the renames leaves it
    with pytest.raises(ValueError, match="mine exists; give --overwrite"):
        convert(tmp_path, source)
    assert StreamingDataset(local=str(folder), batch_size=1).size == 3
    convert(tmp_path, source, "--limit", "1", "--overwrite")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine.lock", "mine", "texts"]


def test_overwrite_replaces_datasets_only(tmp_path, source):
    """A split named as the folder of the text would replace the text."""
    with pytest.raises(ValueError, match=r"texts holds no dataset \(no index.json\)"):
        convert(tmp_path, source, "--overwrite", split="texts")
    assert [p.name for p in Path(source).iterdir()] == ["a.txt"]


def test_bad_lines(tmp_path, capsys):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "x"}\nbroken\n')
    with pytest.raises(ValueError, match="a.jsonl:2: no JSON"):
        convert(tmp_path, str(source))
    assert not (tmp_path / "mine").exists()
    convert(tmp_path, str(source), "--skip_bad")
    printed = capsys.readouterr()
    assert "bad=1" in printed.out and "a.jsonl:2" in printed.err


def test_no_documents_is_an_error_that_leaves_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"no document \(2 empty, 0 bad\)"):
        convert(tmp_path, str(tmp_path / "a.txt"))
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_no_tokens_is_an_error_too(tmp_path, tokenizer_folder):
    (tmp_path / "a.txt").write_text("\u200b\n")  # no white space, yet BERT's normalizer drops it
    with pytest.raises(ValueError, match="no token of any document"):
        convert(tmp_path, str(tmp_path / "a.txt"), "--tokenizer", tokenizer_folder, "--max_seq_len", "8")
    assert not list(tmp_path.glob("mine*"))


def test_a_killed_conversion_is_done_again(tmp_path, source):
    """kill -9 in the middle: no split; the next call removes the rest. A second live one is refused."""
    big = tmp_path / "big.txt"
    big.write_text((LONG + "\n") * 300_000)
    command = [sys.executable, "convert_c4.py", "--out_root", tmp_path, "--splits", "mine", "--source", big]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while not (tmp_path / "mine.partial").exists():
            time.sleep(0.05)
            assert process.poll() is None
        with pytest.raises(ValueError, match="another process is writing"):
            convert(tmp_path, source)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "mine").exists() and (tmp_path / "mine.partial").exists()
    folder = convert(tmp_path, source)
    assert StreamingDataset(local=str(folder), batch_size=1).size == 3
    assert not (tmp_path / "mine.partial").exists()


def test_lock_is_free_after_a_crash(tmp_path, source):
    with (tmp_path / ".mine.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process"):
            convert(tmp_path, source)
    convert(tmp_path, source)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--splits", "a", "b"], "is one split, and 2 names"),
        (["--splits", "../a"], "no plain name"),
        (["--splits", ".a"], "no plain name"),
        (["--splits", ""], "no plain name"),
        (["--splits", "a", "--max_seq_len", "8"], "act only with --tokenizer"),
        (["--splits", "a", "--tokenizer", "x"], "needs a --max_seq_len"),
        (["--splits", "a", "--compression", "rar"], "no compression"),
        (["--splits", "a", "--limit", "0"], "at least 1"),
        (["--splits", "a", "--tokenizer", "/none", "--max_seq_len", "8"], "no such folder"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message, tmp_path, source):
    with pytest.raises(ValueError, match=message):
        convert_c4.main(["--out_root", str(tmp_path / "out"), "--source", source, *arguments])
    assert not (tmp_path / "out").exists()


def test_c4_has_these_splits_only(tmp_path, c4_folder):
    with pytest.raises(ValueError, match="C4 has no split test; there are train, val"):
        convert(tmp_path, str(c4_folder), split="test")


def test_errors_are_one_line_and_an_exit_code(tmp_path, monkeypatch):
    """A text given to sys.exit is printed to stderr, with exit code 1."""
    options = ["--out_root", str(tmp_path), "--splits", "x", "--source", str(tmp_path / "none")]
    monkeypatch.setattr(sys, "argv", ["convert_c4.py", *options])
    with pytest.raises(SystemExit) as end:
        runpy.run_path("convert_c4.py", run_name="__main__")
    assert end.value.code == f"convert_c4.py: {tmp_path / 'none'}: there is no such file or folder"
