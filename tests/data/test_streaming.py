"""Repairs of mosaicml-streaming; damaged shards are in test_damage.py."""

import contextlib
import gc
import itertools
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from streaming.base.spanner import Spanner

import convert_c4
from src.data import streaming
from src.data.shards import Locator, OpenShards
from src.data.streaming import alone_on_node
from tests.conftest import TRAIN, VALIDATION
from tests.runs import environment, free_port


def test_locator_equals_streamings_spanner():
    sizes = np.array([5, 1, 1030, 3])
    ours, theirs = Locator(sizes), Spanner(sizes)
    assert all(ours[i] == theirs[i] for i in range(1039))
    assert ours[1039 + 6] == theirs[6]


def test_cache_limit_is_kept_and_every_sample_read(text_shards, opened, tmp_path):
    options = ["--source", f"{text_shards}/train", "--size_limit", "8kb", "--num_workers", "1"]
    convert_c4.main(["--out_root", str(tmp_path), "--splits", "small", *options])
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "small").glob("*.mds")}
    largest = max(sizes.values())
    options = {"remote": str(tmp_path), "split": "small", "shuffle": True, "batch_size": 20, "num_canonical_nodes": 1}
    with pytest.raises(ValueError, match="cache_limit: expected at least .* bytes, 4 times the largest shard"):
        opened(tmp_path / "refused", **options, cache_limit=3 * largest)
    with pytest.raises(ValueError, match="cache_limit: expected a number of bytes such as 100gb, got '100 gigs'"):
        opened(tmp_path / "unit", **options, cache_limit="100 gigs")
    cache = tmp_path / "cache"
    dataset = opened(cache, **options, cache_limit=6 * largest)
    assert sum(sizes.values()) > 12 * largest
    for _ in range(2):
        ids = []
        for sample in dataset:
            ids.append(sample["sample_id"])
            here = sum(sizes[path.name] for path in (cache / "small").glob("*.mds"))
            assert here <= 8 * largest  # two threads may each be fetching one that is not counted yet
        assert set(ids) == set(range(TRAIN))


def test_shard_evicted_while_awaited_is_fetched_again(token_shards, opened, tmp_path, monkeypatch):
    """As if it had been fetched and evicted between two looks at its state, each of the first 150 times."""
    dataset = opened(tmp_path / "cache", "val", remote=token_shards, batch_size=20, num_canonical_nodes=1)
    fetch, calls, got = dataset.prepare_shard, itertools.count(), []
    monkeypatch.setattr(dataset, "prepare_shard", lambda *args: next(calls) >= 150 and fetch(*args))
    thread = threading.Thread(target=lambda: got.extend(dataset), daemon=True)
    thread.start()
    thread.join(timeout=20)
    fetch(0)  # if it still waits, so the process can exit
    assert {sample["sample_id"] for sample in got} == set(range(VALIDATION))


TWO_DATASETS = """
import sys
import time
import torch.distributed as dist
from src.data.tokenizer import load_tokenizer
from src.data_c4 import StreamingC4
dist.init_process_group("gloo")
open_lengths = StreamingC4.open_lengths
if dist.get_rank() == 0:
    StreamingC4.open_lengths = lambda *args: time.sleep(2) or open_lengths(*args)
options = {"max_seq_len": 32, "remote": sys.argv[2], "batch_size": 4, "download_timeout": 1}
tokenizer = load_tokenizer(sys.argv[1])
grouped = {"shuffle": True, "num_canonical_nodes": 1, "length_window": 3}
train = StreamingC4(tokenizer, local=sys.argv[3], split="train", **grouped, **options)
val = StreamingC4(tokenizer, local=sys.argv[3], split="val", **options)
print(train.size, val.size)
dist.barrier()
"""


@pytest.mark.slow
def test_two_processes_fetch_lengths_and_make_two_datasets(token_shards, tokenizer_folder, tmp_path):
    """A lock that both take while one waits for the other would hang them. The first takes longer than any timeout."""
    command = [sys.executable, "-c", TWO_DATASETS, tokenizer_folder, token_shards, str(tmp_path / "cache")]
    world = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    environments = [environment(**world, RANK=rank, LOCAL_RANK=rank) for rank in range(2)]
    ranks = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE) for env in environments]
    try:
        assert [rank.communicate(timeout=120)[0].decode() for rank in ranks] == [f"{TRAIN} {VALIDATION}\n"] * 2
    finally:
        for rank in ranks:
            rank.kill()


ONE_DATASET = """
import sys
import torch.distributed as dist
from src.data.tokenizer import load_tokenizer
from src.data_c4 import StreamingC4
dist.init_process_group("gloo")
tokenizer = load_tokenizer(sys.argv[1])
dist.barrier()
print("begins", flush=True)
print(StreamingC4(tokenizer, 32, sys.argv[2], split="val").size)
"""


@pytest.mark.slow
def test_processes_of_a_run_wait_for_another_runs_dataset(token_shards, tokenizer_folder, opened, monkeypatch):
    """This process holds the lock and makes its dataset. The second of the others needs no lock, but must wait too."""
    command = [sys.executable, "-c", ONE_DATASET, tokenizer_folder, token_shards]
    world = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    environments = [environment(**world, RANK=rank, LOCAL_RANK=rank) for rank in range(2)]
    with alone_on_node():
        ranks = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for env in environments]
        assert [rank.stdout.readline() for rank in ranks] == ["begins\n"] * 2
        time.sleep(2)  # long enough to look for a free prefix
        monkeypatch.setattr(streaming, "alone_on_node", contextlib.nullcontext)
        dataset = opened(token_shards, "train")  # of the same split, the second would share the memory of this run
    try:
        assert [rank.communicate(timeout=60)[0] for rank in ranks] == [f"{VALIDATION}\n"] * 2
    finally:
        for rank in ranks:
            rank.kill()
    assert dataset.size == TRAIN


def test_datasets_of_a_node_are_made_in_turn(token_shards, opened):
    made = []
    thread = threading.Thread(target=lambda: made.append(opened(token_shards, "val")), daemon=True)
    with alone_on_node():
        thread.start()
        thread.join(timeout=1)
        assert not made
    thread.join(timeout=20)
    assert made


def test_resume_after_an_epoch_begins_the_next(token_shards, opened):
    options = {"split": "val", "batch_size": 8, "num_canonical_nodes": 1}
    dataset = opened(token_shards, **options)
    list(dataset)
    state = dataset.state_dict(0, True)
    del dataset
    gc.collect()
    dataset = opened(token_shards, **options)
    dataset.load_state_dict(state)
    assert {sample["epoch"] for sample in dataset} == {1}


def test_evicted_shard_is_closed(tmp_path, token_shards):
    shards = []
    for i in range(3):
        shards.append(str(tmp_path / f"{i}.mds"))
        shutil.copy(next(Path(token_shards).glob("val/*.mds")), shards[-1])
    (info,) = json.loads(Path(token_shards, "val", "index.json").read_text())["shards"]
    files, size = OpenShards(), (info["raw_data"]["bytes"], info["samples"])
    data = [files.read(path, 3, *size) for path in shards[:2]]
    Path(shards[0]).unlink()
    assert files.read(shards[0], 3, *size) == data[0]  # still open, so the bytes are there
    files.read(shards[2], 3, *size)
    assert list(files.files) == shards[1:]
