"""Callbacks and loggers in small runs: failures that stop a run, the memory probe, console lines."""

import collections
import contextlib
import itertools
import random
import re
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from composer import Callback
from composer.trainer import trainer as composer_trainer
from torch.utils._python_dispatch import TorchDispatchMode

import main
from src import data_c4
from src.common.errors import ConfigError, TrainingError
from src.data.masking import MaskingCollator, mask_batch
from src.mosaic_bert import MosaicBert
from src.train import builders, callbacks
from src.train.callbacks import CastWeightsOnce, MemoryProbe, Reseed, ScheduledMasking, StopOnSilentFailure
from src.train.config import MaskingSchedule
from tests.conftest import TRAIN
from tests.runs import (
    DROPOUT,
    QUICKSTART,
    UNSAVED,
    Killed,
    Watch,
    environment,
    evaluation,
    fit,
    free_port,
    logged,
    trainer_of,
    weights_of,
)


def test_reseeding_depends_on_seed_step_and_rank(monkeypatch):
    """Each generator: torch's, numpy's and Python's."""

    def draws(seed, step, rank):
        monkeypatch.setattr(callbacks.dist, "get_global_rank", lambda: rank)
        state = SimpleNamespace(timestamp=SimpleNamespace(batch=SimpleNamespace(value=step)))
        Reseed(seed).batch_start(state, None)
        return torch.rand(1).item(), np.random.rand(), random.random()

    want = draws(17, 3, 0)
    for other in ((18, 3, 0), (17, 4, 0), (17, 3, 1)):
        assert all(a != b for a, b in zip(want, draws(*other), strict=True))
    assert draws(17, 3, 0) == want


def test_scheduled_rate_follows_the_elapsed_share_of_the_run(tokenizer):
    ids = np.array([tokenizer.cls_token_id, *range(50, 250), tokenizer.sep_token_id])
    batch = MaskingCollator(tokenizer, None, seed=17)([{"input_ids": ids, "sample_id": 0, "epoch": 0}])
    logged = []
    for elapsed, rate in ((0.0, 0.4), (0.125, 0.35), (0.5, 0.2), (0.75, 0.1)):
        share = SimpleNamespace(value=elapsed)
        state = SimpleNamespace(batch=batch, get_elapsed_duration=lambda share=share: share)
        masking = ScheduledMasking(MaskingSchedule(initial=0.4, final=0.0))
        masking.batch_start(state, SimpleNamespace(log_metrics=logged.append))
        assert logged.pop()["masking/rate"] == pytest.approx(rate)
        assert torch.equal(state.batch["labels"], mask_batch(batch, rate)["labels"])


@pytest.mark.parametrize("loss", ["nan", "inf", "-inf"])
def test_loss_that_is_not_finite_is_an_error(loss):
    state = SimpleNamespace(
        optimizers=[SimpleNamespace(param_groups=[{"lr": 0.5}])],
        timestamp=SimpleNamespace(batch=SimpleNamespace(value=7)),
        callbacks=[],
        total_loss_dict={"loss/train/total": float(loss)},
    )
    check = StopOnSilentFailure()
    for value in (1.0, float(loss), 2.0):  # of three microbatches
        state.loss = torch.tensor(value)
        check.after_loss(state, None)
    with pytest.raises(TrainingError, match=f"the loss is {loss} at step 7 on ranks 0, learning rate 0.5"):
        check.batch_end(state, None)
    state.total_loss_dict["loss/train/total"], state.loss = 3.0, torch.tensor(3.0)
    check.after_loss(state, None)
    check.batch_end(state, None)


@pytest.mark.parametrize(("done", "whole"), [(20, True), (19, False), (0, False)])
def test_lost_batch_is_an_error(done, whole):
    """One is enough."""
    state = SimpleNamespace(
        train_dataloader=SimpleNamespace(dataset=SimpleNamespace(epoch_size=20)),
        previous_timestamp=SimpleNamespace(sample_in_epoch=SimpleNamespace(value=done)),
        timestamp=SimpleNamespace(epoch=SimpleNamespace(value=2)),
    )
    with nullcontext() if whole else pytest.raises(TrainingError, match=f"epoch 2 ended after {done} of 20 samples"):
        StopOnSilentFailure().epoch_end(state, None)


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
    with pytest.raises(TrainingError, match=f"epoch 1 ended after 48 of {TRAIN} samples"):
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


def test_memory_probe_knows_the_budget_of_tokens(overrides):
    """The largest microbatch: as many tokens as either limit allows, in the longest sequences."""
    tokens, longest = "device_train_microbatch_tokens=100", "max_seq_len=32"
    for change, samples, most, setting, accumulates in (
        ([tokens, "device_train_microbatch_size=null"], 4, 100, "tokens", True),
        ([tokens, "device_train_microbatch_size=3"], 3, 96, "size", True),
        (["device_train_microbatch_size=1000"], 16, 512, "size", False),
    ):
        trainer = trainer_of([*overrides, *UNSAVED, longest, *change])
        (probe,) = (c for c in trainer.state.callbacks if isinstance(c, MemoryProbe))
        trainer.close()
        got = probe.microbatch["num_samples"], probe.microbatch["num_tokens"], probe.setting, probe.accumulates
        assert got == (samples, most, f"device_train_microbatch_{setting}", accumulates)


@pytest.mark.parametrize("accumulates", [False, True])
def test_memory_probe_has_gradients_beside_all_microbatches_but_the_first(accumulates, overrides, monkeypatch):
    found, forward = [], MosaicBert.forward

    def recorded(self, batch):
        found.append(all(p.grad is not None for p in self.parameters()))
        return forward(self, batch)

    monkeypatch.setattr(MosaicBert, "forward", recorded)
    trainer = trainer_of([*overrides, *UNSAVED, f"device_train_microbatch_size={8 if accumulates else 16}"])
    probe = next(c for c in trainer.state.callbacks if isinstance(c, MemoryProbe))
    probe.fit_start(trainer.state, trainer.logger)
    trainer.close()
    assert found == [accumulates] and all(p.grad is None for p in trainer.state.model.parameters())


@pytest.mark.parametrize(
    ("change", "size", "lower"),
    [("size=16", "16 sequences, 512 tokens", "size"), ("tokens=40", "2 sequences, 40 tokens", "tokens")],
)
def test_too_little_memory_is_an_error_before_the_first_step(change, size, lower, overrides, monkeypatch):
    def forward(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(MosaicBert, "forward", forward)
    with pytest.raises(SystemExit) as exit:
        main.run([QUICKSTART, *overrides, f"device_train_microbatch_{change}"])
    message = str(exit.value)
    assert f"too little memory for a microbatch of {size} (CUDA out of memory. Tried" in message
    assert f"Lower device_train_microbatch_{lower}" in message and "more" not in message.split("(")[1].split(")")[0]


def test_train_metrics_are_those_that_composer_computes(overrides, tmp_path, monkeypatch):
    """At each step and at the end of an epoch, also after a resumption; no change to evaluation mode."""
    sizes = ["global_train_batch_size=100", "device_train_microbatch_size=40", f"max_duration={-(-TRAIN // 100) + 1}ba"]
    options = [*overrides, *sizes, "eval_interval=0", "save_interval=1ba"]
    switched, evaluate = [], MosaicBert.eval
    monkeypatch.setattr(MosaicBert, "eval", lambda self: switched.append(1) or evaluate(self))

    def lines(name, changes=(), kill_at=None):
        path = tmp_path / name
        fit([*options, f"save_folder={path}", f"loggers.metrics_file.path={path}/metrics.jsonl", *changes], kill_at)
        return [{k: v for k, v in line.items() if k.startswith("metrics/")} for line in logged(path)]

    lines("ours", kill_at=2)
    assert not switched
    got = lines("ours", ["autoresume=true"])
    monkeypatch.setattr(builders, "TrainMetrics", Callback)
    want = lines("composers")
    assert len(switched) > 2 * len(want) and got == want
    assert set(got[0]) == {"metrics/train/LanguageCrossEntropy", "metrics/train/MaskedAccuracy"}


# Weights cast once per step. Composer refuses autocast on a CPU, so the tests put it into the trainer.


class Casts(TorchDispatchMode):
    """How often each weight was cast, by its place in memory."""

    def __init__(self, weights):
        super().__init__()
        self.places, self.count = {w.data_ptr() for w in weights}, collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.places:
            self.count[args[0].data_ptr()] += 1
        return func(*args, **(kwargs or {}))


def fit_in_bf16(options, monkeypatch, *extra):
    """Of a run with autocast: what it computed, and for each step how often weights were cast."""
    monkeypatch.setattr(
        composer_trainer, "get_precision_context", lambda *_, **__: torch.autocast("cpu", torch.bfloat16)
    )
    trainer, watch, casts = trainer_of(options), Watch(), []

    def counted(batch, *args, whole=trainer._train_microbatches, **kwargs):
        with Casts(trainer.state.model.parameters()) as mode:
            loss = whole(batch, *args, **kwargs)
        casts.append(set(mode.count.values()))
        return loss

    monkeypatch.setattr(trainer, "_train_microbatches", counted)
    trainer.state.callbacks += [watch, *extra]
    with contextlib.closing(trainer):
        trainer.fit()
    computed = [watch.by_step, evaluation(trainer), watch.gradient.tolist(), weights_of(trainer).tolist()]
    return computed, casts


def nesting():
    """Autocast contexts that are open."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


SIX = ["device_train_microbatch_size=3", "save_folder=null", "eval_interval=2ba"]
"""Microbatches per step, and an evaluation between steps."""


@pytest.fixture
def want(overrides, monkeypatch):
    """What a run computes that casts in each microbatch."""
    computed, casts = fit_in_bf16([*overrides, *SIX], monkeypatch)
    assert casts == [{6}] * 4
    return computed


@pytest.fixture
def failed_run():
    """Of a run that failed within a step, and is still held, a context is open."""
    failed = CastWeightsOnce()
    failed.before_train_batch(None, None)
    yield
    failed.close(None, None)


@pytest.mark.parametrize("restarts", [False, True], ids=["", "a step that starts again"])
def test_weights_are_cast_once_per_step(restarts, want, overrides, monkeypatch):
    """Losses, evaluation, gradients and weights stay the same to the bit."""
    forward, calls = MosaicBert.forward, itertools.count()

    class Auto(Callback):
        """Too little memory in the second step, after two microbatches; the same microbatches again."""

        def before_train_batch(self, state, logger):
            state.auto_microbatching = True
            assert nesting() == 1

    def fails_once(self, batch):
        if self.training and next(calls) == 1 + 6 + 2:  # 1: MemoryProbe's
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch)

    if restarts:
        monkeypatch.setattr(MosaicBert, "forward", fails_once)
    got, casts = fit_in_bf16([*overrides, *SIX], monkeypatch, CastWeightsOnce(), *[Auto()] * restarts)
    assert casts == [{1}] * 4 and got == want


def test_weights_are_cast_once_per_step_after_a_run_that_failed(want, failed_run, overrides, monkeypatch):
    """Its context must not keep copies beyond a step."""
    got, casts = fit_in_bf16([*overrides, *SIX], monkeypatch, CastWeightsOnce())
    assert casts == [{1}] * 4 and got == want


def test_no_context_stays_open_after_an_exception(overrides, monkeypatch):
    def fails(self, batch, outputs):
        assert nesting() == 2  # ours and Composer's
        raise Killed

    monkeypatch.setattr(MosaicBert, "loss", fails)
    with pytest.raises(Killed):
        fit_in_bf16([*overrides, *SIX], monkeypatch, CastWeightsOnce())
    assert nesting() == 0


def test_train_metrics_do_not_run_the_model_again():
    """Without gradients that would leave copies of weights that have none."""
    outputs = object()
    assert MosaicBert.eval_forward(None, {}, outputs) is outputs


TWO_RANKS = """
import sys
import pytest, torch
from src.train.callbacks import CastWeightsOnce
from tests.train.test_callbacks import fit_in_bf16

with pytest.MonkeyPatch.context() as patch:
    want, _ = fit_in_bf16(sys.argv[1:], patch)
    got, casts = fit_in_bf16(sys.argv[1:], patch, CastWeightsOnce())
assert casts == [{1}] * 4 and got == want, casts
print("same")
"""


@pytest.mark.slow
def test_weights_are_cast_once_per_step_of_two_processes(overrides):
    world = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
    world["MASTER_PORT"] = free_port()
    command = [sys.executable, "-c", TWO_RANKS, *overrides, *SIX]
    environments = [environment(**world, RANK=rank, LOCAL_RANK=rank) for rank in range(2)]
    ranks = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for env in environments]
    try:
        assert [rank.communicate(timeout=120)[0].split("\n")[-2:] for rank in ranks] == [["same", ""]] * 2
    finally:
        for rank in ranks:
            rank.kill()


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


def test_epochs_count_in_parts(overrides, tmp_path, capsys):
    """Masking rate, and the share and time on the console, move within an epoch."""
    sizes = ["global_train_batch_size=100", "device_train_microbatch_size=100", "eval_interval=0"]
    run = ["max_duration=2ep", "mlm_probability={initial: 0.4, final: 0.1}", "loggers.console_line.interval=1ba"]
    fit([*overrides, *UNSAVED, *sizes, *run])
    rates = [line["masking/rate"] for line in logged(tmp_path)]
    done = [epoch + samples / TRAIN for epoch in (0, 1) for samples in (0, 100, 200, 300)]
    assert rates == pytest.approx([0.4 - 0.3 * share / 2 for share in done])
    printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    shares = [f"{share / 2:.1%}" for share in [*done[1:], 2]]
    assert [re.findall(r"\(([\d.]+%)\)", line)[0] for line in printed] == shares
    assert all(line.endswith(" left") for line in printed[:-1])


def test_console_line_refuses_an_unknown_interval(overrides):
    with pytest.raises(ConfigError, match=r"loggers\.console_line\.interval: .*hours"):
        trainer_of([*overrides, "loggers.console_line.interval=3hours"])
