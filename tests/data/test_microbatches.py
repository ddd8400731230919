"""Padded batch -> microbatches."""

from types import SimpleNamespace

import pytest
import torch

from src.attention_tiles import tile_tables
from src.bert_padding import Layout
from src.data.microbatches import fullest_batch, num_samples, num_tokens, split_padded, split_unpadded
from src.masked_lm_loss import IGNORED
from tests.model.test_bert_layers import batch_of

LENGTHS = [5, 30, 12, 30, 7]


@pytest.mark.parametrize("microbatch_size", [1, 2, 3, 100])
def test_microbatches_hold_the_batch(microbatch_size):
    batch = batch_of(LENGTHS)
    parts = split_unpadded(batch, microbatch_size)
    assert [p["num_samples"] for p in parts] == [min(microbatch_size, 5 - i) for i in range(0, 5, microbatch_size)]
    for i, part in enumerate(parts):
        rows = slice(i * microbatch_size, (i + 1) * microbatch_size)
        ids, labels = batch["input_ids"][rows], batch["labels"][rows]
        S = batch["attention_mask"][rows].sum(1).max()
        flat = part["indices"]
        assert torch.equal(part["input_ids"], ids[:, :S].flatten()[flat])
        assert sorted(flat.tolist()) == batch["attention_mask"][rows, :S].flatten().nonzero().squeeze(1).tolist()
        unpadded_labels = torch.full_like(part["input_ids"], IGNORED)
        unpadded_labels[part["masked_index"]] = part["labels"]
        assert torch.equal(unpadded_labels, labels[:, :S].flatten()[flat])
        assert part["cu_seqlens"].dtype == torch.int32
        got = part["cu_seqlens"].diff().tolist()
        assert got == sorted(LENGTHS[rows], reverse=True) and part["max_seqlen"] == max(got)
        assert (flat[part["cu_seqlens"][:-1].long()] % S == 0).all()  # each begins where a sequence does
        assert (part["num_tokens"], part["num_masked"]) == (sum(got), len(part["labels"]))
        assert all(type(part[k]) is int for k in ("max_seqlen", "num_samples", "num_tokens", "num_masked"))
        assert num_tokens(part) == {"total": sum(got), "loss_generating": len(part["labels"])}
    assert num_tokens(batch)["loss_generating"] == sum(p["num_masked"] for p in parts)
    assert num_samples(batch) == 5


@pytest.mark.parametrize("split", [split_padded, split_unpadded])
def test_microbatches_within_a_budget_of_tokens(split):
    """Both limits hold, and each token and label is in one microbatch."""
    batch = batch_of(LENGTHS)
    parts = split(batch, 2, tokens=40)
    assert sorted((p["num_samples"], p["num_tokens"]) for p in parts) == [(1, 30), (2, 19), (2, 35)]
    for name in ("num_tokens", "num_masked"):
        assert sum(p[name] for p in parts) == sum(p[name] for p in split(batch, 5))


def test_tokens_of_a_padded_batch_do_not_count_padding():
    batch = batch_of(LENGTHS)
    masked = int((batch["labels"] >= 0).sum())
    batch["labels"][batch["labels"] >= 0] = 0  # an id like any other
    assert num_tokens(batch) == {"total": sum(LENGTHS), "loss_generating": masked}
    del batch["labels"]  # a scheduled rate makes them later
    assert num_tokens(batch) == {"total": sum(LENGTHS), "loss_generating": 0}


def test_tile_tables_are_made_on_request():
    for part in split_unpadded(batch_of(LENGTHS), 2, tile_tables):
        want = tile_tables(Layout.from_batch(part))
        assert want and part["tables"].keys() == want.keys()
        assert all(torch.equal(part["tables"][rows], table) for rows, table in want.items())
    assert split_unpadded(batch_of(LENGTHS), 100)[0]["tables"] == {}


def test_batch_without_masked_tokens_weighs_nothing():
    """Composer divides a microbatch's count by that of the global batch, which may have no masked token at all."""
    for masked in ([0, 0], [0, 3]):
        counts = [num_tokens({"num_tokens": 9, "num_masked": count})["loss_generating"] for count in masked]
        assert [count / (sum(masked) / 2) for count in counts] == [0.0, 2.0 * (sum(masked) > 0)]
    parts = split_unpadded(batch_of([2, 2], rate=0.0), 1)
    assert [p["num_masked"] for p in parts] == [0, 0] and len(parts[0]["labels"]) == 0


@pytest.mark.parametrize("split", [split_padded, split_unpadded])
def test_filler_is_not_counted(split):
    batch = batch_of([5, 30, 2])
    filled = {**batch, "filler": torch.tensor([[False], [False], [True]])}
    assert num_samples(filled) == 2 and num_tokens(filled)["total"] == 35
    parts = split(filled, 2)
    assert [part["num_samples"] for part in parts] == [2, 0] and [part["num_tokens"] for part in parts] == [35, 0]
    assert all("filler" not in part for part in parts)
    assert [len(part["input_ids"].flatten()) for part in parts][1] == 2  # it is computed all the same


def test_padded_microbatches_are_as_long_as_their_longest_sequence():
    assert [p["input_ids"].shape for p in split_padded(batch_of([5, 9, 30]), 2)] == [(2, 9), (1, 30)]


@pytest.mark.parametrize("rate", [0.15, 0.3, 0.5])
def test_each_part_of_the_fullest_batch_has_its_share_of_masked_tokens(rate):
    """--validate extrapolates from one and two sequences."""
    tokenizer = SimpleNamespace(mask_token_id=4)
    for B, tokens in ((1, None), (2, None), (50, None), (50, 1001)):
        batch = fullest_batch(tokenizer, rate, B, 32, tokens)
        T = batch["attention_mask"].sum().item()
        assert T == (tokens or B * 32) and (batch["labels"] >= 0).sum() == pytest.approx(rate * T, abs=1)
        assert not (batch["labels"][batch["attention_mask"] == 0] >= 0).any()
