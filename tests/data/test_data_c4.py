"""Samples: their ids, order, mixture and epochs; evaluation; the script."""

import gc
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from streaming.base.batching.random import generate_work_random_batching

from src import data_c4
from src.common.errors import DataError
from src.data.cutting import TextEncoder, encode_crop
from src.data.index import LENGTHS
from src.data.masking import MaskingCollator
from src.data.order import group_lengths, occurrences
from src.data.source import Source
from src.data.tokenizer import load_tokenizer
from src.data_c4 import ExactEvalDataset, StreamingC4
from tests.conftest import MAX_SEQ_LEN, TRAIN, VALIDATION

SAMPLES = TRAIN + VALIDATION


@pytest.fixture
def collate(tokenizer):
    return MaskingCollator(tokenizer, 0.3, seed=17)


def test_text_and_token_shards_give_the_same_samples_and_masks(
    text_shards, token_shards, opened, tokenizer, collate, documents
):
    text, tokens = opened(text_shards, "val"), opened(token_shards, "val")
    assert text.size == tokens.size == VALIDATION
    for i in range(VALIDATION):
        want = tokenizer(documents[TRAIN + i], truncation=True, max_length=MAX_SEQ_LEN)["input_ids"]
        for dataset in (text, tokens):
            assert dataset[i]["input_ids"].tolist() == want and dataset[i]["sample_id"] == i
    a, b = (collate([dataset[i] for i in range(VALIDATION)]) for dataset in (text, tokens))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epochs_count_up_in_workers_too(num_workers, token_shards, opened):
    dataset = opened(token_shards, "val", shuffle=True, batch_size=8, num_canonical_nodes=1)
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, collate_fn=list, num_workers=num_workers)
    orders = []
    for epoch in range(2):
        samples = [sample for batch in loader for sample in batch]
        assert {sample["epoch"] for sample in samples} == {epoch}
        orders.append([sample["sample_id"] for sample in samples])
    assert set(orders[0]) == set(orders[1]) == set(range(VALIDATION)) and orders[0] != orders[1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [4, 16, 100])
def test_evaluation_sees_each_sample_once(world_size, num_workers, batch_size, token_shards, opened, tokenizer):
    dataset = opened(token_shards, "val")
    batches = []
    for rank in range(world_size):
        once = ExactEvalDataset(dataset, batch_size, rank, world_size)
        loader = torch.utils.data.DataLoader(once, batch_size=batch_size, collate_fn=list, num_workers=num_workers)
        batches.append(list(loader))
        assert len(batches[-1]) == len(loader)
    assert len({len(b) for b in batches}) == 1  # else ranks wait for each other
    samples = [s for rank in batches for batch in rank for s in batch]
    ids = [s["sample_id"] for s in samples if s["sample_id"] >= 0]
    assert sorted(ids) == list(range(VALIDATION))
    fillers = [s for s in samples if s["sample_id"] < 0]
    assert len(fillers) == -VALIDATION % world_size
    assert all(s["input_ids"].tolist() == [tokenizer.cls_token_id, tokenizer.sep_token_id] for s in fillers)


# Random crops


def test_random_crop_moves_with_sample_and_epoch_except_in_evaluation(text_shards, opened, tokenizer, documents):
    dataset = opened(text_shards, shuffle=True, num_canonical_nodes=1, batch_size=20, moving_crop=True)
    encoder = TextEncoder.of(tokenizer)
    epochs = [{sample["sample_id"]: sample["input_ids"].tolist() for sample in dataset} for _ in range(3)]
    for epoch, samples in enumerate(epochs):
        for i, ids in samples.items():
            want = encode_crop(encoder, documents[i], MAX_SEQ_LEN - 2, i + epoch)
            assert ids == [tokenizer.cls_token_id, *want, tokenizer.sep_token_id]
    longer = [i for i in range(TRAIN) if len(epochs[0][i]) == MAX_SEQ_LEN]
    assert np.mean([epochs[0][i] != epochs[1][i] for i in longer]) > 0.9  # a few texts repeat themselves
    for i, sample in enumerate(ExactEvalDataset(dataset, 20, rank=0, world_size=1)):  # after three epochs of training
        want = tokenizer(documents[i], truncation=True, max_length=MAX_SEQ_LEN)["input_ids"]
        assert sample["input_ids"].tolist() == want and sample["epoch"] == 0


# Mixing


@pytest.fixture
def mixed(text_shards, token_shards, tokenizer):
    """Opens a mixture of the validation samples as tokens and the training samples as text, of given weights."""

    def mixed(of_tokens, of_text, **options):
        tokens, text = Source(token_shards, split="val", **of_tokens), Source(text_shards, split="train", **of_text)
        options = {"shuffle": True, "batch_size": 8, "num_canonical_nodes": 1, **options}
        return StreamingC4(tokenizer, MAX_SEQ_LEN, sources={"tokens": tokens, "text": text}, **options)

    return mixed


@pytest.mark.parametrize(
    ("weights", "draws"),
    [
        (({}, {}), (VALIDATION, TRAIN)),
        (({"proportion": 3}, {"proportion": 1}), (0.75 * SAMPLES, 0.25 * SAMPLES)),
        (({"repeat": 2.5}, {"choose": 10}), (2.5 * VALIDATION, 10)),
    ],
)
def test_datasets_are_mixed_by_weight(weights, draws, mixed, opened, text_shards, token_shards):
    dataset = mixed(*weights)
    samples = list(dataset)
    drawn = np.bincount([sample["stream"] for sample in samples])
    assert abs(drawn - draws).max() <= 1 and drawn.sum() == dataset.epoch_size  # a proportion is rounded at random
    assert dataset.shares == pytest.approx({"tokens": drawn[0] / drawn.sum(), "text": drawn[1] / drawn.sum()})
    alone = [(opened(token_shards, "val"), 0), (opened(text_shards), VALIDATION)]
    for sample in samples:
        part, first = alone[sample["stream"]]
        want = part[sample["sample_id"] % dataset.size - first]["input_ids"]
        assert np.array_equal(sample["input_ids"], want)


def test_random_crop_of_token_shards_is_refused(mixed):
    with pytest.raises(DataError, match=r"val holds tokens: what --pack truncate cut off is not there.*moving_crop"):
        mixed({}, {}, moving_crop=True)


def test_each_draw_of_a_sample_is_masked_differently(mixed, collate):
    dataset = mixed({"repeat": 3}, {"repeat": 0.5})
    epochs = [list(dataset), list(dataset)]
    for epoch, samples in enumerate(epochs):
        ids = [sample["sample_id"] for sample in samples]
        assert len(set(ids)) == len(ids) == 3 * VALIDATION + TRAIN // 2 and {sample["epoch"] for sample in samples} == {
            epoch
        }
        of_one = sorted((s for s in samples if s["sample_id"] % SAMPLES == 7), key=lambda s: s["sample_id"])
        assert [s["sample_id"] for s in of_one] == [7, 7 + SAMPLES, 7 + 2 * SAMPLES]
        labels = collate(of_one)["labels"]
        assert not torch.equal(labels[0], labels[1]) and not torch.equal(labels[1], labels[2])
    halves = [{s["sample_id"] for s in samples if s["stream"] == 1} for samples in epochs]
    assert halves[0] != halves[1]  # another half each epoch


@pytest.mark.parametrize("num_workers", [0, 2])
def test_masks_of_repeats_do_not_depend_on_workers(num_workers, mixed, collate):
    dataset = mixed({"repeat": 2}, {}, shuffle=False, batch_size=10)
    batches = list(data_c4.build_dataloader(dataset, collate, 10, num_workers))
    first, again, text = range(VALIDATION), range(SAMPLES, SAMPLES + VALIDATION), range(VALIDATION, SAMPLES)
    samples = [dataset[i] for i in [*first, *again, *text]]  # shard after shard
    for i, batch in enumerate(batches):
        want = collate(samples[10 * i : 10 * i + 10])
        assert all(torch.equal(batch[name], want[name]) for name in want)
    assert sum(len(batch["labels"]) for batch in batches) == 2 * VALIDATION + TRAIN


def test_occurrences_are_counted_per_id():
    ids = np.array([7, 5, 7, 7, 0, 5])
    assert occurrences(ids).tolist() == [0, 0, 1, 2, 0, 1]


def test_each_mixed_dataset_is_checked(text_shards, token_shards, tokenizer, tokenizer_folder, tmp_path):
    def open_with(other, tokenizer=tokenizer, max_seq_len=MAX_SEQ_LEN):
        StreamingC4(tokenizer, max_seq_len, sources={"a": Source(text_shards, split="val"), "b": other})

    tokens = Source(token_shards, split="val")
    with pytest.raises(DataError, match="nothing holds no dataset .*splits there: train, val"):
        open_with(Source(text_shards, split="nothing"))
    with pytest.raises(DataError, match="up to 32 tokens and max_seq_len is 64"):
        open_with(tokens, max_seq_len=64)
    other = load_tokenizer(tokenizer_folder)
    other.add_tokens(["naloxone"])
    with pytest.raises(DataError, match="another tokenizer"):
        open_with(tokens, other)
    shutil.copytree(Path(token_shards) / "val", tmp_path / "damaged")
    next(tmp_path.glob("damaged/*.mds")).write_bytes(b"short")
    with pytest.raises(DataError, match="damaged: shard.00000.mds has 5 bytes"):
        open_with(Source(str(tmp_path), split="damaged"))


# Grouping by length

GROUPED = {"shuffle": True, "num_canonical_nodes": 1, "length_window": 3}


@pytest.fixture
def with_lengths(token_shards, tmp_path):
    """The training documents and their lengths."""
    shutil.copytree(Path(token_shards) / "train", tmp_path / "train")
    return tmp_path, np.fromfile(tmp_path / "train" / LENGTHS, "<u2")


def global_batches(dataset, batch, nodes, ranks, workers, first=0, epoch=0):
    """Sample ids of an epoch from sample ``first`` on, in the order of training: (steps, ranks of all nodes, B)."""
    dataset.batch_size, dataset.num_ranks = batch // (nodes * ranks), nodes * ranks
    dataset.shuffle_block_size, dataset.initial_physical_nodes = 1 << 18, None
    world = SimpleNamespace(num_nodes=nodes, ranks_per_node=ranks, workers_per_rank=workers)
    work = generate_work_random_batching(dataset, world, epoch, first)  # (nodes, ranks, workers, batches, B)
    return work.transpose(3, 2, 0, 1, 4).reshape(-1, nodes * ranks, dataset.batch_size)


@pytest.mark.parametrize("canonical", [1, 4])
def test_grouped_batches_are_the_same_for_any_number_of_processes(canonical, with_lengths, opened):
    folder, lengths = with_lengths
    options = {**GROUPED, "num_canonical_nodes": canonical}
    dataset = opened(folder, **options)
    want = global_batches(dataset, 24, 1, 1, 1)
    whole = want[: TRAIN // 24]
    assert np.unique(whole).size == whole.size == 288 and set(want.ravel()) == {-1, *range(TRAIN)}
    plain = global_batches(opened(folder, **{**options, "length_window": 0}), 24, 1, 1, 1)
    for window in range(0, 12, 3):  # a window holds what streaming's shuffle put there
        assert set(want[window : window + 3].ravel()) == set(plain[window : window + 3].ravel())
    assert np.ptp(lengths[whole], axis=(1, 2)).mean() < 0.6 * np.ptp(lengths[plain[:12]], axis=(1, 2)).mean()
    for nodes, ranks, workers in ((1, 2, 1), (2, 1, 3), (4, 2, 2), (1, 3, 2)):
        got = global_batches(dataset, 24, nodes, ranks, workers)
        assert all(set(a.ravel()) == set(b.ravel()) for a, b in zip(got[:12], whole, strict=True))
        resumed = global_batches(dataset, 24, nodes, ranks, workers, first=5 * 24)
        assert all(set(a.ravel()) == set(b.ravel()) for a, b in zip(resumed[:7], whole[5:], strict=True))
    other = global_batches(dataset, 24, 1, 1, 1, epoch=1)
    assert not np.array_equal(other[:12], whole) and np.unique(other[:12]).size == 288


@pytest.mark.parametrize("other", [{"epoch": 1}, {"shuffle_seed": 1}], ids=str)
def test_windows_and_the_order_in_them_change_with_epoch_and_seed(other, with_lengths, opened):
    folder, lengths = with_lengths

    def grouped(epoch=0, **seed):
        dataset = opened(folder, **{**GROUPED, "length_window": 6}, **seed)
        return global_batches(dataset, 24, 1, 1, 1, epoch=epoch)[:12].reshape(2, 6, 24)

    first, second = grouped(), grouped(**other)
    assert set(first[0].ravel()) != set(second[0].ravel())
    ranks = [lengths[windows].mean(axis=2).argsort(axis=1) for windows in (first, second)]
    assert not np.array_equal(*ranks)


def test_batches_of_a_window_are_permuted():
    """Else each window would begin with its shortest samples."""
    lengths = np.random.default_rng(0).integers(3, 500, 480)
    orders = [group_lengths(lengths, 1, 16, 30, np.random.default_rng(seed)).reshape(30, 16) for seed in (1, 2)]
    assert not np.array_equal(*orders)
    for order in orders:
        shortest = lengths[order].min(axis=1)
        assert (np.diff(lengths[order]) >= 0).all() and (np.diff(shortest) < 0).any()


def test_grouping_balances_the_tokens_of_ranks(with_lengths, opened):
    folder, lengths = with_lengths
    spread = {}
    for window in (0, 4):
        batches = global_batches(opened(folder, **{**GROUPED, "length_window": window}), 24, 1, 4, 1)[:12]
        tokens = lengths[batches].sum(axis=2)  # (steps, ranks)
        spread[window] = np.mean(tokens.max(axis=1) / tokens.mean(axis=1))
        if window:  # ranks take from the sorted batch in turn: they differ by at most its range of lengths
            assert (np.ptp(tokens, axis=1) <= np.ptp(lengths[batches], axis=(1, 2))).all()
    assert spread[4] - 1 < 0.5 * (spread[0] - 1)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("option", [{"length_window": 3}, {"moving_crop": True}], ids=str)
def test_epoch_resumes_where_it_stopped(option, num_workers, with_lengths, text_shards, opened, collate):
    folder = with_lengths[0] if "length_window" in option else text_shards

    def loader(workers):
        dataset = opened(folder, shuffle=True, num_canonical_nodes=2, batch_size=20, **option)
        return dataset, data_c4.build_dataloader(dataset, collate, 20, workers)

    dataset, whole = loader(0)
    _, want = list(whole), list(whole)  # the second epoch
    state = dataset.state_dict(4 * 20, True)
    del dataset, whole
    gc.collect()
    dataset, rest = loader(num_workers)
    dataset.load_state_dict(state)
    got = list(rest)
    assert len(want) == -(-TRAIN // 20) and len(got) == len(want) - 4
    assert all(torch.equal(a[name], b[name]) for a, b in zip(got, want[4:], strict=True) for name in a)


def test_more_canonical_nodes_than_samples_are_refused(token_shards, opened):
    """Only if the samples are shuffled; streaming would raise an error at the first step."""
    options = {"split": "val", "batch_size": 8}
    with pytest.raises(DataError, match=f"num_canonical_nodes: expected at most the {VALIDATION} .*, got 1,000"):
        opened(token_shards, **options, shuffle=True, num_canonical_nodes=1000)
    for shuffle, nodes in ((True, VALIDATION), (False, 1000)):
        dataset = opened(token_shards, **options, shuffle=shuffle, num_canonical_nodes=nodes)
        assert {sample["sample_id"] for sample in dataset} == set(range(VALIDATION))


def test_grouping_without_lengths_is_refused(with_lengths, text_shards, opened):
    with pytest.raises(DataError, match="holds text, whose lengths in tokens are not known"):
        opened(text_shards, **GROUPED)
    folder, _ = with_lengths
    path = folder / "train" / LENGTHS
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=f"lengths.bin has {TRAIN - 1} lengths for {TRAIN} samples"):
        opened(folder, **GROUPED)
    path.unlink()
    with pytest.raises(DataError, match="train: lengths.bin is missing. Convert again"):
        opened(folder, **GROUPED)


def test_lengths_are_fetched_into_the_cache(with_lengths, opened, tmp_path):
    folder, lengths = with_lengths
    dataset = opened(tmp_path / "cache", remote=str(folder), **GROUPED, batch_size=20)
    assert np.array_equal(dataset.lengths[0], lengths) and len(list(dataset)) == TRAIN


# Script


def test_script_prints_what_training_sees(token_shards, tmp_path, capsys):
    shards = str(tmp_path / "shards")
    shutil.copytree(token_shards, shards)  # no dataset of this process has the copy open
    command = [sys.executable, data_c4.__file__, shards, str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    data_c4.main([shards, shards])
    for printed in (done.stdout, capsys.readouterr().out):
        assert "[MASK]" in printed and f"{VALIDATION} samples of tokens" in printed
        last = dict(field.split("=") for field in printed.splitlines()[-1].split()[1:])
        assert last["batches"] == "3" and 0 <= float(last["padding_share"]) < 1 and float(last["tokens_per_s"]) > 0


def test_script_refuses_a_missing_tokenizer(token_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["data_c4.py", token_shards, "--tokenizer", str(tmp_path / "none")])
    monkeypatch.setattr(sys, "path", sys.path.copy())  # the script changes it
    with pytest.raises(SystemExit, match="^data_c4.py: .*no such folder"):
        runpy.run_path(data_c4.__file__, run_name="__main__")
