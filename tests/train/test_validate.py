"""Memory of a step, as --validate counts it."""

import json
from pathlib import Path

import pytest

from src.configuration_bert import MosaicBertConfig
from src.train.validate import kernels_saved_bytes

RESULTS = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "gpu-h200.json").read_text())
STEPS = [row for row in RESULTS["curve"]["results"] if row["microbatches"] == 1]


@pytest.mark.parametrize("row", STEPS, ids=lambda r: f"{r['sequences']}x{r['length']}-{r['fill']}-{r['dropout']}")
def test_counted_memory_is_what_a_card_measured(row):
    """At base size, weights, gradients and moments in fp32 and the weights in bf16 included."""
    config = MosaicBertConfig(vocab_size=30528, hidden_dropout_prob=row["dropout"])
    saved = kernels_saved_bytes(config, row["tokens"], round(0.3 * row["tokens"]))
    assert (saved + 18 * 137e6) / 2**30 == pytest.approx(row["peak_gib"], rel=0.05)
