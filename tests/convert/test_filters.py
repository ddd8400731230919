import numpy as np
import pytest

from src.convert import filters


def test_equal_texts_have_equal_hashes():
    same = ["The ﬁne  Café\n", " the fine cafe\u0301", "THE FINE CAFÉ"]
    assert len({filters.text_hash(text) for text in same}) == 1
    assert len({filters.text_hash(text) for text in ("a b", "ab", "a c", "")}) == 4
    assert len(filters.text_hash("x")) == 16


@pytest.mark.parametrize("bucket", [1, 7, 64, 1000])
def test_duplicates_in_buckets_of_any_size(bucket, tmp_path):
    """Compared with a Python set, over several files, one of them empty."""
    numbers = np.random.default_rng(0).integers(0, 60, size=100).tolist()
    files, seen, want = [], set(), []
    for i, part in enumerate((numbers[:33], [], numbers[33:34], numbers[34:])):
        files.append(tmp_path / f"{i}.hashes")
        files[-1].write_bytes(b"".join(filters.text_hash(str(n)) for n in part))
    for n in numbers:
        want.append(n in seen)
        seen.add(n)
    filters.find_duplicates(files, tmp_path / "out", bucket)
    assert np.fromfile(tmp_path / "out", bool).tolist() == want


def test_hashes_that_share_one_half_are_different(tmp_path):
    pairs = np.array([[1, 2], [1, 3], [4, 2], [1, 2]], "<u8")
    (tmp_path / "a").write_bytes(pairs.tobytes())
    filters.find_duplicates([tmp_path / "a"], tmp_path / "out")
    assert np.fromfile(tmp_path / "out", bool).tolist() == [False, False, False, True]


def test_words_are_as_gpt3_counts_them():
    assert filters.words_of("Don't -- STOP,  the_end: 3.5%\nÜber") == ["dont", "stop", "theend", "35", "über"]


def test_overlap_is_13_words_in_a_row():
    words = [f"w{i}" for i in range(30)]
    grams, short = filters.gram_set([" ".join(words), "too short", " ".join(words[:12])])
    assert len(grams) == 18 and short == 2
    inside = "before " + " ".join(words[5:18]) + " after"
    assert filters.overlap(inside, grams) == " ".join(words[5:18])
    assert filters.overlap("before " + " ".join(words[5:17]) + " after", grams) is None
    swapped = [*words[5:10], words[11], words[10], *words[12:18]]
    assert filters.overlap(" ".join(swapped), grams) is None
    assert filters.overlap("w29 " * 50, grams) is None and filters.overlap("", grams) is None
