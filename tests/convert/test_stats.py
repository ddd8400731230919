import json
from collections import Counter

import numpy as np

from src.convert.stats import PERCENTILES, Stats, distribution, rounded


def test_rounded_lengths_are_few_and_at_most_an_eighth_less():
    lengths = range(100_000)
    assert all(length * 7 / 8 <= rounded(length) <= length for length in lengths)
    assert [rounded(length) for length in (0, 1, 15, 16, 17, 1000)] == [0, 1, 15, 16, 16, 960]
    assert len({rounded(length) for length in lengths}) < 130


def test_distribution_matches_numpy():
    values = np.random.default_rng(0).integers(0, 500, 333)
    counts = dict(zip(*(x.tolist() for x in np.unique(values, return_counts=True)), strict=True))
    found = distribution(counts)
    want = np.percentile(values, PERCENTILES, method="inverted_cdf").tolist()
    assert [found["percentiles"][str(p)] for p in PERCENTILES] == want
    assert found["mean"] == values.mean() and sum(found["histogram"].values()) == 333
    assert distribution({}) == {"mean": 0.0, "percentiles": {}, "histogram": {}}


def test_parts_add_up_to_the_whole():
    """After they were written as JSON and read again, as for units."""
    lengths = np.random.default_rng(0).integers(2, 128, 100).astype("<u2")

    def of(lengths, **counts):
        tokens = int(lengths.sum(dtype=np.int64))
        return Stats(samples=len(lengths), tokens=tokens, sample_tokens=Counter(lengths.tolist()), **counts)

    counts = {"documents": 90, "characters": 9000, "cut_characters": 90, "bytes": 12_000}
    whole, total = of(lengths, **counts), Stats()
    for part in (lengths[:30], lengths[30:31], lengths[31:]):
        stats = of(part, first_bad=[f"line {i}" for i in range(3)])
        total.add(Stats.from_json(json.loads(json.dumps(vars(stats)))))
    total.add(Stats(**counts))
    assert total.first_bad == ["line 0", "line 1", "line 2", "line 0", "line 1"]
    total.first_bad = []
    assert total.report(128) == whole.report(128)
    report = whole.report(128)
    tokens = int(lengths.sum(dtype=np.int64))
    assert (report["tokens"], report["fill"], report["cut_share"]) == (tokens, tokens / 12_800, 0.01)
    assert report["bytes_per_token"] == 12_000 / tokens and report["characters_per_token"] == 8910 / tokens
