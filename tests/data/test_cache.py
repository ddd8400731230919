"""A cache belongs to one dataset: nothing of the user's is deleted, nothing stale or half is read, two runs do not
share one."""

import errno
import gc
import os
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from streaming import MDSWriter

from src.common.errors import DataError
from src.data import cache as cache_module
from src.data.cache import DOWNLOADS, MARKER
from src.data.index import LENGTHS
from src.data.source import Source
from tests.conftest import TRAIN


def write(folder, word="mill", number=40, compression=None, size_limit=300, **options):
    """A dataset of shards of 2 to 8 short texts, in a split."""
    options = {"columns": {"text": "str"}, "hashes": ["sha1"], "size_limit": size_limit, **options}
    with MDSWriter(out=str(folder / "train"), compression=compression, **options) as writer:
        for i in range(number):
            writer.write({"text": f"a river runs past a {word} {i:02}"})
    return folder


def contents(folder):
    """Bytes of each file."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def shards_of(folder):
    return sorted((folder / "train").glob("shard*.mds"))


@pytest.fixture
def read(opened):
    """Opens a cache of a remote, or a complete dataset, and returns the ids of its samples in order."""

    def read(local, remote=None, **options):
        options = {"remote": remote and str(remote), "batch_size": 4, "download_retry": 1, **options}
        dataset = opened(local, **options)
        try:
            return [dataset[i]["input_ids"].tolist() for i in range(dataset.size)]
        finally:
            dataset.__del__()  # streaming's: frees the folder

    return read


# Nothing of the user's is deleted


def test_a_limit_deletes_shards_of_caches_only(opened, tmp_path):
    """A complete dataset, larger than the limit and of larger shards, mixed with two streamed ones."""
    write(tmp_path / "own", number=400, size_limit=4000)
    before = contents(tmp_path / "own")
    sources = {"own": Source(str(tmp_path / "own"))}
    for name in ("far", "further"):
        write(tmp_path / name, name)
        sources[name] = Source(str(tmp_path / "cache" / name), str(tmp_path / name))
    sizes = [path.stat().st_size for name in ("far", "further") for path in shards_of(tmp_path / name)]
    limit = sum((tmp_path / name / "train" / "index.json").stat().st_size for name in ("far", "further"))
    limit += 6 * max(sizes)
    sources = {name: Source(source.local, source.remote, "train") for name, source in sources.items()}
    dataset = opened(None, sources=sources, cache_limit=limit, batch_size=4, num_canonical_nodes=1, shuffle=True)
    for _ in range(2):
        ids = []
        for sample in dataset:
            ids.append(sample["sample_id"])
            here = sum(len(shards_of(tmp_path / "cache" / name)) for name in ("far", "further"))
            assert here <= 6 + 2  # two threads may each be fetching one that is not counted yet
        assert set(ids) == set(range(dataset.size))
    assert contents(tmp_path / "own") == before
    assert len(sizes) > 2 * 8
    with pytest.raises(DataError, match="may be the only copy of a dataset: nothing in it is deleted"):
        dataset.evict_shard(0)
    assert contents(tmp_path / "own") == before


def test_compressed_dataset_stays_as_it_is(read, tmp_path):
    """Streaming deletes the unpacked shards of one without archives, and archives in a cache."""
    remote = write(tmp_path / "remote", compression="zstd:3")
    want = read(write(tmp_path / "plain"))
    for kind in ("archives", "unpacked", "both", "archives in a cache", "both in a cache"):
        local = Path(shutil.copytree(remote, tmp_path / kind))
        if kind.split()[0] != "archives":
            read(local)  # unpacks
        for path in (local / "train").glob("*.zstd"):
            path.unlink() if kind == "unpacked" else None
        before = contents(local)
        for _ in range(2):
            assert read(local, remote if "cache" in kind else None) == want, kind
            assert before.items() <= contents(local).items(), kind
        assert not list(local.rglob(".tmp-*")), kind


def test_folder_with_other_files_is_no_cache(read, tmp_path):
    """A shard may be of a dataset whose index is lost."""
    remote = write(tmp_path / "remote")
    for i, name in enumerate(("notes.txt", "shard.00000.mds", "00000/shard.00000.mds", "stats.json")):
        path = tmp_path / f"{i}" / "train" / name
        path.parent.mkdir(parents=True)
        path.write_text("mine")
        with pytest.raises(DataError, match=rf"{i}/train cannot be the cache of .*remote/train: .* holds {name[:5]}"):
            read(tmp_path / f"{i}", remote)
        assert contents(tmp_path / f"{i}") == {path: b"mine"}


def test_a_copy_of_the_dataset_is_used_and_not_evicted(read, tmp_path):
    """Perhaps the remote is an unfinished upload of it."""
    remote = write(tmp_path / "remote")
    local, want = Path(shutil.copytree(remote, tmp_path / "local")), read(remote)
    before = contents(local)
    assert read(local, remote) == want
    message = r"local/train may be the only copy of a dataset, and cache_limit would delete its shards.*make the file"
    with pytest.raises(DataError, match=message):
        read(local, remote, cache_limit=10_000)
    with pytest.raises(DataError, match=r"local/train holds another dataset than .*; name another local folder$"):
        read(local, write(tmp_path / "other", "mile"))
    assert before.items() <= contents(local).items()
    (local / "train" / MARKER).touch()
    assert read(local, remote, cache_limit=10_000) == want
    cached = tmp_path / "new"
    assert read(cached, remote, cache_limit=10_000) == read(cached, remote, cache_limit=10_000) == want


def test_only_shards_of_a_marked_cache_are_evicted(opened, tmp_path):
    remote = write(tmp_path / "remote")
    local = Path(shutil.copytree(remote, tmp_path / "local"))
    before = contents(local)
    for options in ({}, {"remote": str(remote)}):  # complete, and perhaps the only copy
        dataset = opened(local, batch_size=1, **options)
        with pytest.raises(DataError, match="may be the only copy of a dataset: nothing in it is deleted"):
            dataset.evict_shard(0)
        del dataset
    assert before.items() <= contents(local).items()


@pytest.mark.parametrize("verify", ["size", "hash"])
def test_damaged_shard_of_a_cache_stays_until_another_is_there(verify, read, tmp_path):
    """Also where it is a hard link to the user's copy."""
    remote, user = write(tmp_path / "remote"), tmp_path / "user"
    want, (first, *_) = read(remote), shards_of(remote)
    shutil.copytree(remote, user)
    mine, sound = user / "train" / first.name, first.read_bytes()
    damaged = sound[:-3] if verify == "size" else sound[:-3] + b"..."
    mine.write_bytes(damaged)
    shutil.copytree(user, tmp_path / "local", copy_function=os.link)
    first.unlink()
    with pytest.raises(DataError, match=f"{first.name} cannot be read or fetched"):
        read(tmp_path / "local", remote, verify=verify)
    assert (tmp_path / "local" / "train" / first.name).read_bytes() == damaged
    first.write_bytes(sound)
    assert read(tmp_path / "local", remote, verify=verify) == want
    assert (tmp_path / "local" / "train" / first.name).read_bytes() == sound and mine.read_bytes() == damaged


def test_split_that_is_a_link_to_the_remotes_is_no_cache(read, tmp_path):
    remote = write(tmp_path / "remote")
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "train").symlink_to(remote / "train")
    before, source = contents(remote), Source(str(tmp_path / "local"), str(remote), "train")
    assert source.complete and source.origin == str(remote / "train")
    assert read(tmp_path / "local", remote, cache_limit=10_000) == read(remote)
    assert contents(remote) == before


# Nothing stale is read


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("word", ["mile", "ocean"])
def test_remote_replaced_while_a_run_streams_is_noticed(word, compression, opened, tmp_path):
    """By another dataset with shards of the same size, and with others."""
    remote = write(tmp_path / "remote", "mill", compression=compression)
    dataset = opened(tmp_path / "cache", remote=str(remote), batch_size=4, download_retry=1)
    first = dataset[0]["input_ids"].tolist()
    shutil.rmtree(remote)
    write(remote, word, compression=compression)
    assert dataset[0]["input_ids"].tolist() == first
    with pytest.raises(
        DataError, match=r"remote/train/shard.\S* has .*: the dataset there was replaced since its index"
    ):
        dataset[39]
    gc.collect()
    assert len(shards_of(tmp_path / "cache")) == 1
    with pytest.raises(DataError, match="is the cache of another dataset"):
        opened(tmp_path / "cache", remote=str(remote), batch_size=4)


def test_cache_that_lost_its_index_is_refused(read, tmp_path):
    """Its shards may be of another dataset."""
    read(tmp_path / "cache", write(tmp_path / "old", "mill"))
    (tmp_path / "cache" / "train" / "index.json").unlink()
    with pytest.raises(DataError, match=r"it has no index.json, and holds shard.00000.mds"):
        read(tmp_path / "cache", write(tmp_path / "new", "mile"))


GROUPED = {"length_window": 2, "shuffle": True, "num_canonical_nodes": 1, "batch_size": 4}


LENGTHS_OF_OTHERS = {
    f"has {TRAIN - 1} lengths for {TRAIN} samples": lambda lengths: lengths[:-1],
    "does not fit shard.00000.mds": lambda lengths: lengths + (np.arange(TRAIN) == 5),
    f"has 0 lengths for {TRAIN} samples": lambda lengths: lengths[:0],
}


def test_lengths_of_another_dataset_are_not_used(token_shards, opened, tmp_path):
    """In the remote they are an error; in the cache they are fetched again."""
    remote = Path(shutil.copytree(Path(token_shards) / "train", tmp_path / "remote" / "train")).parent
    sound = np.fromfile(remote / "train" / LENGTHS, "<u2")
    cached = tmp_path / "cache" / "train" / LENGTHS
    for change in (None, *LENGTHS_OF_OTHERS.values()):
        if change:
            change(sound).astype("<u2").tofile(cached)
        dataset = opened(tmp_path / "cache", remote=str(remote), **GROUPED)
        assert np.array_equal(dataset.lengths[0], sound)
        dataset.__del__()
    for fault, change in LENGTHS_OF_OTHERS.items():
        for path in (cached, remote / "train" / LENGTHS):
            change(sound).astype("<u2").tofile(path)
        for place in ({"folder": tmp_path / "cache", "remote": str(remote)}, {"folder": remote}):
            with pytest.raises(DataError, match=f"remote/train: lengths.bin {fault}. Convert again"):
                opened(**place, **GROUPED)
            gc.collect()


# Half files


HOST = socket.gethostname()


def test_half_file_of_a_killed_run_is_not_read(read, tmp_path):
    remote = write(tmp_path / "remote", compression="zstd")
    want = read(write(tmp_path / "plain"))
    for i, name in enumerate(
        (
            f"{DOWNLOADS}/{HOST}/.tmp-1234/shard.00000.mds",
            f"{DOWNLOADS}/{HOST}/.tmp-1234/shard.00000.mds.zstd.tmp",
            "index.json.tmp",
            "shard.00000.mds.tmp",
            "shard.00000.mds",
            "shard.00000.mds.zstd",
        )
    ):
        half = tmp_path / f"{i}" / "train" / name
        half.parent.mkdir(parents=True)
        if half.suffix != ".tmp" and DOWNLOADS not in name:  # of an earlier version: it has the index, too
            shutil.copy(remote / "train" / "index.json", half.parent)
        half.write_bytes(b"half")
        assert read(tmp_path / f"{i}", remote, verify="off") == want, name
        assert not half.exists() or DOWNLOADS not in name


def test_downloads_of_hosts_that_are_gone_are_removed(read, tmp_path):
    folder = tmp_path / "cache" / "train" / DOWNLOADS
    for host in ("alive/.tmp-1", "gone/.tmp-1", "a folder of the user's"):
        (folder / host).mkdir(parents=True)
        (folder / host / "shard.00000.mds").touch()
    for host in ("gone", "a folder of the user's"):
        os.utime(folder / host, (time.time() - 90_000,) * 2)
    read(tmp_path / "cache", write(tmp_path / "remote"))
    assert {host.name for host in folder.iterdir()} - {HOST} == {"alive", "a folder of the user's"}
    assert (folder / "a folder of the user's" / "shard.00000.mds").exists()


@pytest.mark.parametrize("full", ["downloading", "unpacking"])
def test_full_disk_is_one_message_and_leaves_nothing(full, read, tmp_path, monkeypatch):
    remote, copy = write(tmp_path / "remote", compression="zstd"), shutil.copy
    want = read(write(tmp_path / "plain"))

    def fill(path):
        path.write_bytes(b"half") if full == "downloading" else None
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def half(source, path):
        return copy(source, path) if "index" in str(source) else fill(Path(path))

    with monkeypatch.context() as patch:
        if full == "downloading":
            patch.setattr(shutil, "copy", half)
        else:
            patch.setattr(cache_module, "decompress", lambda *args: fill(tmp_path))
        with pytest.raises(
            DataError, match=r"cache/train cannot be written \(No space left .*\); free space, or set a"
        ):
            read(tmp_path / "cache", remote)
    left = {path.name for path in contents(tmp_path / "cache")}
    assert left == {"index.json", MARKER}
    assert read(tmp_path / "cache", remote) == want


# Several runs


def test_second_run_in_a_cache_is_refused(opened, tmp_path):
    """Also by another path to it."""
    remote = write(tmp_path / "remote")
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    dataset = opened(tmp_path / "cache", remote=str(remote), batch_size=4)
    message = r"{}/train is the cache of another run on this machine \({}.*wait until it ends"
    left = f"if none runs, a killed one left its shared memory: delete /dev/shm/{dataset.shared_memory_prefix:06}_"
    with pytest.raises(DataError, match=message.format("cache", left)):
        opened(tmp_path / "cache", remote=str(remote), batch_size=4)
    dataset.own_shared_memory()
    with pytest.raises(DataError, match=message.format("link", f"process {os.getpid()}")):
        opened(tmp_path / "link", remote=str(remote), batch_size=4)
    assert len(list(dataset)) == 40


def test_several_runs_read_a_complete_dataset(opened, tmp_path):
    for compression in (None, "zstd"):
        write(tmp_path / f"{compression}", compression=compression)
        datasets = [opened(tmp_path / f"{compression}", batch_size=4, num_canonical_nodes=1) for _ in range(2)]
        for ours, theirs in zip(*map(iter, datasets), strict=True):
            assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()


def test_shard_that_another_node_evicts_is_fetched_again(opened, tmp_path, monkeypatch):
    """Also if it is still open here: NFS then knows it no more."""
    remote = write(tmp_path / "remote")
    dataset = opened(tmp_path / "cache", remote=str(remote), batch_size=4, cache_limit=100_000)
    want = [dataset[i]["input_ids"].tolist() for i in range(40)]
    pread, stale = os.pread, [True]

    def read(*args):
        if stale and stale.pop():
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return pread(*args)

    monkeypatch.setattr(os, "pread", read)
    for i in range(40):
        for path in shards_of(tmp_path / "cache"):
            path.unlink()
        stale.append(True)
        if i % 2:
            dataset.open_shards.files.clear()
        assert dataset[i]["input_ids"].tolist() == want[i]
    files = [remote / "train" / "index.json", *shards_of(remote)]
    assert dataset.cache_usage <= sum(path.stat().st_size for path in files)  # none is counted twice
