import unicodedata

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
    filters.find_duplicates(files, filters.METHODS["exact"], tmp_path / "out", bucket)
    assert np.fromfile(tmp_path / "out", bool).tolist() == want


def test_hashes_that_share_one_half_are_different(tmp_path):
    pairs = np.array([[1, 2], [1, 3], [4, 2], [1, 2]], "<u8")
    (tmp_path / "a").write_bytes(pairs.tobytes())
    filters.find_duplicates([tmp_path / "a"], filters.METHODS["exact"], tmp_path / "out")
    assert np.fromfile(tmp_path / "out", bool).tolist() == [False, False, False, True]


def test_words_are_as_gpt3_counts_them():
    assert filters.words_of("Don't -- STOP,  the_end: 3.5%\nÜber") == ["dont", "stop", "theend", "35", "über"]


FRENCH = "un élève âgé a été très étonné près de la forêt où l'été s'achève à noël"
HINDI = "यह एक बहुत लंबा वाक्य है जिसमें कई अलग अलग शब्द और मात्राएँ आती हैं"
LIGATURES = "ﬁne oﬃce ﬂows are what we find in texts that a program took from pages"
ENGLISH = "the quick brown fox jumps over the lazy dog near a river bank today"
FORMS = {
    "decomposed": (FRENCH, unicodedata.normalize("NFD", FRENCH)),
    "decomposed, in capitals": (FRENCH, unicodedata.normalize("NFD", FRENCH.upper())),
    "full width": (ENGLISH, "".join(chr(ord(c) + 0xFEE0) if c > " " else c for c in ENGLISH)),
    "ligatures": (LIGATURES, unicodedata.normalize("NFKC", LIGATURES)),
    "Hindi, decomposed": (HINDI, unicodedata.normalize("NFD", HINDI)),
}


@pytest.mark.parametrize("name", FORMS)
def test_both_filters_see_one_text_in_all_its_forms(name):
    text, form = FORMS[name]
    grams, _ = filters.gram_set([text])
    assert filters.overlap(f"before, {form} after", grams)
    assert filters.text_hash(form) == filters.text_hash(text) and filters.band_keys(form) == filters.band_keys(text)


def test_marks_belong_to_their_letters():
    """Python's ``\\w`` has no combining marks, so words that differ in their vowels would be the same."""
    assert filters.words_of("कि का, ที่") == ["कि", "का", "ท", "ี", "่"]
    assert filters.words_of("I ❤\ufe0f you 👍🏽") == ["i", "you"]


@pytest.mark.parametrize(
    ("text", "characters"),
    [
        ("人工智能正在改变我们的生活方式,也带来了新的挑战与机遇因此各国政府都在研究相应的法律。", 26),
        ("このモデルは大量の日本語テキストで学習され、様々なタスクで高い性能を示しています。", 26),
        ("การเรียนรู้ของเครื่องเป็นสาขาหนึ่งของปัญญาประดิษฐ์ที่ช่วยให้คอมพิวเตอร์เรียนรู้จากข้อมูลได้", 52),
    ],
    ids=["Chinese", "Japanese", "Thai"],
)
def test_scripts_without_blanks(text, characters):
    """A part of a line is found, and neither a line nor a single character is a word."""
    letters = "".join(filters.words_of(text))
    grams, short = filters.gram_set([text])
    assert len(grams[52]) == len(letters) - characters + 1 and short == 0
    inside = letters[5 : 5 + characters]
    assert filters.overlap(f"x{inside}y", grams) == " ".join(inside)
    assert filters.overlap(f"x{inside[1:]}y", grams) is None


def test_words_and_characters_in_one_text():
    assert filters.words_of("我用Python3写代码 daily") == ["我", "用", "python3", "写", "代", "码", "daily"]
    text = "我用Python写代码 " * 6  # two words and a half each
    grams, _ = filters.gram_set([text])
    assert filters.overlap(text, grams) is not None and list(grams) == [52]


def test_overlap_is_13_words_in_a_row():
    words = [f"w{i}" for i in range(30)]
    grams, short = filters.gram_set([" ".join(words), "too short"])
    assert len(grams[52]) == 18 and short == 1
    inside = "before " + " ".join(words[5:18]) + " after"
    assert filters.overlap(inside, grams) == " ".join(words[5:18])
    assert filters.overlap("before " + " ".join(words[5:17]) + " after", grams) is None
    swapped = [*words[5:10], words[11], words[10], *words[12:18]]
    assert filters.overlap(" ".join(swapped), grams) is None
    assert filters.overlap("w29 " * 50, grams) is None and filters.overlap("", grams) is None


@pytest.mark.parametrize("length", [7, 8, 10, 12, 13, 14])
def test_a_short_text_is_found_as_a_whole(length):
    """From 8 words on; without its last word it is another text."""
    words = [f"w{i}" for i in range(length)]
    grams, short = filters.gram_set([" ".join(words)])
    assert short == (length < 8)
    text = " ".join(words)
    assert filters.overlap(f"before {text} after", grams) == (" ".join(words[:13]) if length > 7 else None)
    assert filters.overlap(f"before {' '.join(words[: min(length, 13) - 1])} after", grams) is None


def test_the_hash_of_a_sequence_does_not_depend_on_its_place():
    """Compared with the polynomial over Python's integers."""
    words = filters.Words("a b c d e f g h i j k")
    hashes, ends = words.grams(3 * filters.QUARTERS)
    single = [int(filters.Words(word).grams(filters.QUARTERS)[0][0]) for word in words.words]
    base, triples = 0x9E3779B97F4A7C15, zip(single, single[1:], single[2:], strict=False)
    assert hashes.tolist() == [(a * base**2 + b * base + c) % 2**64 for a, b, c in triples]
    assert ends.tolist() == list(range(3, 12))
