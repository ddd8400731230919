"""FSDP: weights, gradients and the optimizer's state in shards; the same losses as without, whoever resumes what."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from src.bert_layers import BertForMaskedLM
from src.train.weights import load_pretrained
from tests.runs import DROPOUT, UNSAVED, fit, launch, logged, losses_of

FSDP = "parallelism_config={fsdp: {}}"
WITHOUT_EVALUATION = "eval_interval=0"  # which would leave part of the weights gathered
CLIPPING = "algorithms.gradient_clipping={clipping_type: norm, clipping_threshold: 0.5}"


def test_one_process_computes_the_same_with_shards(overrides):
    options = [*overrides, DROPOUT, CLIPPING, "device_train_microbatch_size=5", "save_folder=null", WITHOUT_EVALUATION]
    _, want, weights = fit(options)
    trainer, got, shards = fit([*options, FSDP])
    assert isinstance(shards, DTensor) and got.losses == want.losses
    torch.testing.assert_close(shards.full_tensor(), weights, rtol=0, atol=0)
    decoder = trainer.state.model.model.cls.predictions.decoder.weight
    assert decoder is trainer.state.model.model.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize(("first", "then"), [(True, True), (True, False), (False, True)])
def test_a_restart_with_or_without_shards(first, then, overrides, tmp_path):
    """Bit for bit in one process, from a checkpoint of either to either."""
    options = [*overrides, DROPOUT, "save_overwrite=false", "autoresume=true", WITHOUT_EVALUATION]
    want, weights = losses_of([*options, *UNSAVED])
    killed, _ = losses_of([*options, *[FSDP] * first], kill_at=3)
    assert killed == {step: want[step] for step in (1, 2, 3)}
    got, same = losses_of([*options, *[FSDP] * then])
    assert got == {step: want[step] for step in (3, 4)}
    assert torch.equal(same.full_tensor() if then else same, weights)


def test_a_checkpoint_of_shards_is_read_like_any_other(overrides, tmp_path):
    """By export and fine-tuning, and by --eval without FSDP."""
    _, _, shards = fit([*overrides, FSDP, WITHOUT_EVALUATION])
    model = load_pretrained(str(tmp_path / "checkpoints"), BertForMaskedLM)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(weights, shards.full_tensor(), rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Two processes
# ----------------------------------------------------------------------------------------------------------------------


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
def test_two_processes_compute_what_ddp_computes(options, overrides, tmp_path):
    """Losses, gradient norms and evaluation, to fp32 rounding; one rank has a sample more to evaluate."""
    sizes = ["device_train_microbatch_size=3", "device_eval_batch_size=7"]
    run = [*overrides, *sizes, *options, "max_duration=8ba", "eval_interval=2ba"]
    want = launch(2, [*run, "parallelism_config=null"], tmp_path / "ddp")
    losses, evaluation, tokens = launch(2, run, tmp_path / "fsdp")
    assert len(losses) == 8 and losses == pytest.approx(want[0], rel=1e-6)
    assert evaluation == pytest.approx(want[1], rel=1e-6) and tokens == want[2]
    assert norms_of(tmp_path / "fsdp") == pytest.approx(norms_of(tmp_path / "ddp"), rel=1e-5)


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(overrides, tmp_path):
    """After 4 of 8 steps, right after an evaluation, which leaves weights gathered; without FSDP to fp32 rounding."""
    saving = ["autoresume=true", "save_overwrite=false", "save_interval=4ba", "eval_interval=2ba"]
    schedule = ["scheduler.t_warmup=1ba", "scheduler.t_decay=1ba"]  # which max_duration does not stretch
    run = [*overrides, DROPOUT, FSDP, *schedule, *saving, "max_duration=8ba"]
    want, want_eval, _ = launch(2, run, tmp_path / "whole")
    for name, last in (("sharded", FSDP), ("whole weights", "parallelism_config=null")):
        launch(2, [*run, "max_duration=4ba"], tmp_path / name)
        losses, evaluation, _ = launch(2, [*run, "resume.allow=[max_duration]", last], tmp_path / name)
        if last == FSDP:
            assert losses == want and evaluation == want_eval
        assert losses == pytest.approx(want, rel=1e-6) and evaluation == pytest.approx(want_eval, rel=1e-6)
