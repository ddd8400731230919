"""Runs of the trainer over several datasets, grouped by length."""

import shutil
from pathlib import Path

import pytest
import torch

import main
from src.common.errors import ConfigError
from src.data.source import Source
from tests.conftest import TRAIN, VALIDATION
from tests.runs import QUICKSTART, fit, logged


@pytest.fixture
def options(overrides, token_shards, text_shards, tmp_path):
    """Training documents with lengths, and validation documents drawn twice each, in batches of 16."""
    shutil.copytree(Path(token_shards) / "train", tmp_path / "train")
    shutil.copytree(Path(token_shards) / "val", tmp_path / "held-out")
    streams = f"{{c4: {{local: {tmp_path}}}, own: {{local: {tmp_path}, split: held-out, repeat: 2}}}}"
    return [*overrides, f"train_loader.streams={streams}", "callbacks.lr_monitor={}"]


def test_share_of_each_dataset_is_logged_by_name(options, tmp_path, capsys):
    main.main([QUICKSTART, *options, "max_duration=1ep"])
    shares = {name: value for line in logged(tmp_path) for name, value in line.items() if name.startswith("data/")}
    draws = 2 * VALIDATION
    share = draws / (draws + TRAIN)
    assert shares["data/sample_share/own"] == pytest.approx(share)
    assert shares["data/token_share/c4"] + shares["data/token_share/own"] == pytest.approx(1)
    assert shares["data/token_share/own"] == pytest.approx(share, abs=0.05)
    main.main([QUICKSTART, *options, "max_duration=1ep", "--validate"])
    printed = capsys.readouterr().out
    assert f"c4 {1 - share:.1%} ({TRAIN} draws of {TRAIN} samples)" in printed
    assert f"own {share:.1%} ({draws} draws of {VALIDATION} samples)" in printed
    assert f"{-(-(TRAIN + draws) // 16)}, 1.00 epochs" in printed


@pytest.mark.parametrize("rate", ["0.3", "{initial: 0.3, final: 0.2}"])
def test_mixed_and_grouped_run_resumes_bit_for_bit(rate, options, tmp_path):
    options = [*options, "train_loader.length_window=4", f"mlm_probability={rate}", "save_interval=20ba"]
    options += ["train_loader.persistent_workers=true", "train_loader.num_workers=2", "max_duration=40ba"]
    weights = []
    for folder, loaded in (("whole", []), ("half", [f"load_path={tmp_path}/whole/ep0-ba20-rank0.pt"])):
        trainer, _, end = fit([*options, *loaded, f"save_folder={tmp_path}/{folder}", "autoresume=false"])
        assert trainer.state.timestamp.batch.value == 40 and trainer.state.timestamp.epoch.value == 1
        weights.append(end)
    assert torch.equal(*weights)


def test_evaluating_on_a_mixed_training_set_is_refused(options, tmp_path):
    options = [*options, f"eval_loader.local={tmp_path}/", "eval_loader.split=./held-out"]
    with pytest.raises(ConfigError, match=r"eval: this is the training data of train_loader.streams.own"):
        main.main([QUICKSTART, *options])


@pytest.mark.parametrize("names", [["c4"], ["c4", "own"], ["c4", "more", "own"]], ids=len)
def test_a_mixture_of_any_number_of_datasets_trains(names, overrides, token_shards, tmp_path):
    shutil.copytree(Path(token_shards) / "train", tmp_path / "c4")
    shutil.copytree(Path(token_shards) / "train", tmp_path / "more")
    shutil.copytree(Path(token_shards) / "val", tmp_path / "own")
    streams = ", ".join(f"{name}: {{local: {tmp_path}, split: {name}}}" for name in names)
    _, mixed, _ = fit([*overrides, "callbacks.lr_monitor={}", f"train_loader.streams={{{streams}}}"])
    shares = {name: value for line in logged(tmp_path) for name, value in line.items() if "sample_share" in name}
    assert list(shares) == [f"data/sample_share/{name}" for name in names] and sum(shares.values()) == pytest.approx(1)
    assert len(mixed.losses) == 4
    if names == ["c4"]:  # a mixture of one dataset is that dataset
        _, alone, _ = fit([*overrides, "save_overwrite=true"])
        assert mixed.losses == alone.losses


@pytest.mark.parametrize("names", [[], ["a"], ["a", "b"]])
def test_filler_has_the_fields_of_a_sample(names, token_shards, opened):
    splits = dict(zip(names, ("train", "val"), strict=False))
    mixture = {"sources": {name: Source(token_shards, split=split) for name, split in splits.items()}} if names else {}
    dataset = opened(token_shards, **mixture)
    assert dataset.filler().keys() == dataset[0].keys()
