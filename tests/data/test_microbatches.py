"""Padded batch -> microbatches."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from src.attention_tiles import tile_tables
from src.bert_padding import Layout
from src.data.microbatches import (
    MaskedCount,
    SplittingCollator,
    counts_of,
    fullest_batch,
    num_samples,
    num_tokens,
    split_padded,
    split_unpadded,
)
from src.data.packing import SplitBatch
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
        mask = batch["attention_mask"][rows].bool()
        order = sorted(range(len(mask)), key=lambda row: -int(mask[row].sum()))
        ids, labels = (
            torch.cat([batch[name][rows][row][mask[row]] for row in order]) for name in ("input_ids", "labels")
        )
        assert torch.equal(part["input_ids"], ids.int()) and part["input_ids"].dtype == torch.int32
        unpadded_labels = torch.full_like(labels, IGNORED)
        unpadded_labels[part["masked_index"]] = part["labels"]
        assert torch.equal(unpadded_labels, labels)
        assert part["cu_seqlens"].dtype == torch.int32
        got = part["cu_seqlens"].diff().tolist()
        assert got == sorted(LENGTHS[rows], reverse=True) and part["max_seqlen"] == max(got)
        assert part["cu_seqlens"][0] == 0 and part["squares"] == sum(length**2 for length in got)
        assert (part["num_tokens"], part["num_masked"]) == (sum(got), len(part["labels"]))
        assert all(type(value) is int for name, value in vars(part.counts).items() if name != "stream_tokens")
        assert num_tokens(part) == {"total": sum(got), "loss_generating": len(part["labels"])}
    assert num_tokens(batch)["loss_generating"] == sum(p["num_masked"] for p in parts)
    assert num_samples(batch) == 5


def test_microbatches_within_a_budget_of_tokens():
    """Both limits hold, and each token and label is in one microbatch."""
    batch = batch_of(LENGTHS)
    parts = split_unpadded(batch, 2, tokens=40)
    assert sorted((p["num_samples"], p["num_tokens"]) for p in parts) == [(1, 30), (2, 19), (2, 35)]
    for name in ("num_tokens", "num_masked"):
        assert sum(p[name] for p in parts) == sum(p[name] for p in split_unpadded(batch, 5))


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
        counts = [MaskedCount(count) for count in masked]
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
    assert len(parts[1]["input_ids"].flatten()) == 2  # it is computed all the same
    assert parts.counts.positions == 90


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


@pytest.mark.parametrize("split", [split_padded, partial(split_unpadded, tables_of=tile_tables)])
def test_a_batch_is_one_buffer(split):
    """Each tensor is a view that begins where a tensor of its own may begin; pinning and copying move the buffer."""
    parts = split(batch_of(LENGTHS), 2)
    for part in parts:
        for view in [*part.values.values(), *part["tables"].values()]:
            if isinstance(view, torch.Tensor):
                assert view.untyped_storage().data_ptr() == parts.packed.untyped_storage().data_ptr()
                assert view.data_ptr() % 16 == 0 and view.is_contiguous()
        moved = part.to("meta")
        assert moved.packed.is_meta and moved["labels"].is_meta and moved["labels"].shape == part["labels"].shape
        assert copy.deepcopy(part) is part
    assert sum(part.packed.nbytes for part in parts) == parts.packed.nbytes


def test_the_pin_memory_thread_pins_one_buffer(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *device: pinned.append(self) or self.clone())
    parts = split_unpadded(batch_of(LENGTHS), 2)
    (got,) = pin_memory([parts])
    assert len(pinned) == 1 and pinned[0] is parts.packed and isinstance(got, SplitBatch)
    for part, want in zip(got, parts, strict=True):
        assert torch.equal(part["input_ids"], want["input_ids"])
        assert part.packed.untyped_storage().data_ptr() == got.packed.untyped_storage().data_ptr()


def loaded(num_workers, **options):
    """Two epochs of seven samples in batches of three, the last one smaller, in microbatches of two."""
    samples = [batch_of([length], 0.5) for length in (5, 30, 12, 30, 7, 9, 11)]
    collate = SplittingCollator(padded, split_unpadded, 2)
    loader = DataLoader(samples, 3, collate_fn=collate, num_workers=num_workers, **options)  # pyright: ignore
    return [batch for _ in range(2) for batch in loader]


def padded(samples):
    S = max(x["input_ids"].shape[1] for x in samples)
    return {name: torch.cat([F.pad(x[name], (0, S - x[name].shape[1])) for x in samples]) for name in samples[0]}


@pytest.mark.parametrize("options", [{}, {"persistent_workers": True, "prefetch_factor": 4}])
def test_workers_split_as_the_main_process_does(options):
    want, got = loaded(0), loaded(2, **options)
    assert [len(batch) for batch in got] == [2, 2, 1] * 2
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a.packed, b.packed) and a.plans == b.plans and a.counts == b.counts
        assert b.packed.is_shared()  # one file per batch, whatever the number of microbatches


def test_a_compiled_model_reads_microbatches_in_one_graph():
    def forward(part):
        return part["input_ids"].sum() + part["labels"].sum() + part["max_seqlen"] + part["tables"][64].sum()

    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(forward, backend=counter, fullgraph=True)
    for lengths in ([5, 30, 12], [7, 31, 4, 2], [9, 22, 70]):
        (part,) = split_unpadded(batch_of(lengths, 0.5), 4, tile_tables)
        assert compiled(part) == forward(part)
    assert counter.frame_count <= 2  # for the first sizes, then for any


def test_tokens_of_each_stream_are_counted_without_fillers():
    batch = {**batch_of([5, 30, 2, 7]), "stream": torch.tensor([[2], [0], [0], [2]])}
    batch["filler"] = torch.tensor([[False], [False], [True], [False]])
    for split in (split_padded, split_unpadded):
        assert split(batch, 3).counts.stream_tokens == counts_of(batch).stream_tokens == {0: 30, 1: 0, 2: 12}
