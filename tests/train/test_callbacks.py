"""Callbacks and loggers in small runs: failures that stop a run, the memory probe, console lines."""

import re

import pytest
import torch

import main
from src import data_c4
from src.common.errors import ConfigError, TrainingError
from src.mosaic_bert import MosaicBert
from src.train.callbacks import MemoryProbe
from tests.runs import DROPOUT, QUICKSTART, fit, trainer_of


def test_nan_loss_stops_the_run(overrides, tmp_path):
    """The error names step, rank, learning rate and the last checkpoint; the broken weights are not saved."""
    with pytest.raises(SystemExit) as exit:
        main.run([QUICKSTART, *overrides, "optimizer.lr=1e30", "max_duration=20ba", "save_interval=1ba"])
    message = str(exit.value)
    found = re.search(r"the loss is (nan|inf) at step (\d+) on ranks 0, learning rate \S+e\+", message)
    assert found and int(found[2]) > 1
    last = f"ep0-ba{int(found[2]) - 1}-rank0.pt"
    assert f"Last checkpoint before it: {tmp_path}/checkpoints/{last}" in message
    saved = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert last in saved and f"ep0-ba{found[2]}-rank0.pt" not in saved


def test_nan_loss_without_a_checkpoint(overrides):
    with pytest.raises(TrainingError, match="No checkpoint was saved before it"):
        fit([*overrides, "save_folder=null", "optimizer.lr=1e30", "max_duration=20ba"])


def test_epoch_that_ends_early_is_an_error(overrides, monkeypatch):
    """Of a stream that stops without an exception."""
    whole = data_c4.Loader.__iter__
    monkeypatch.setattr(data_c4.Loader, "__iter__", lambda self: (b for i, b in enumerate(whole(self)) if i < 3))
    with pytest.raises(TrainingError, match=r"epoch 1 ended after 48 of \d+ samples"):
        fit([*overrides, "max_duration=1ep", "eval_interval=0"])


def test_memory_probe_runs_the_largest_microbatch_first_and_changes_no_state(overrides, monkeypatch):
    options = [*overrides, "save_folder=null", "eval_interval=0", DROPOUT]
    shapes, forward = [], MosaicBert.forward

    def recorded(self, batch):
        shapes.append((len(batch["input_ids"]), batch["max_seqlen"]))
        return forward(self, batch)

    monkeypatch.setattr(MosaicBert, "forward", recorded)
    _, want, weights = fit(options)
    assert shapes[0] == (16 * 32, 32) == max(shapes)

    trainer = trainer_of(options)
    model, probe = trainer.state.model, next(c for c in trainer.state.callbacks if isinstance(c, MemoryProbe))
    held = {**model.state_dict(), **dict(model.named_buffers())}
    before, generator = {name: value.clone() for name, value in held.items()}, torch.get_rng_state()
    probe.fit_start(trainer.state, trainer.logger)
    assert all(torch.equal(before[name], held[name]) for name in held)
    assert torch.equal(generator, torch.get_rng_state()) and not trainer.state.optimizers[0].state_dict()["state"]
    assert all(p.grad is None for p in model.parameters())
    trainer.close()

    monkeypatch.setattr(MemoryProbe, "fit_start", lambda *args: None)
    _, got, same = fit(options)
    assert got.losses == want.losses and torch.equal(weights, same)


def test_too_little_memory_is_an_error_before_the_first_step(overrides, monkeypatch):
    def forward(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(MosaicBert, "forward", forward)
    with pytest.raises(SystemExit) as exit:
        main.run([QUICKSTART, *overrides])
    message = str(exit.value)
    assert "too little memory for a microbatch of 16 sequences, 512 tokens (CUDA out of memory. Tried" in message
    assert "Lower device_train_microbatch_size" in message and "more" not in message.split("(")[1].split(")")[0]


def test_console_lines(overrides, capsys):
    monitors = ["callbacks.step_monitor.warmup=0", "loggers.console_line.interval=2ba", "eval_interval=4ba"]
    fit([*overrides, "save_folder=null", *monitors])
    printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    number = r"[\d.,e+-]+"
    parts = rf"loss {number}  lr {number}  grad {number}  {number} tokens/s  waiting for data {number}%"
    assert re.fullmatch(rf"step 2 \(50\.0%\)  {parts}  0:00:00 left", printed[0])
    assert re.fullmatch(rf"step 4 \(100\.0%\)  {parts}", printed[1])
    assert re.fullmatch(rf"step 4 \(100\.0%\)  eval:  LanguageCrossEntropy {number}  .*", printed[2])
    assert len(printed) == 3


def test_console_line_refuses_an_unknown_interval(overrides):
    with pytest.raises(ConfigError, match=r"loggers\.console_line: .*hours"):
        trainer_of([*overrides, "loggers.console_line.interval=3hours"])
