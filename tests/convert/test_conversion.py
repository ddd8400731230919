"""Splits of many units: workers, interruptions, parts, statistics, filters."""

import contextlib
import gzip
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from streaming import MDSWriter

import convert_c4
from src.convert import conversion, filters
from src.convert import unit as units
from src.convert.samples import Tokens
from src.convert.sources import TextSource, iter_documents
from tests.convert.splits import bytes_of, convert, json_of, names_in, texts_of, tokens_of


@contextlib.contextmanager
def stopped_at(number, name="convert_unit"):
    """The task ``name`` fails at this unit. Yields the list of the units that it has done."""
    original, done = getattr(units, name), []

    def task(job, unit, count):
        if unit.number == number:
            raise OSError(28, "No space left on device")
        original(job, unit, count)
        done.append(unit.number)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(conversion, name, task)
        yield done


@pytest.fixture
def many(tmp_path, documents, monkeypatch):
    """241 documents in 13 units: a file that is read in parts, a gzip, small files."""
    monkeypatch.setattr(conversion, "UNIT_BYTES", (16384, 16384))
    documents = [" ".join(document.split()) for document in documents]
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "b.txt").write_text("\n".join(documents[:160]))
    (folder / "c.txt.gz").write_bytes(gzip.compress("\n".join(documents[160:220]).encode(), mtime=0))
    for i, document in enumerate(documents[220:240]):
        (folder / f"d{i:02}.jsonl").write_text(json.dumps({"text": document}) + "\n")
    (folder / "a.txt").write_text(" ".join(documents[240:300]))
    return folder


@pytest.mark.parametrize("tokenize", [False, True])
def test_shards_do_not_depend_on_workers(tokenize, tmp_path, many, tokenizer_folder):
    options = ["--tokenizer", tokenizer_folder, "--max_seq_len", "16"] if tokenize else []
    one = convert(tmp_path / "1", many, *options)
    three = convert(tmp_path / "3", many, *options, "--num_workers", "3")
    assert len(list(one.glob("shard*"))) == 12 and bytes_of(one) == bytes_of(three)
    assert json_of(one / "conversion.json")["units"] == 13  # one part lies within a line that begins before it


@pytest.mark.parametrize(("least_text", "least_tokens"), [(0, 0), (1, 0), (1, 1)])
def test_worker_processes_start_only_for_large_sources(
    least_text, least_tokens, tmp_path, source, tokenizer, monkeypatch
):
    """All cores are used if the source has enough text; tokens need less text than text does."""
    size = (Path(source) / "a.txt").stat().st_size
    least = {"text": size + least_text, "tokens": size + least_tokens}
    monkeypatch.setattr(conversion, "WORKERS_PAY", least)
    started = []
    monkeypatch.setattr(conversion.workers, "run", lambda task, units, number, count: started.append(number))
    for name, tokens in (("text", None), ("tokens", Tokens("x", tokenizer, 16, "chunk"))):
        with pytest.raises(FileNotFoundError):  # no unit is written
            conversion.convert(conversion.Settings(tmp_path / name, TextSource((source,)), tokens=tokens), "mine")
    cores = len(os.sched_getaffinity(0))
    assert started == [1 if least_text else cores, 1 if least_tokens else cores]


@pytest.mark.parametrize(("kind", "least"), [("one gzip", 1000), ("many files", 500)])
def test_memory_does_not_grow_with_the_text(kind, least, tmp_path, monkeypatch):
    """Memory of Python and numpy, compared with eight times the text. A gzip is one unit, however long it is."""
    monkeypatch.setattr(conversion, "UNIT_BYTES", (1 << 20, 1 << 20))
    line = json.dumps({"text": "the cat sat on the mat . " * 40}) + "\n"
    peaks = []
    for number in (least, 8 * least):  # 1 kB each
        folder = tmp_path / f"{number}"
        folder.mkdir()
        if kind == "one gzip":
            with gzip.open(folder / "a.json.gz", "wt", compresslevel=1) as file:
                file.writelines(line for _ in range(number))
        else:
            for i in range(number):
                (folder / f"{i // 100}").mkdir(exist_ok=True)
                (folder / f"{i // 100}" / f"{i}.jsonl").write_text(line)
        tracemalloc.start()
        try:
            convert(tmp_path, folder, "--size_limit", "1mb", split=f"out{number}")
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < peaks[0] + least * 1024  # the text grew by seven times as much


def test_samples_do_not_depend_on_units(tmp_path, many, tokenizer_folder, monkeypatch):
    options = ["--tokenizer", tokenizer_folder, "--max_seq_len", "64"]
    first = tokens_of(convert(tmp_path / "1", many, *options))
    monkeypatch.setattr(conversion, "UNIT_BYTES", (1 << 30, 1 << 30))
    assert tokens_of(convert(tmp_path / "2", many, *options)) == first


def test_stopped_conversion_continues(tmp_path, many, capsys):
    """Complete units are not done again. The result is that of a conversion without a stop."""
    whole = convert(tmp_path / "whole", many)
    with stopped_at(4) as first:
        convert(tmp_path, many)
    with stopped_at(9) as second:
        convert(tmp_path, many)
    assert (first, second) == ([0, 1, 2, 3], [4, 5, 6, 7, 8])
    assert "4 of 13 units" in capsys.readouterr().err
    (tmp_path / "mine.partial" / "units" / "000009.partial").mkdir()  # as a killed worker leaves it
    folder = convert(tmp_path, many, "--skip_bad")
    assert "9 of 13 units" in capsys.readouterr().err and bytes_of(folder) == bytes_of(whole)
    assert names_in(tmp_path) == [".mine.lock", "mine", "texts", "whole"]


def test_conversion_can_be_stopped_at_any_rename(tmp_path, documents, monkeypatch):
    """And between the last rename and the clean-up. Each state on disk begins with one of these calls."""
    monkeypatch.setattr(conversion, "UNIT_BYTES", (8192, 8192))
    source = tmp_path / "a.txt"
    source.write_text("\n".join(documents[:60]))
    whole = bytes_of(convert(tmp_path / "whole", source))
    for module, name in ((os, "rename"), (os, "replace"), (shutil, "rmtree")):
        original = getattr(module, name)
        stop, stopped = 0, True
        while stopped:
            stop, stopped, calls, out = stop + 1, False, 0, tmp_path / f"{name}{stop}"

            def stopping(*args, original=original, **kwargs):
                nonlocal calls, stopped
                calls += 1
                if calls == stop:  # noqa: B023
                    stopped = True
                    raise KeyboardInterrupt
                return original(*args, **kwargs)

            with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
                patched.setattr(module, name, stopping)
                convert(out, source)
            published = (out / "mine").exists()  # what is left then does no harm
            convert(out, source, *(["--overwrite"] if published else []))
            assert bytes_of(out / "mine") == whole and not (out / "mine.partial").exists(), f"{name} {stop}"
        assert stop > {"rename": 8, "replace": 3, "rmtree": 1}[name]


def test_other_settings_or_sources_do_not_continue(tmp_path, many):
    with stopped_at(1):
        convert(tmp_path, many)
    changed = r"other settings or another source \(size_limit: 64mb there, 1mb here\).*--overwrite"
    with pytest.raises(ValueError, match=changed):
        convert(tmp_path, many, "--size_limit", "1mb")
    os.utime(many / "a.txt", ns=(1, 1))
    with pytest.raises(ValueError, match=r"another source \(times: "):
        convert(tmp_path, many)
    (many / "e.txt").write_text("more")
    with pytest.raises(ValueError, match="files: 23 there, 24 here"):
        convert(tmp_path, many)
    convert(tmp_path, many, "--overwrite")


def convert_and_die(moment, *args):
    """Convert in this process, which is killed at a moment counted in samples, syncs and renames."""
    calls = itertools.count(1)

    def mortal(function):
        def call(*args, **kwargs):
            if next(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    MDSWriter.write, os.fsync, os.rename = mortal(MDSWriter.write), mortal(os.fsync), mortal(os.rename)
    convert(*args)


def test_conversion_survives_kill_9_at_many_moments(tmp_path, many):
    """A process is killed and started again until the split is complete."""
    whole = convert(tmp_path / "whole", many)
    random, complete, kills = np.random.default_rng(0), set(), 0
    while not (tmp_path / "mine").exists():
        moment = int(random.integers(1, 120))
        process = multiprocessing.get_context("fork").Process(target=convert_and_die, args=(moment, tmp_path, many))
        process.start()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if not (tmp_path / "mine").exists():
            now = {path.name for path in (tmp_path / "mine.partial" / "units").glob("??????")}
            assert now >= complete
            complete = now
    assert kills > 3 and bytes_of(tmp_path / "mine") == bytes_of(whole)


SMALL_UNITS = """
import runpy, sys
from src.convert import conversion
conversion.UNIT_BYTES = (16384, 16384)
runpy.run_path("convert_c4.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_a_signal_ends_all_workers(name, tmp_path, many):
    """A rerun continues. A second live conversion is refused."""
    whole = convert(tmp_path / "whole", many)
    units_folder = tmp_path / "mine.partial" / "units"
    command = [sys.executable, "-c", SMALL_UNITS, "--out_root", tmp_path, "--splits", "mine", "--source", many]
    process = subprocess.Popen(
        [*command, "--num_workers", "2"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not any(units_folder.glob("??????")):
        time.sleep(0.005)
        assert process.poll() is None
    if name == "SIGKILL":
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(ValueError, match="another process is writing"):
            convert(tmp_path, many)
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C
    _, printed = process.communicate(timeout=30)  # workers hold the pipe open until they end
    if name == "SIGINT":
        assert process.returncode == 1 and "Traceback" not in printed
        assert printed.splitlines()[-1] == "convert_c4.py: interrupted; run the same command again to continue"
    complete = list(units_folder.glob("??????"))
    folder = convert(tmp_path, many, "--num_workers", "2")
    assert complete and bytes_of(folder) == bytes_of(whole)


def killed_at_unit_5(job, unit, count):
    if unit.number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    units.convert_unit(job, unit, count)


def test_a_killed_worker_ends_the_conversion_and_the_command_continues(tmp_path, many, monkeypatch):
    monkeypatch.setattr(conversion, "convert_unit", killed_at_unit_5)
    with pytest.raises(OSError, match="killed by signal 9; out of memory"):
        convert(tmp_path, many, "--num_workers", "2")
    monkeypatch.undo()
    assert any((tmp_path / "mine.partial" / "units").glob("??????"))


def test_merged_parts_are_the_same_split(tmp_path, many):
    def merge():
        convert_c4.main(["--out_root", str(tmp_path), "--splits", "mine", "--merge"])

    whole = convert(tmp_path / "whole", many)
    for part in ("2/3", "1/3"):
        convert(tmp_path, many, "--part", part)
    with pytest.raises(ValueError, match="mine.part-003-of-003 is missing"):
        merge()
    convert(tmp_path, many, "--part", "3/3", "--size_limit", "1mb")
    changed = r"003-of-003 does not match mine.part-001-of-003 \(size_limit: 64mb there, 1mb here"
    with pytest.raises(ValueError, match=changed):
        merge()
    convert(tmp_path, many, "--part", "3/3", "--overwrite")
    lost = tmp_path / "mine.part-002-of-003" / "units" / "000004"
    lost.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="1 of 13 units are incomplete; run mine.part-002-of-003 again"):
        merge()
    (tmp_path / "elsewhere").rename(lost)
    merge()
    ours, theirs = bytes_of(tmp_path / "mine"), bytes_of(whole)
    assert json.loads(ours.pop("conversion.json")) == {**json.loads(theirs.pop("conversion.json")), "times": None}
    assert ours == theirs and not list(tmp_path.glob("mine.part*"))
    with pytest.raises(ValueError, match="mine exists"):
        merge()


# Statistics and filters


def test_stats_and_lengths(tmp_path, many, tokenizer, tokenizer_folder, capsys):
    options = ["--tokenizer", tokenizer_folder, "--max_seq_len", "16", "--pack", "truncate"]
    folder = convert(tmp_path, many, *options)
    lengths = [len(ids) for ids in tokens_of(folder)]
    assert np.fromfile(folder / "lengths.bin", "<u2").tolist() == lengths
    stats = json_of(folder / "stats.json")
    assert (stats["documents"], stats["samples"], stats["tokens"]) == (241, 241, sum(lengths))
    assert stats["fill"] == sum(lengths) / (241 * 16)
    assert stats["bytes"] == sum(path.stat().st_size for path in folder.glob("shard*"))
    assert stats["bytes_per_token"] == stats["bytes"] / sum(lengths)
    assert stats["sample_tokens"]["histogram"] == {str(k): lengths.count(k) for k in sorted(set(lengths))}
    assert stats["sample_tokens"]["percentiles"]["50"] == sorted(lengths)[120]

    cut = total = 0
    for document in iter_documents(TextSource((str(many),))):
        text = document["text"]
        encoding = tokenizer(text, truncation=True, max_length=16, return_offsets_mapping=True)
        total += len(text)
        whole = len(tokenizer(text)["input_ids"]) < 16
        cut += 0 if whole else len(text) - encoding["offset_mapping"][-2][1]
    assert stats["characters"] == total and stats["cut_share"] == cut / total > 0.5
    printed = capsys.readouterr().out
    assert f"{cut / total:.1%} of the text cut off" in printed and f"fill {stats['fill']:.1%}" in printed


@pytest.mark.parametrize("workers", ["1", "2"])
def test_dedup_keeps_the_first_of_equal_documents(workers, tmp_path, many):
    """In the order of the source, across units."""
    first, last = many / "a.txt", many / "z.txt"
    line = (many / "b.txt").read_text().splitlines()[100]
    first.write_text("Two  Words\n" + first.read_text() + "\nUnique here")
    last.write_text(f"two words \n{line}\nﬁne\nfine\nunlike\n")
    folder = convert(tmp_path, many, "--dedup", "--num_workers", workers)
    texts = texts_of(folder)
    assert len(texts) == 2 + 241 + 2 and texts[0] == "Two  Words" and texts[-2:] == ["ﬁne", "unlike"]
    assert [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()] == [
        {"reason": "duplicate", "place": f"{last}:1", "text": "two words "},
        {"reason": "duplicate", "place": f"{last}:2", "text": line[:80]},
        {"reason": "duplicate", "place": f"{last}:4", "text": "fine"},
    ]
    stats = json_of(folder / "stats.json")
    assert stats["dropped"] == {"duplicate": 3, "contaminated": 0} and stats["documents"] == 248


def test_dedup_continues_in_both_passes(tmp_path, many):
    (many / "z.txt").write_text((many / "a.txt").read_text())
    whole = convert(tmp_path / "whole", many, "--dedup")
    for name in ("hash_unit", "convert_unit"):
        with stopped_at(7, name):
            convert(tmp_path, many, "--dedup")
    assert bytes_of(convert(tmp_path, many, "--dedup")) == bytes_of(whole)


@pytest.mark.parametrize("text", ["a\nb\nc\nd", "one\nlonger one"])
def test_dedup_notices_that_the_source_has_changed(text, tmp_path):
    """Its flags would be those of other documents. With --part, times of files are no part of the plan."""
    (tmp_path / "a.txt").write_text("first\none\n a b")
    with stopped_at(0, "convert_unit"):
        convert(tmp_path, tmp_path / "a.txt", "--dedup", "--part", "1/1")
    (tmp_path / "a.txt").write_text(text.ljust(14))
    with pytest.raises(ValueError, match=r"the source changed after --dedup read it; give --overwrite"):
        convert(tmp_path, tmp_path / "a.txt", "--dedup", "--part", "1/1")


def test_a_link_is_not_replaced_by_a_split(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    real = convert(tmp_path / "real", tmp_path / "a.txt")
    (tmp_path / "mine").symlink_to(real)
    with pytest.raises(ValueError, match=r"mine is a link to .*, so it is not replaced; remove it, or name that"):
        convert(tmp_path, tmp_path / "a.txt", "--overwrite")
    assert texts_of(real) == ["one"] and not (tmp_path / "mine.partial").exists()


def test_decontaminate_drops_documents_that_share_13_words(tmp_path, many):
    text = next(iter_documents(TextSource((str(many / "b.txt"),))))["text"]
    words = filters.words_of(text)[2:15]
    evaluation = tmp_path / "evaluation.jsonl"
    line = json.dumps({"sentence": "Before: " + " -- ".join(words).upper() + "!"})
    evaluation.write_text(line + '\n{"sentence": "short"}\n')
    options = ["--decontaminate", str(evaluation), "--decontaminate_column"]
    with pytest.raises(ValueError, match="expected a field 'text' that holds a string; there are: sentence"):
        convert(tmp_path, many, *options[:2])
    folder = convert(tmp_path, many, *options, "sentence", "--num_workers", "2")
    dropped = {"reason": "contaminated", "words": " ".join(words), "place": f"{many / 'b.txt'}:1", "text": text[:80]}
    assert json_of(folder / "dropped.jsonl") == dropped and len(texts_of(folder)) == 240
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ValueError, match="no text has 8 words"):
        convert(tmp_path, many, "--decontaminate", str(tmp_path / "short.txt"), split="other")
