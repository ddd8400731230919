"""Damaged data: each fault ends in one clear message, never in a hang or an epoch that ends early."""

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


def open_dataset(folder, tokenizer, cache=None, **options):
    """Opens a split where it is, or through a cache."""
    local, remote = (str(cache), str(folder.parent)) if cache else (str(folder.parent), None)
    return StreamingC4(tokenizer, MAX_SEQ_LEN, local, remote, folder.name, batch_size=4, **options)


def loader_of(dataset, tokenizer, num_workers=0, **options):
    return build_dataloader(dataset, MaskingCollator(tokenizer, 0.15, 1), 4, num_workers, **options)


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
    a.rename(folder / "a")
    b.rename(a)
    (folder / "a").rename(b)


def change_a_byte(folder):
    path = folder / "shard.00002.mds"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def edit_index(change):
    def edit(folder):
        index = json.loads((folder / "index.json").read_text())
        change(index)
        (folder / "index.json").write_text(json.dumps(index))

    return edit


def swap_hashes(index):
    a, b = (shard["raw_data"] for shard in index["shards"][2:4])
    a["hashes"], b["hashes"] = b["hashes"], a["hashes"]


def remove_all(folder):
    for path in folder.glob("shard*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, "shard.00002.mds is missing"),
        (remove_all, r"is missing; .* and \d+ more"),
        (truncate, r"shard.00002.mds has [\d,]+ bytes, not [\d,]+"),
        (empty, "shard.00002.mds has 0 bytes"),
        (swap, "shard.00002.mds has .*; shard.00003.mds has"),
        (lambda folder: (folder / "index.json").write_text('{"shards": [{"raw'), "index.json is broken"),
        (edit_index(lambda index: index.pop("shards")), "index.json is broken"),
        (
            edit_index(lambda index: index["shards"][0]["raw_data"].update(basename="../x")),
            r"index.json is broken \(shards\[0\].raw_data.basename: expected a file in .*'../x'",
        ),
        (edit_index(lambda index: index["shards"].clear()), "index.json lists no samples"),
        (lambda folder: (folder / "index.json").unlink(), r"holds no dataset \(no index.json\); make one with convert"),
        (shutil.rmtree, "holds no dataset"),
    ],
)
def test_damage_is_found_before_the_first_step(damage, message, shards, tokenizer):
    open_dataset(shards, tokenizer)
    damage(shards)
    with pytest.raises(DataError, match=message):
        open_dataset(shards, tokenizer)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_a_byte, "shard.00002.mds has other bytes"),
        (edit_index(swap_hashes), "shard.00002.mds has other bytes.*; shard.00003.mds has other bytes"),
        (edit_index(lambda index: index["shards"][1]["raw_data"].update(hashes={})), "has no hashes to compare"),
    ],
)
def test_verify_hash_finds_changed_bytes(damage, message, shards, tokenizer):
    open_dataset(shards, tokenizer, verify="hash")
    damage(shards)
    open_dataset(shards, tokenizer, verify="size")
    with pytest.raises(DataError, match=message):
        open_dataset(shards, tokenizer, verify="hash")


def test_verify_off_checks_no_shard(shards, tokenizer):
    remove(shards)
    open_dataset(shards, tokenizer, verify="off")


def wait(collator, samples):
    time.sleep(60)


def die(collator, samples):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(collator, samples):
    raise RuntimeError("a fault of this code: timed out")


@pytest.mark.parametrize(
    ("collate", "error", "message"),
    [
        (wait, DataError, "no batch came: .*timed out after 2 seconds; raise the loader's 'timeout'"),
        (die, DataError, "no batch came: DataLoader worker .*; a worker died"),
        (fail, RuntimeError, "a fault of this code"),
    ],
)
def test_faults_of_a_worker_are_told_apart(collate, error, message, shards, tokenizer, monkeypatch):
    monkeypatch.setattr(MaskingCollator, "__call__", collate)
    with pytest.raises(error, match=message):
        next(iter(loader_of(open_dataset(shards, tokenizer), tokenizer, 1, timeout=2 if collate is wait else 5)))


@pytest.mark.parametrize(("evaluation", "num_workers"), [(False, 0), (True, 0), (True, 2)])  # workers end after 10 s
def test_lost_shard_stops_the_run(num_workers, evaluation, shards, tokenizer):
    dataset = open_dataset(shards, tokenizer)
    samples = ExactEvalDataset(dataset, 4, rank=0, world_size=1) if evaluation else dataset
    loader = loader_of(samples, tokenizer, num_workers, timeout=20)
    remove(shards)
    # A worker may wait for another that has failed; then the loader's time-out ends the run.
    errors, message = (DataError, "shard.00002.mds cannot be read or fetched")
    if num_workers:
        errors, message = (DataError, RuntimeError), f"{message}|timed out after 20 seconds"
    with pytest.raises(errors, match=message):
        list(loader)


def test_lost_remote_shard_stops_the_run(shards, tokenizer, tmp_path):
    remove(shards)
    with pytest.raises(DataError, match="shard.00002.mds cannot be read or fetched"):
        list(loader_of(open_dataset(shards, tokenizer, tmp_path / "cache"), tokenizer))


def cached(folder, tokenizer, cache, **options):
    """A dataset read through a cache, and the ids of its samples."""
    dataset = open_dataset(folder, tokenizer, cache, **options)
    return dataset, [dataset[i]["input_ids"].tolist() for i in range(dataset.size)]


@pytest.mark.parametrize(
    ("damage", "verify", "message"),
    [
        (truncate, "size", r"shard.00002.mds has [\d,]+ bytes, not [\d,]+. Downloading"),
        (change_a_byte, "hash", "shard.00002.mds has other bytes than when it was written. Downloading"),
    ],
)
def test_shard_damaged_in_the_cache_is_fetched_again_at_the_start(
    damage, verify, message, shards, tokenizer, tmp_path, caplog
):
    dataset, want = cached(shards, tokenizer, tmp_path / "cache")
    del dataset  # streaming allows one dataset per cache
    gc.collect()
    damage(tmp_path / "cache" / "val")
    _, got = cached(shards, tokenizer, tmp_path / "cache", verify=verify)
    assert got == want and re.search(message, caplog.text)


@pytest.mark.parametrize("damage", [truncate, empty])
def test_shard_damaged_in_the_cache_while_running_is_fetched_again_once(damage, shards, tokenizer, tmp_path, caplog):
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


def test_compressed_shard_with_changed_bytes_in_the_cache_is_fetched_again_once(tokenizer, tmp_path, caplog):
    with MDSWriter(out=str(tmp_path / "remote" / "val"), columns={"text": "str"}, compression="zstd") as writer:
        for i in range(20):
            writer.write({"text": f"text {i}"})
    (archive,) = (tmp_path / "remote" / "val").glob("*.zstd")
    cache = tmp_path / "cache" / "val"
    cache.mkdir(parents=True)
    sound, changed = archive.read_bytes(), bytearray(archive.read_bytes())
    changed[20:40] = bytes(20)  # the same size
    (cache / archive.name).write_bytes(changed)
    shutil.copy(archive.with_name("index.json"), cache)
    dataset = StreamingC4(tokenizer, 32, str(tmp_path / "cache"), str(tmp_path / "remote"), "val", shuffle=False)
    assert dataset[3]["input_ids"].tolist() == tokenizer("text 3")["input_ids"]
    assert "shard.00000.mds.zstd in the cache is damaged" in caplog.text and archive.read_bytes() == sound


def test_shortest_documents_are_masked_and_split(tokenizer, tmp_path):
    with MDSWriter(out=str(tmp_path / "val"), columns={"text": "str"}) as writer:
        for text in ("a", "☃", "", " "):
            writer.write({"text": text})
    dataset = open_dataset(tmp_path / "val", tokenizer)
    assert [len(dataset[i]["input_ids"]) for i in range(4)] == [3, 3, 2, 2]
    batch = MaskingCollator(tokenizer, 0.99, seed=1)([dataset[i] for i in range(4)])
    assert (batch["labels"] >= 0).sum(dim=1).tolist() == [1, 0, 0, 0]
    assert sum(part["num_tokens"] for part in split_unpadded(batch, 1)) == 10
    assert torch.equal(batch["attention_mask"].sum(1), torch.tensor([3, 3, 2, 2]))
