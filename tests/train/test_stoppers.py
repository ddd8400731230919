"""early_stopper and threshold_stopper: which value is better, what is refused, and that they end a run."""

import pytest
import torch
from composer import callbacks

from src.common.errors import ConfigError
from src.train import builders
from src.train.config import load
from src.train.stoppers import EarlyStopper, ThresholdStopper, better
from src.train.validate import validate
from tests.runs import QUICKSTART, UNSAVED, fit, logged

EVERY_STEP = [*UNSAVED, "eval_interval=1ba", "max_duration=8ba", "callbacks.lr_monitor={}"]
LOSS = "metrics/eval/LanguageCrossEntropy"


def stopper(kind, **options):
    return f"callbacks.{kind}_stopper={{{', '.join(f'{name}: {value}' for name, value in options.items())}}}"


@pytest.mark.parametrize(
    ("monitor", "comparison"),
    [
        ("LanguageCrossEntropy", "less"),
        ("LanguagePerplexity", "less"),
        ("loss", "less"),
        ("MaskedAccuracy", "greater"),
        ("MaskedTokens", "greater"),
    ],
)
def test_losses_fall_and_accuracies_rise(monitor, comparison):
    assert better(monitor) == comparison


@pytest.mark.parametrize("monitor", ["LanguageCrossEntropy", "MaskedAccuracy"])
@pytest.mark.parametrize("lr", ["0.01", "1.0e-12"])
def test_early_stopper_ends_a_run_that_no_longer_improves(monitor, lr, overrides, tmp_path):
    """At the high rate the loss falls in each step, at the low one it stays."""
    options = [f"optimizer.lr={lr}", "max_duration=6ba", "scheduler.t_warmup=0dur", "scheduler.t_decay=0dur"]
    early = stopper("early", monitor=monitor, dataloader_label="eval", patience="1ba", min_delta=1e-4)
    trainer, watch, _ = fit([*overrides, *EVERY_STEP, *options, early])
    values = [line[LOSS] for line in logged(tmp_path) if LOSS in line]
    if lr == "0.01" and monitor == "LanguageCrossEntropy":
        assert values == sorted(values, reverse=True), values
        assert len(watch.losses) == 6
    if lr != "0.01":
        assert len(watch.losses) == 3  # the first value, and two that are no better


@pytest.mark.parametrize(
    ("label", "monitor", "threshold", "steps"),
    [
        ("eval", "LanguageCrossEntropy", 1.0, 8),
        ("eval", "LanguageCrossEntropy", 100.0, 1),
        ("eval", "LanguagePerplexity", 2.0, 8),
        ("eval", "MaskedAccuracy", 0.99, 8),
        ("train", "LanguageCrossEntropy", 1.0, 8),
        ("train", "LanguageCrossEntropy", 100.0, 1),
        ("train", "MaskedAccuracy", -1.0, 1),
    ],
)
def test_threshold_stopper_ends_a_run_at_a_better_value(label, monitor, threshold, steps, overrides):
    on_batch = {"stop_on_batch": "true"} if label == "train" else {}
    options = stopper("threshold", monitor=monitor, dataloader_label=label, threshold=threshold, **on_batch)
    _, watch, _ = fit([*overrides, *EVERY_STEP, options])
    assert len(watch.losses) == steps


def test_a_given_comparison_counts():
    assert EarlyStopper("MaskedAccuracy", "eval", "less").comp_func is torch.less
    assert ThresholdStopper("LanguageCrossEntropy", "eval", 1.0, "gt").comp_func is torch.greater


def test_stoppers_are_composers():
    """Others find them by class."""
    assert issubclass(EarlyStopper, callbacks.EarlyStopper) and issubclass(ThresholdStopper, callbacks.ThresholdStopper)
    assert builders.CALLBACKS["early_stopper"] is EarlyStopper


def test_a_resumed_run_counts_the_patience_on(overrides, tmp_path):
    early = stopper("early", monitor="LanguageCrossEntropy", dataloader_label="eval", patience="3ba", min_delta=1e-4)
    options = [*overrides, "optimizer.lr=1.0e-12", "max_duration=8ba", "eval_interval=1ba", early, "autoresume=true"]
    _, whole, _ = fit([*options, f"save_folder={tmp_path}/whole"])
    assert len(whole.losses) == 5
    fit([*options, "save_interval=1ba"], kill_at=4)  # step 3 is saved
    _, resumed, _ = fit([*options, "save_interval=1ba"])
    assert list(resumed.by_step) == [4, 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"monitor": "LanguageCrosEntropy"}, "monitor: no metric 'LanguageCrosEntropy'; did you mean 'LanguageCross"),
        ({"dataloader_label": "evl"}, "dataloader_label: no data set 'evl'; did you mean 'eval'"),
        ({"dataloader_label": "wiki"}, "dataloader_label: no data set 'wiki'; known: eval, own, train"),
        ({"monitor": "MaskedTokns", "dataloader_label": "train"}, "known: LanguageCrossEntropy, MaskedAccuracy"),
        ({"patience": "100sp"}, "callbacks.early_stopper.patience: expected ba or ep, got '100sp'"),
        ({"patience": "soon"}, "callbacks.early_stopper.patience: expected a time such as"),
        ({"comp": "smaller"}, "callbacks.early_stopper.comp: expected one of less, lt, greater, gt or null"),
        ({"eval_interval": 0}, "has no effect on 'eval' with eval_interval: 0"),
    ],
)
@pytest.mark.parametrize("check", [builders.build_trainer, validate])
def test_a_stopper_that_could_never_act_is_refused(check, changes, message, overrides):
    interval = changes.get("eval_interval", "1ba")
    changes = {name: value for name, value in changes.items() if name != "eval_interval"}
    early = stopper("early", **{"monitor": "LanguageCrossEntropy", "dataloader_label": "eval", **changes})
    options = [*overrides, *UNSAVED, f"eval_interval={interval}", "eval_loaders={own: {split: val}}", early]
    with pytest.raises(ConfigError) as error:
        check(load(QUICKSTART, options))
    assert message in str(error.value)
