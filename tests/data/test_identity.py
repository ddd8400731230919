"""The data that is named is the data that is read: where it lies may change, what it is may not."""

import gc
import json
import shutil
from pathlib import Path

import pytest
from streaming import MDSWriter

from src.common.errors import ConfigError, DataError
from src.data.index import read_index
from src.data.shards import dataset_fingerprints
from src.data.source import Source
from src.train.config import load, settings
from src.train.resume import ResumeCheck
from tests.runs import QUICKSTART, losses_of, trainer_of


def edit(folder, change):
    index = json.loads((folder / "index.json").read_text())
    change(index["shards"][0])
    (folder / "index.json").write_text(json.dumps(index))


CHANGES = {
    "hashes": lambda shard: shard["raw_data"]["hashes"].update(sha1="0"),
    "samples": lambda shard: shard.update(samples=shard["samples"] - 1),
    "bytes": lambda shard: shard["raw_data"].update(bytes=shard["raw_data"]["bytes"] + 1),
}
"""Each gives another dataset."""


# The fingerprint


def test_fingerprint_depends_on_the_samples_only(token_shards, text_shards, tmp_path):
    folder = Path(shutil.copytree(token_shards, tmp_path / "copy")) / "train"
    first = dataset_fingerprints([folder])
    assert first == dataset_fingerprints([Path(token_shards) / "train"]) and first[0] == first[1]
    seen = {first, *(dataset_fingerprints([Path(path)]) for path in (f"{token_shards}/val", f"{text_shards}/train"))}
    for change in CHANGES.values():
        shutil.copy(f"{token_shards}/train/index.json", folder)
        edit(folder, change)
        seen.add(dataset_fingerprints([folder]))
    assert len({fingerprint for fingerprint, _ in seen}) == 6


def test_fingerprint_of_a_mixture_depends_on_its_borders(token_shards, tmp_path):
    """Three shards of two datasets: earlier versions could not tell which dataset has the second."""
    shards = read_index(Path(token_shards) / "val")["shards"] * 3
    for i in range(3):
        shards[i] = {**shards[i], "raw_data": {**shards[i]["raw_data"], "basename": f"shard.{i}.mds"}}
    found = []
    for border in (1, 2):
        folders = [tmp_path / f"{border}-{part}" for part in range(2)]
        for folder, part in zip(folders, (shards[:border], shards[border:]), strict=True):
            index = json.loads(Path(token_shards, "val", "index.json").read_text())
            folder.mkdir()
            (folder / "index.json").write_text(json.dumps({**index, "shards": part}))
        found.append(dataset_fingerprints(folders))
    assert found[0][0] != found[1][0] and found[0][1] == found[1][1]


def test_checkpoints_of_earlier_versions_are_compared(caplog):
    """They hold the folders of streams, and the flat fingerprint of a mixture."""
    held = {"seed": 1, "dataset": "nested", "train_loader.streams.c4.repeat": 2.0}
    check = ResumeCheck(held, [], {"dataset": "flat"})
    places = {f"train_loader.streams.c4.{name}": "/old" for name in ("local", "remote", "split")}
    assert check.compare({**held, **places, "dataset": "flat"}, "x.pt") == []
    with pytest.raises(ConfigError) as refused:
        check.compare({**held, **places, "dataset": "other", "train_loader.streams.c4.repeat": 1.0}, "x.pt")
    assert "dataset: 'other' there, 'nested' here\n  train_loader.streams.c4.repeat: 1.0 there" in str(refused.value)
    assert "/old" not in str(refused.value)


def test_settings_hold_the_weights_of_streams_and_not_their_places():
    streams = "{c4: {split: train}, own: {local: x, remote: s3://b, repeat: 2}}"
    found = settings(load(QUICKSTART, [f"train_loader.streams={streams}"]))
    names = {name.rsplit(".", 1)[1] for name in found if name.startswith("train_loader.streams.own.")}
    assert names == {"proportion", "repeat", "choose"} and found["train_loader.streams.own.repeat"] == 2


# Resuming


def mixture(folder, *, remote=None):
    """Training on two datasets under ``folder``; the second through a cache if there is a remote."""
    own = f"local: {folder}/own" + (f", remote: {remote}" if remote else "")
    return f"train_loader.streams={{c4: {{local: {folder}/c4}}, own: {{{own}, split: val, repeat: 2}}}}"


def test_moved_data_resumes_and_other_data_does_not(overrides, token_shards, tmp_path):
    """First one dataset and then a mixture: moved, then streamed from a remote, then with other contents."""
    run = [
        *overrides,
        "autoresume=true",
        "save_overwrite=false",
        "eval_interval=0",
        f"eval_loader.local={token_shards}",
    ]
    first, second, cache = (tmp_path / name for name in ("first", "second", "cache"))
    for name in ("c4", "own"):
        shutil.copytree(token_shards, first / name)
    for kind, here, moved, other in (
        ("one", f"data_local={first}/c4", f"data_local={second}/c4", f"data_local={second}/c4"),
        ("mixture", mixture(first), mixture(second), mixture(cache, remote=second / "own")),
    ):
        options = [*run, f"save_folder={tmp_path}/{kind}"]
        whole, _ = losses_of([*options, here], kill_at=3)
        assert list(whole) == [1, 2, 3]
        shutil.copytree(first, second)
        shutil.copytree(first / "c4", cache / "c4", dirs_exist_ok=True)
        for places in (moved, other):
            losses, _ = losses_of([*options, places], kill_at=3)
            assert losses == {3: whole[3]}
        for change in (CHANGES["samples"], CHANGES["hashes"]):
            for folder in (second / "c4" / "train", second / "own" / "val"):
                shutil.copy(first / folder.relative_to(second) / "index.json", folder)
                edit(folder, change)
            with pytest.raises(ConfigError, match="\n  dataset: '"):
                trainer_of([*options, moved])
        gc.collect()
        shutil.rmtree(second)


# Caches


def test_cache_of_another_dataset_is_refused(token_shards, opened, tmp_path):
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    shutil.copytree(token_shards, remote)
    want = [sample["input_ids"].tolist() for sample in opened(cache, "val", remote=str(remote), batch_size=7)]
    gc.collect()
    remote.rename(tmp_path / "moved")
    dataset = opened(cache, "val", remote=str(tmp_path / "moved"), batch_size=7)
    assert [sample["input_ids"].tolist() for sample in dataset] == want
    del dataset
    gc.collect()
    before = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    for change in CHANGES.values():
        shutil.copy(f"{token_shards}/val/index.json", tmp_path / "moved" / "val")
        edit(tmp_path / "moved" / "val", change)
        message = rf"{cache}/val is the cache of another dataset than {tmp_path}/moved/val holds; name another local"
        with pytest.raises(DataError, match=message):
            opened(cache, "val", remote=str(tmp_path / "moved"), batch_size=7)
    assert {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()} == before
    (cache / "val" / "index.json").write_text("{")
    with pytest.raises(DataError, match=rf"{cache}/val/index.json is broken .* delete it if it is a cache"):
        opened(cache, "val", remote=str(tmp_path / "moved"), batch_size=7)


def test_remote_that_is_the_folder_itself_is_no_cache(token_shards, opened, tmp_path):
    """By another path to it: damaged shards of a cache would be deleted."""
    shutil.copytree(token_shards, tmp_path / "data")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    for local, remote, complete in (
        ("data", None, True),
        ("data", "data/", True),
        ("./link", "data", True),
        ("link/..", ".", True),
        ("data", "other", False),
        ("s3:/data", "s3://data", False),
    ):
        source = Source(str(tmp_path / local), remote if remote is None or "://" in remote else str(tmp_path / remote))
        assert source.complete == complete, (local, remote)
    shard = tmp_path / "data" / "val" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match="shard.00000.mds has"):
        opened(tmp_path / "link", "val", remote=str(tmp_path / "data"))
    assert shard.exists()


def test_shard_of_another_size_is_not_read_from_the_cache(opened, tmp_path):
    """A shard that has taken another's place in the remote."""
    with MDSWriter(out=str(tmp_path / "remote" / "val"), columns={"text": "str"}, size_limit=300) as writer:
        for i in range(40):
            writer.write({"text": "a text " * (i // 8 + 1)})
    shards = sorted((tmp_path / "remote" / "val").glob("*.mds"), key=lambda path: path.stat().st_size)
    shutil.copy(shards[-1], shards[0])
    with pytest.raises(DataError, match=rf"remote/val/{shards[0].name} has [\d,]+ bytes, not [\d,]+"):
        list(opened(tmp_path / "cache", "val", remote=str(tmp_path / "remote"), batch_size=4, download_retry=1))


# Settings


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["eval_loaders.a={split: val, remote: r}"], "eval_loaders.a.remote: needs a local folder of its own as cache"),
        (["eval_loader.remote=r"], "eval_loader.remote: needs a local folder of its own as cache (eval_loader.local)"),
        (["train_loader.remote=r"], "train_loader.remote: needs a local folder of its own as cache"),
        (
            ["train_loader.streams={a: {remote: r}, b: {local: x}}"],
            "train_loader.streams.a.remote: needs a local folder of its own as cache (train_loader.streams.a.local)",
        ),
        (
            ["data_remote=s3://b", "eval_loaders.a={split: val, local: d}"],
            "eval_loaders.a.local: d/val is for {here}/d/val, and in eval_loader for s3://b/val",
        ),
        (
            ["eval_loaders={a: {split: val, local: x, remote: r}, b: {split: val, local: ./x, remote: s3://q}}"],
            "eval_loaders.b.local: x/val is for s3://q/val, and in eval_loaders.a for {here}/r/val",
        ),
        (
            ["train_loader.streams={a: {local: x, remote: r}, b: {local: x, remote: q}}"],
            "train_loader.streams.b.local: x/train is for {here}/q/train, and in train_loader.streams.a for {here}/r/t",
        ),
    ],
)
def test_a_cache_of_two_datasets_is_refused(overrides, fault):
    with pytest.raises(ConfigError) as refused:
        load(QUICKSTART, ["data_local=d", *overrides])
    assert fault.format(here=Path.cwd()) in str(refused.value) and "1 fault\n" in str(refused.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data_remote=s3://b", "eval_loader.remote=s3://b"],
        ["data_remote=s3://b", "eval_loaders.a={split: val, remote: s3://b}"],
        ["eval_loaders={a: {split: val, local: x, remote: r}, b: {split: val, local: x, remote: ./r/}}"],
        ["eval_loaders={a: {split: val, local: x, remote: r}, b: {split: dev, local: x, remote: q}}"],
        ["eval_loaders={a: {split: val, local: x, remote: x}, b: {split: val, local: ./x}}"],
    ],
)
def test_one_dataset_may_be_named_twice(overrides):
    load(QUICKSTART, ["data_local=d", *overrides])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("a: {{{}, repeat: 0.001}}, b: {{{}, split: val}}", "streams.a: repeat 0.001 draws none of its {} samples"),
        (
            "a: {{{}, proportion: 1}}, b: {{{}, split: val, proportion: 1e-30}}",
            "streams.b: proportion 1e-30 draws none",
        ),
    ],
)
def test_weight_that_draws_no_sample_is_refused(weights, message, overrides, token_shards, tmp_path):
    """Streaming would look for the first sample without end."""
    shutil.copytree(token_shards, tmp_path / "held-out")
    streams = f"train_loader.streams={{{weights.format(f'local: {token_shards}', f'local: {token_shards}')}}}"
    size = sum(shard["samples"] for shard in read_index(Path(token_shards, "train"))["shards"])
    with pytest.raises(DataError) as refused:
        trainer_of([*overrides, streams, f"eval_loader.local={tmp_path}/held-out"])
    assert f"train_loader.{message.format(size)}" in str(refused.value)
