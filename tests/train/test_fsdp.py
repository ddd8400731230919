"""FSDP: the same losses as without it, and checkpoints that resume with and without it."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.runs import DROPOUT, UNSAVED, fit, launch, logged, losses_of

FSDP = "parallelism_config={fsdp: {}}"
WITHOUT_EVALUATION = "eval_interval=0"  # evaluation leaves some weights gathered
CLIPPING = "algorithms.gradient_clipping={clipping_type: norm, clipping_threshold: 0.5}"


def test_fsdp_in_one_process_is_bit_identical(overrides):
    options = [*overrides, DROPOUT, CLIPPING, "device_train_microbatch_size=5", "save_folder=null", WITHOUT_EVALUATION]
    _, want, weights = fit(options)
    trainer, got, shards = fit([*options, FSDP])
    assert isinstance(shards, DTensor) and got.losses == want.losses
    torch.testing.assert_close(shards.full_tensor(), weights, rtol=0, atol=0)
    decoder = trainer.state.model.model.cls.predictions.decoder.weight
    assert decoder is trainer.state.model.model.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize(("first", "then"), [(True, True), (True, False), (False, True)])
def test_resume_with_or_without_fsdp(first, then, overrides):
    """Bit-identical in one process; reading weights_only, names and whole shapes are checked on the way."""
    options = [*overrides, DROPOUT, "save_overwrite=false", "autoresume=true", WITHOUT_EVALUATION]
    want, weights = losses_of([*options, *UNSAVED])
    killed, _ = losses_of([*options, *[FSDP] * first], kill_at=3)
    assert killed == {step: want[step] for step in (1, 2, 3)}
    got, same = losses_of([*options, *[FSDP] * then])
    assert got == {step: want[step] for step in (3, 4)}
    assert torch.equal(same.full_tensor() if then else same, weights)


# Two processes


def norms_of(folder):
    return [line["step/grad_norm"] for line in logged(folder) if "step/grad_norm" in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        [FSDP, DROPOUT, CLIPPING, "model.gradient_checkpointing=true"],
        ["parallelism_config={fsdp: {reshard_after_forward: false}}", "model.name=hf_bert"],
    ],
    ids=["mosaic_bert", "hf_bert"],
)
def test_two_processes_match_ddp(options, overrides, tmp_path):
    """Losses, gradient norms and evaluation, to fp32 rounding; one rank evaluates a sample more."""
    sizes = ["device_train_microbatch_size=3", "device_eval_batch_size=7"]
    run = [*overrides, *sizes, *options, "max_duration=8ba", "eval_interval=2ba"]
    want = launch(2, [*run, "parallelism_config=null"], tmp_path / "ddp")
    losses, evaluation, tokens = launch(2, run, tmp_path / "fsdp")
    assert len(losses) == 8 and losses == pytest.approx(want[0], rel=1e-6)
    assert evaluation == pytest.approx(want[1], rel=1e-6) and tokens == want[2]
    assert norms_of(tmp_path / "fsdp") == pytest.approx(norms_of(tmp_path / "ddp"), rel=1e-5)


@pytest.mark.slow
def test_two_processes_resume_bit_identically(overrides, tmp_path):
    """After 4 of 8 steps and an evaluation, which leaves weights gathered; without FSDP to fp32 rounding."""
    saving = ["autoresume=true", "save_overwrite=false", "save_interval=4ba", "eval_interval=2ba"]
    schedule = ["scheduler.t_warmup=1ba", "scheduler.t_decay=1ba"]  # max_duration does not change these
    run = [*overrides, DROPOUT, FSDP, *schedule, *saving, "max_duration=8ba"]
    want, want_eval, _ = launch(2, run, tmp_path / "whole")
    for name, last in (("sharded", FSDP), ("whole weights", "parallelism_config=null")):
        launch(2, [*run, "max_duration=4ba"], tmp_path / name)
        losses, evaluation, _ = launch(2, [*run, "resume.allow=[max_duration]", last], tmp_path / name)
        if last == FSDP:
            assert losses == want and evaluation == want_eval
        assert losses == pytest.approx(want, rel=1e-6) and evaluation == pytest.approx(want_eval, rel=1e-6)
