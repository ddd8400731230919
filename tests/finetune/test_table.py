import pytest

from src.finetune import table


def test_t_quantile():
    """Against tables of Student's t, two-sided 5%, and the normal distribution's."""
    known = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 9: 2.2622, 10: 2.2281, 30: 2.0423}
    assert {n: table.t_quantile(n) for n in known} == pytest.approx(known, abs=5e-5)
    assert table.t_quantile(100_000) == pytest.approx(1.95996, abs=1e-4)


def test_summary():
    one = table.summarize({"19": 0.5})
    assert one == {"n": 1, "mean": 0.5, "deviation": None, "interval": None, "values": {"19": 0.5}}
    three = table.summarize({"1": 1.0, "2": 2.0, "3": 6.0})
    assert (three["n"], three["mean"]) == (3, 3.0) and three["deviation"] == pytest.approx(7**0.5)
    half = 4.3027 * 7**0.5 / 3**0.5
    assert three["interval"] == pytest.approx([3 - half, 3 + half], abs=1e-3)


def run(task, seed, score, **metrics):
    return {"task": task, "seed": seed, "score": score, "metrics": metrics}


RUNS = [
    run("mnli", 19, 0.85, matched={"accuracy": 0.84}, mismatched={"accuracy": 0.86}),
    run("cola", 19, 0.5, validation={"matthews": 0.5}, test={"matthews": 0.1}),
    run("cola", 717, 0.6, validation={"matthews": 0.6}, test={"matthews": 0.1}),
]


def test_table():
    empty = table.aggregate([])
    assert empty == {"tasks": {}, "average": None}
    assert table.as_text(table.table_lines(empty)) == "task  metric  n  mean  deviation  95% interval\n"
    aggregated = table.aggregate(RUNS)
    assert aggregated["average"] == pytest.approx((0.85 + 0.55) / 2)
    assert aggregated["tasks"]["cola"]["score"]["values"] == {"19": 0.5, "717": 0.6}
    header, *lines = table.table_lines(aggregated)
    assert lines == [
        ("mnli", "accuracy (matched)", "1", "0.8400", "", ""),
        ("mnli", "accuracy (mismatched)", "1", "0.8600", "", ""),
        ("mnli", "score", "1", "0.8500", "", ""),
        ("cola", "matthews", "2", "0.5500", "0.0707", "-0.0853 to 1.1853"),
        ("cola", "matthews (test)", "2", "0.1000", "0.0000", "0.1000 to 0.1000"),
        ("2 tasks", "mean score", "", "0.7000", "", ""),
    ]
    text = table.as_text([header, *lines]).splitlines()
    assert text[0].split("  ")[0] == "task" and len({line.find(" 0.") for line in text[1:4]}) == 1
    markdown = table.as_markdown([header, *lines]).splitlines()
    assert markdown[0] == "| task | metric | n | mean | deviation | 95% interval |"
    assert markdown[1] == "| --- | --- | --- | --- | --- | --- |" and len(markdown) == 8
    assert markdown[5] == "| cola | matthews | 2 | 0.5500 | 0.0707 | -0.0853 to 1.1853 |"


def test_truncation_notes():
    rows = {"train": 9, "dev": 3, "test": 2}
    none = dict.fromkeys(rows, 0)
    cut = {"cut": {"train": 2, "dev": 0, "test": 0}, "unread_words": {"train": 5, "dev": 0, "test": 1}}
    some = {"task": "ner", "rows": rows, **cut}
    assert table.truncation_notes([some, {"task": "x", "rows": rows, "cut": none, "unread_words": none}, some]) == [
        "ner: train: 2 of 9 rows are cut at max_seq_len; 5 labelled words are not seen",
        "ner: test: 0 of 2 rows are cut at max_seq_len; 1 labelled words are not seen",
    ]
