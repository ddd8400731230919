"""Damaged and impossible data: each ends in one clear message, none hangs or ends an epoch early unsaid."""

import gc
import json
import os
import re
import shutil
import signal
import time

import pytest
import torch
from streaming import MDSWriter
from streaming.base.hashing import get_hash

import convert_c4
from src.common.errors import DataError
from src.data.masking import MaskingCollator
from src.data.microbatches import split_unpadded
from src.data_c4 import ExactEvalDataset, StreamingC4, build_dataloader
from tests.conftest import MAX_SEQ_LEN


@pytest.fixture
def shards(documents, tokenizer_folder, tmp_path):
    """A split of several small shards."""
    (tmp_path / "a.txt").write_text("\n".join(documents[:120]))
    tokens = ["--tokenizer", tokenizer_folder, "--max_seq_len", str(MAX_SEQ_LEN), "--size_limit", "4kb"]
    convert_c4.main(["--out_root", str(tmp_path), "--splits", "val", "--source", str(tmp_path / "a.txt"), *tokens])
    assert len(list((tmp_path / "val").glob("shard*"))) > 4
    return tmp_path / "val"


def open_dataset(folder, tokenizer, **options):
    return StreamingC4(tokenizer, MAX_SEQ_LEN, local=str(folder.parent), split=folder.name, **options)


def remove(folder):
    (folder / "shard.00002.mds").unlink()


def truncate(folder):
    path = folder / "shard.00002.mds"
    path.write_bytes(path.read_bytes()[:-7])


def empty(folder):
    (folder / "shard.00002.mds").write_bytes(b"")


def swap(folder):
    a, b = folder / "shard.00002.mds", folder / "shard.00003.mds"
    assert a.stat().st_size != b.stat().st_size
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)


def edit_index(change):
    def edit(folder):
        index = json.loads((folder / "index.json").read_text())
        change(index)
        (folder / "index.json").write_text(json.dumps(index))

    return edit


def half_an_index(folder):
    path = folder / "index.json"
    path.write_text(path.read_text()[:100])


def outside(index):
    index["shards"][0]["raw_data"]["basename"] = "../../secret"


def no_index(folder):
    (folder / "index.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, "shard.00002.mds is missing"),
        (truncate, r"shard.00002.mds has [\d,]+ bytes, not [\d,]+"),
        (empty, "shard.00002.mds has 0 bytes"),
        (swap, "shard.00002.mds has .*; shard.00003.mds has"),
        (half_an_index, "index.json is broken"),
        (edit_index(lambda index: index.pop("shards")), "index.json is broken"),
        (edit_index(outside), "names '../../secret', outside its folder"),
        (edit_index(lambda index: index["shards"].clear()), "is an empty dataset"),
        (no_index, r"holds no dataset \(no index.json\); make one with convert_c4.py"),
        (shutil.rmtree, "holds no dataset"),
    ],
)
def test_damage_is_found_before_the_first_step(damage, message, shards, tokenizer):
    open_dataset(shards, tokenizer)
    damage(shards)
    with pytest.raises(DataError, match=message):
        open_dataset(shards, tokenizer)


def change_a_byte(folder):
    path = folder / "shard.00002.mds"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("verify", "message"), [("hash", "shard.00002.mds has other bytes"), ("size", None)])
def test_changed_bytes_are_found_by_their_hash(verify, message, shards, tokenizer):
    open_dataset(shards, tokenizer, verify=verify)
    change_a_byte(shards)
    if message is None:
        open_dataset(shards, tokenizer, verify=verify)  # of the same size: only reading it all would tell
        return
    with pytest.raises(DataError, match=message):
        open_dataset(shards, tokenizer, verify=verify)


def test_shards_swapped_with_their_sizes_are_found_by_their_hash(shards, tokenizer):
    a, b = shards / "shard.00002.mds", shards / "shard.00003.mds"
    size = min(a.stat().st_size, b.stat().st_size)
    index = json.loads((shards / "index.json").read_text())
    for path in (a, b):  # as if both had been written with one size
        path.write_bytes(path.read_bytes()[:size])
    for info in (shard["raw_data"] for shard in index["shards"]):
        if info["basename"] in (a.name, b.name):
            info["bytes"] = size
            info["hashes"]["sha1"] = get_hash("sha1", (shards / info["basename"]).read_bytes())
    (shards / "index.json").write_text(json.dumps(index))
    open_dataset(shards, tokenizer, verify="hash")
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)
    with pytest.raises(DataError, match="shard.00002.mds has other bytes.*; shard.00003.mds has other bytes"):
        open_dataset(shards, tokenizer, verify="hash")


def test_hashes_that_are_not_there_cannot_be_compared(shards, tokenizer):
    edit_index(lambda index: index["shards"][1]["raw_data"].update(hashes={}))(shards)
    open_dataset(shards, tokenizer)
    with pytest.raises(DataError, match="has no hashes to compare"):
        open_dataset(shards, tokenizer, verify="hash")


def test_off_looks_at_no_shard(shards, tokenizer):
    remove(shards)
    open_dataset(shards, tokenizer, verify="off")


@pytest.mark.parametrize("verify", ["hash", "size"])
def test_a_shard_that_arrives_changed(verify, shards, tokenizer, tmp_path):
    """Fetched with hashes on, it stops the run; else nobody can know."""
    change_a_byte(shards)
    cache = {"local": str(tmp_path / f"cache-{verify}"), "remote": str(shards.parent), "split": "val"}
    dataset = StreamingC4(tokenizer, MAX_SEQ_LEN, **cache, verify=verify, batch_size=4, download_retry=1)
    loader = build_dataloader(dataset, MaskingCollator(tokenizer, 0.15, 1), 4)
    if verify == "size":
        assert len(list(loader)) > 0
        return
    with pytest.raises(DataError, match="shard.00002.mds cannot be read or fetched .*[Cc]hecksum"):
        list(loader)


def test_a_loader_that_waits_in_vain_says_so(shards, tokenizer, monkeypatch):
    """Its worker sleeps: the time-out ends the run with what to change."""
    monkeypatch.setattr(MaskingCollator, "__call__", lambda self, samples: time.sleep(60))
    loader = build_dataloader(
        open_dataset(shards, tokenizer, batch_size=4), MaskingCollator(tokenizer, 0.15, 1), 4, 1, timeout=2
    )
    with pytest.raises(DataError, match="no batch came: .*timed out after 2 seconds; raise the loader's 'timeout'"):
        next(iter(loader))


def test_a_worker_that_is_killed_is_told_from_a_slow_one(shards, tokenizer, monkeypatch):
    monkeypatch.setattr(MaskingCollator, "__call__", lambda self, samples: os.kill(os.getpid(), signal.SIGKILL))
    loader = build_dataloader(
        open_dataset(shards, tokenizer, batch_size=4), MaskingCollator(tokenizer, 0.15, 1), 4, 1, timeout=5
    )
    with pytest.raises(DataError, match="no batch came: DataLoader worker .*; a worker died"):
        next(iter(loader))


def test_an_error_of_this_code_in_a_worker_stays_what_it_is(shards, tokenizer, monkeypatch):
    def fail(self, samples):
        raise RuntimeError("a fault of this code: timed out")

    monkeypatch.setattr(MaskingCollator, "__call__", fail)
    loader = build_dataloader(
        open_dataset(shards, tokenizer, batch_size=4), MaskingCollator(tokenizer, 0.15, 1), 4, 1, timeout=5
    )
    with pytest.raises(RuntimeError, match="a fault of this code"):
        next(iter(loader))


def test_many_faults_are_counted(shards, tokenizer):
    for path in shards.glob("shard*"):
        path.unlink()
    with pytest.raises(DataError, match=r"is missing; .* and \d+ more"):
        open_dataset(shards, tokenizer)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("evaluation", [False, True])
def test_a_shard_lost_while_running_stops_the_run(num_workers, evaluation, shards, tokenizer):
    dataset = open_dataset(shards, tokenizer, batch_size=4)
    samples = ExactEvalDataset(dataset, 4, rank=0, world_size=1) if evaluation else dataset
    loader = build_dataloader(samples, MaskingCollator(tokenizer, 0.15, 1), 4, num_workers, timeout=20)
    remove(shards)
    # A worker may wait on another that has failed; then the loader's time-out ends the run.
    errors, message = (DataError, "shard.00002.mds cannot be read or fetched")
    if num_workers:
        errors, message = (DataError, RuntimeError), f"{message}|timed out after 20 seconds"
    with pytest.raises(errors, match=message):
        for _ in loader:
            pass


def test_a_remote_that_lost_a_shard(shards, tokenizer, tmp_path):
    remove(shards)
    dataset = StreamingC4(
        tokenizer,
        MAX_SEQ_LEN,
        local=str(tmp_path / "cache"),
        remote=str(shards.parent),
        split="val",
        batch_size=4,
    )
    loader = build_dataloader(dataset, MaskingCollator(tokenizer, 0.15, 1), 4)
    with pytest.raises(DataError, match="shard.00002.mds cannot be read or fetched"):
        for _ in loader:
            pass


def cached(folder, tokenizer, local, **options):
    """All samples of a dataset that is streamed through a cache."""
    place = {"local": str(local), "remote": str(folder.parent), "split": folder.name}
    dataset = StreamingC4(tokenizer, MAX_SEQ_LEN, **place, batch_size=4, **options)
    return dataset, [dataset[i]["input_ids"].tolist() for i in range(dataset.size)]


@pytest.mark.parametrize(
    ("damage", "verify", "message"),
    [
        (truncate, "size", r"shard.00002.mds has [\d,]+ bytes, not [\d,]+. Downloading"),
        (
            change_a_byte,
            "hash",
            "shard.00002.mds has other bytes than when it was written. Downloading",
        ),
    ],
)
def test_a_damaged_shard_in_the_cache_is_fetched_again_at_the_start(
    damage, verify, message, shards, tokenizer, tmp_path, caplog
):
    dataset, want = cached(shards, tokenizer, tmp_path / "cache")
    del dataset  # streaming allows one dataset per cache
    gc.collect()
    damage(tmp_path / "cache" / "val")
    _, got = cached(shards, tokenizer, tmp_path / "cache", verify=verify)
    assert got == want and re.search(message, caplog.text)


@pytest.mark.parametrize("damage", [truncate, empty])
def test_a_shard_that_is_damaged_in_the_cache_while_running_is_fetched_again_once(
    damage, shards, tokenizer, tmp_path, caplog
):
    dataset, want = cached(shards, tokenizer, tmp_path / "cache")
    shard_id = next(i for i, shard in enumerate(dataset.shards) if "00002" in shard.raw_data.basename)
    last = int(dataset.shard_offset_per_stream[0] + dataset.samples_per_shard[: shard_id + 1].sum()) - 1
    damage(tmp_path / "cache" / "val")
    assert dataset[last]["input_ids"].tolist() == want[last]
    assert "shard.00002.mds in the cache is damaged" in caplog.text
    damage(tmp_path / "cache" / "val")
    dataset.open_shards.files.clear()
    with pytest.raises(DataError, match="shard.00002.mds"):
        dataset[last]


def test_columns_of_something_else(tokenizer, tmp_path):
    with MDSWriter(out=str(tmp_path / "val"), columns={"image": "bytes", "label": "int"}) as writer:
        writer.write({"image": b"x", "label": 1})
    with pytest.raises(DataError, match=r"no column 'text' \(image, label\)"):
        open_dataset(tmp_path / "val", tokenizer)


def test_a_document_of_one_character_and_of_none_known(tokenizer, tmp_path):
    """Shortest samples that can be: they train, with nothing or little masked."""
    with MDSWriter(out=str(tmp_path / "val"), columns={"text": "str"}) as writer:
        for text in ("a", "☃", "", " "):
            writer.write({"text": text})
    dataset = open_dataset(tmp_path / "val", tokenizer)
    assert [len(dataset[i]["input_ids"]) for i in range(4)] == [3, 3, 2, 2]
    batch = MaskingCollator(tokenizer, 0.99, seed=1)([dataset[i] for i in range(4)])
    assert (batch["labels"] >= 0).sum(dim=1).tolist() == [1, 0, 0, 0]
    assert sum(part["num_tokens"] for part in split_unpadded(batch, 1)) == 10
    assert torch.equal(batch["attention_mask"].sum(1), torch.tensor([3, 3, 2, 2]))
