"""A run computes the same on 1, 2, 3 and 4 processes: losses, gradients, samples, to fp32 rounding."""

import os

import pytest

from tests.runs import DROPOUT, fit, logged, start, wait
from tests.train.test_resume import kill, wait_for

SAME = ("batch", "sample", "token")
CLOSE = (
    *("loss/train/total", "step/grad_norm", "metrics/eval/LanguageCrossEntropy", "metrics/eval/MaskedTokens"),
    *("metrics/train/LanguageCrossEntropy", "metrics/train/MaskedAccuracy"),
)
STEPS = 31


@pytest.fixture
def options(overrides):
    """A step more than an epoch, few masked tokens, batches that fill neither the epoch nor the microbatches."""
    changes = ["mlm_probability=0.002", "global_train_batch_size=12", "device_train_microbatch_size=4"]
    times = [f"max_duration={STEPS}ba", "save_interval=4ba", "eval_interval=1ep"]
    return [*overrides, DROPOUT.replace("0.1", "0.0"), *changes, *times, "callbacks.step_monitor={}", "autoresume=true"]


@pytest.fixture
def want(options, tmp_path):
    """The lines of the metrics file of one process."""
    fit([*options, f"save_folder={tmp_path}/one", f"loggers.metrics_file.path={tmp_path}/one/metrics.jsonl"])
    lines = logged(tmp_path / "one")
    steps = [line for line in lines if "loss/train/total" in line]
    assert len(steps) == STEPS and len(lines) > STEPS
    masked = [line["step/masked_tokens"] for line in steps]
    assert 0 in masked and 1 in masked, "global batches without masked tokens, and with fewer than processes"
    return lines


def check(got, want):
    steps, expected = ([tuple(line[name] for name in SAME) for line in lines] for lines in (got, want))
    assert steps == expected
    for name in CLOSE:
        mine, theirs = ({line["batch"]: line[name] for line in lines if name in line} for lines in (got, want))
        none = {step for step, value in theirs.items() if value is None}  # metrics of steps without masked tokens
        assert none == {step for step, value in mine.items() if value is None}
        mine, theirs = ({k: v for k, v in values.items() if k not in none} for values in (mine, theirs))
        assert theirs and mine == pytest.approx(theirs, rel=2e-5, abs=1e-6), name


@pytest.mark.parametrize("processes", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_loss_gradient_and_samples_do_not_depend_on_the_number_of_processes(processes, options, want, tmp_path):
    folder = tmp_path / "more"
    wait(start(processes, options, folder), folder)
    check(logged(folder), want)


@pytest.mark.slow
def test_muon_does_not_depend_on_the_number_of_processes(options, tmp_path):
    """Each process orthogonalizes a share of the matrices."""
    run, one, two = [*options, "optimizer={name: muon, lr: 3e-3}"], tmp_path / "one", tmp_path / "two"
    fit([*run, f"save_folder={one}", f"loggers.metrics_file.path={one}/metrics.jsonl"])
    wait(start(2, run, two), two)
    check(logged(two), logged(one))


@pytest.mark.slow
def test_processes_may_have_different_numbers_of_microbatches(options, want, tmp_path):
    """By a budget of tokens: six sequences of a process, of 3 to 32 tokens each, make 1 to 4 microbatches."""
    folder = tmp_path / "budget"
    wait(start(2, [*options, "device_train_microbatch_tokens=50"], folder), folder)
    check(logged(folder), want)


@pytest.mark.slow
def test_resume_on_another_number_of_processes(options, want, tmp_path):
    """1, 4, 2 and 3 processes in turn, the last one over the end of the epoch."""
    folder = tmp_path / "killed"
    for processes, step in ((1, 6), (4, 13), (2, 21)):
        launchers = start(processes, options, folder)
        wait_for(step, launchers, folder)
        kill(launchers, os.killpg)
    wait(start(3, options, folder), folder)
    check(logged(folder), want)
