"""Memory of a step, as --validate counts it."""

import json
import math

import pytest
import torch

from src.attention import alibi_slopes
from src.bert_layers import BertForMaskedLM
from src.bert_padding import Layout
from src.common.environment import ROOT
from src.configuration_bert import MosaicBertConfig
from src.data.microbatches import fullest_batch, split_unpadded
from src.train import models
from src.train.config import load
from src.train.data import highest_rate
from src.train.validate import kernels_saved_bytes, memory, saved_bytes
from tests.runs import QUICKSTART

RESULTS = json.loads((ROOT / "benchmarks" / "results" / "gpu-h200.json").read_text())
STEPS = [row for row in RESULTS["curve"]["results"] if row["microbatches"] == 1]


@pytest.mark.parametrize("row", STEPS, ids=lambda r: f"{r['sequences']}x{r['length']}-{r['fill']}-{r['dropout']}")
def test_counted_memory_is_what_a_card_measured(row):
    """At base size, weights, gradients and moments in fp32 and the weights in bf16 included."""
    config = MosaicBertConfig(vocab_size=30528, hidden_dropout_prob=row["dropout"])
    saved = kernels_saved_bytes(config, row["tokens"], round(0.3 * row["tokens"]))
    assert (saved + 18 * 137e6) / 2**30 == pytest.approx(row["peak_gib"], rel=0.05)


def fits(options, tokenizer, parameters=0):
    """The line of ``--validate``: microbatch by GB."""
    run = load(QUICKSTART, options)
    line = memory(run, models.build_model(run, tokenizer), parameters, tokenizer)["microbatch"]
    what, entries = line.split(" that fit on a card: ")
    return what, {int(e.split(" on ")[1].split()[0]): e.split(" on ")[0].replace(",", "") for e in entries.split(", ")}


def shown_gib(options, tokenizer, parameters=0):
    run = load(QUICKSTART, options)
    shown = memory(run, models.build_model(run, tokenizer), parameters, tokenizer)["memory"]
    return float(shown.split("about ")[1].split()[0])


def test_what_fits_on_a_card(overrides, tokenizer):
    """One sequence more would not; at most a device's share; nothing if weights and moments alone are too large."""
    many = [*overrides, "precision=amp_bf16", "global_train_batch_size=50000000"]
    what, by_card = fits(many, tokenizer)
    assert what == "sequences" and list(by_card) == [16, 24, 40, 48, 80, 141]
    for card, n in by_card.items():
        gib = shown_gib([*many, f"device_train_microbatch_size={n}"], tokenizer)
        assert gib == pytest.approx(0.9e9 * card / 2**30, abs=0.01)
    what, tokens = fits([*many, "device_train_microbatch_tokens=64"], tokenizer)
    assert what == "tokens" and [int(n) for n in tokens.values()] == [32 * int(n) for n in by_card.values()]
    assert set(fits([*many, "global_train_batch_size=20"], tokenizer)[1].values()) == {"all of a step"}
    assert fits(many, tokenizer, parameters=2**30)[1][16] == "none"
    with_weights, without = (shown_gib(many, tokenizer, parameters) for parameters in (2**26, 0))
    assert with_weights - without == pytest.approx(18 * 2**26 / 2**30, abs=0.02)  # 2 bytes are autocast's copies


def test_gradient_checkpointing_holds_a_recomputed_layer(overrides, tokenizer):
    """Beside the layers' inputs: of L layers, the backward holds what one saves (the last one saves less)."""
    options = [*overrides, "global_train_batch_size=4096", "device_train_microbatch_size=4096"]
    options += ["model.model_config.num_hidden_layers=9", "mlm_probability=0.01"]
    run = load(QUICKSTART, [*options, "model.gradient_checkpointing=true"])
    model = models.build_model(run, tokenizer)
    batch = fullest_batch(tokenizer, 0.01, 2, 32)
    (part,) = split_unpadded(batch, 2)
    inputs = saved_bytes(model, lambda: model(part))
    layer = model.model.bert.encoder.layer[0]
    x, layout, slopes = torch.randn(64, 24, requires_grad=True), Layout.from_batch(part), alibi_slopes(3)
    one = saved_bytes(layer, lambda: layer(x, layout, slopes))
    assert shown_gib(options[:-1] + ["mlm_probability=0.01", "model.gradient_checkpointing=true"], tokenizer) == (
        pytest.approx(4096 / 2 * (inputs + one) / 2**30, rel=0.1)
    )


@pytest.mark.parametrize(
    ("name", "card"), [("mosaic_bert", 40), ("mosaic_bert_fast", 40), ("continue_512", 40), ("mosaic_bert_large", 48)]
)
def test_a_shipped_microbatch_fits_the_card_that_its_comment_names(name, card):
    run, path = load(f"yamls/{name}.yaml", []), ROOT / "yamls" / f"{name}.yaml"
    (line,) = (x for x in path.read_text().splitlines() if x.startswith("device_train_microbatch_"))
    assert f"for cards of {card} GB and more" in line
    shape = {**(run.model.options.get("model_config") or {}), "vocab_size": 30528}
    config = MosaicBertConfig(**shape)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in BertForMaskedLM(config).parameters())
    T = run.device_train_microbatch_tokens or run.device_train_microbatch_size * run.max_seq_len
    saved = kernels_saved_bytes(config, T, math.ceil(highest_rate(run) * T))
    assert 18 * parameters + saved < 0.9e9 * card
