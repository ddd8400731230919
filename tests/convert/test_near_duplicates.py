"""--dedup near: what is found, in which memory, and that nothing but the source decides it."""

import json

import numpy as np
import pytest

import convert_c4
from src.convert import filters
from src.convert import unit as units
from src.convert.forms import Span
from tests.convert.splits import bytes_of, convert, json_of, texts_of
from tests.convert.test_conversion import many, stopped_at  # noqa: F401

NEAR = filters.METHODS["near"]


def found(texts, tmp_path, bucket=filters.BUCKET, files=1):
    """Which of the texts are near duplicates of earlier ones."""
    paths = []
    for i, part in enumerate(np.array_split(np.arange(len(texts)), files)):
        rows = np.frombuffer(b"".join(NEAR.keys(texts[j]) for j in part), "<u8").reshape(len(part), -1)
        paths.append(tmp_path / f"{i}.hashes")
        paths[-1].write_bytes(rows.T.tobytes())
    filters.find_duplicates(paths, NEAR, tmp_path / "out", bucket)
    return np.fromfile(tmp_path / "out", bool).tolist()


def pair(similarity, rng, length=300):
    """Two texts whose sets of 5-word sequences have this Jaccard similarity: a common beginning, other ends."""
    common = round(2 * similarity / (1 + similarity) * length) + 4
    words = [[f"w{n}" for n in rng.integers(0, 1 << 40, length + 4)] for _ in range(2)]
    return [" ".join([*words[0][:common], *own[common:]]) for own in words]


@pytest.mark.parametrize(
    ("similarity", "least", "most"), [(0.95, 0.98, 1.0), (0.9, 0.94, 1.0), (0.5, 0.0, 0.03), (0.3, 0.0, 0.0)]
)
def test_near_duplicates_are_found_and_others_are_kept(similarity, least, most, tmp_path):
    """Of 200 pairs. By 1 - (1 - s^11)^11: all, 98.4%, 0.5%, none."""
    rng = np.random.default_rng(0)
    marked = np.array(found([text for _ in range(200) for text in pair(similarity, rng)], tmp_path)).reshape(-1, 2)
    assert not marked[:, 0].any() and least <= marked[:, 1].mean() <= most


@pytest.mark.parametrize("kind", ["English", "Chinese"])
def test_a_copy_with_a_few_words_changed(kind, tmp_path):
    """And an equal one in other letters; other texts and short ones stay."""
    rng = np.random.default_rng(1)
    blank, alphabet = (
        (" ", [f"word{i}" for i in range(500)]) if kind == "English" else ("", [chr(0x4E00 + i) for i in range(500)])
    )
    words = rng.choice(alphabet, 800).tolist()
    edited = [*words[:400], *alphabet[:3], *words[403:]]
    texts = [blank.join(x) for x in (words, rng.choice(alphabet, 800), edited)] + [blank.join(words).upper() + " !"]
    short = ["yes", "no", "Yes!", "?!", "?!", "...", "one two three four", "one two three five"]
    assert found(texts + short, tmp_path) == [0, 0, 1, 1] + [0, 0, 1, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("bucket", [1, 5, 1000])
def test_near_duplicates_in_buckets_and_files_of_any_size(bucket, tmp_path):
    """Each document shares a key with an earlier one, or none: compared with Python's sets."""
    rng = np.random.default_rng(2)
    texts = [text for _ in range(8) for text in pair(0.8, rng, 60)]
    texts = [texts[i] for i in rng.permutation(len(texts))]
    seen, want = set(), []
    for text in texts:
        keys = NEAR.keys(text)
        keys = {(i, keys[8 * i : 8 * i + 8]) for i in range(filters.BANDS)}
        want.append(bool(keys & seen))
        seen |= keys
    assert found(texts, tmp_path, bucket, files=3) == want and 0 < sum(want) < 8


def test_keys_are_the_same_on_every_machine():
    """Written by this version. Others would drop other documents, and not continue this version's work."""
    assert NEAR.keys("the cat sat on the mat and looked at the moon")[:8].hex() == "de15695c90912e75"
    assert filters.NEAR == "near: 5 words, 11 bands of 11, rensa's algorithm 2"


@pytest.fixture
def edited(many):  # noqa: F811
    """The documents of ``many``, then three of them with a changed word, one of them in capitals."""
    lines = sorted((many / "b.txt").read_text().splitlines(), key=lambda line: len(line.split()))[-3:]
    copies = [line.rsplit(" ", 1)[0] + " elsewhere" for line in lines]
    (many / "z.txt").write_text("\n".join([copies[0].upper(), *copies[1:], "unlike"]))
    return many


def test_near_duplicates_are_dropped_and_listed(edited, tmp_path):
    folder = convert(tmp_path, edited, "--dedup", "near")
    dropped = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    places = [f"{edited / 'z.txt'}:{i}" for i in (1, 2, 3)]
    assert [line["place"] for line in dropped] == places and {line["reason"] for line in dropped} == {"near duplicate"}
    assert json_of(folder / "stats.json")["dropped"] == {"duplicate": 3, "contaminated": 0}
    assert texts_of(folder)[-1] == "unlike" and json_of(folder / "conversion.json")["dedup"] == filters.NEAR
    exact = convert(tmp_path, edited, "--dedup", "exact", split="exact")
    assert json_of(exact / "stats.json")["dropped"]["duplicate"] == 0


@pytest.mark.parametrize("method", ["exact", "near"])
def test_dedup_does_not_depend_on_stops_workers_or_parts(method, edited, tmp_path):
    """Each part looks for duplicates in the whole source, and the parts give the split of one machine."""
    (edited / "y.txt").write_text((edited / "a.txt").read_text())
    options = ["--dedup", method]
    whole = bytes_of(convert(tmp_path / "whole", edited, *options))
    for name in ("hash_unit", "convert_unit"):
        with stopped_at(7, name):
            convert(tmp_path / "stopped", edited, *options)
    assert bytes_of(convert(tmp_path / "stopped", edited, *options, "--num_workers", "2")) == whole
    for part in ("2/3", "3/3", "1/3"):
        convert(tmp_path / "parts", edited, *options, "--part", part)
    convert_c4.main(["--out_root", str(tmp_path / "parts"), "--splits", "mine", "--merge"])
    merged = bytes_of(tmp_path / "parts" / "mine")
    assert json.loads(merged.pop("conversion.json")) == {**json.loads(whole.pop("conversion.json")), "times": None}
    assert merged == whole and json.loads(merged["stats.json"])["dropped"]["duplicate"] == (
        1 if method == "exact" else 4
    )


def test_another_method_does_not_continue(edited, tmp_path):
    with stopped_at(3):
        convert(tmp_path, edited, "--dedup")
    with pytest.raises(ValueError, match=r"dedup: True there, near: 5 words, .* here"):
        convert(tmp_path, edited, "--dedup", "near")


def test_an_unknown_method_is_refused(source, tmp_path, capsys):
    with pytest.raises(SystemExit):
        convert(tmp_path, source, "--dedup", "fuzzy")
    assert "choose from" in capsys.readouterr().err


def test_the_first_pass_writes_one_key_after_another(tmp_path, monkeypatch):
    """So that sorting by a key reads this key only."""
    monkeypatch.setattr(filters, "METHODS", {"near": filters.Method(lambda text: bytes(range(24)), (2, 1))})
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "units").mkdir()
    job = units.Job(tmp_path, {"limit": None}, None, "text", False, "near")
    units.hash_unit(job, units.Unit(0, [Span(str(tmp_path / "a.txt"))]), lambda number: None)
    (file,) = (tmp_path / "units").iterdir()
    assert file.read_bytes() == bytes(range(16)) * 3 + bytes(range(16, 24)) * 3
