"""Runs of the trainer in this process: the recipe's YAMLs shrunk, and what a run may not depend on."""

import datetime
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from composer.core import Callback

import main
from src import checkpoint
from src.config import load
from tests.conftest import MAX_SEQ_LEN

TINY = [
    "model.model_config.hidden_size=24",
    "model.model_config.num_hidden_layers=2",
    "model.model_config.num_attention_heads=3",
    "model.model_config.intermediate_size=40",
    "model.model_config.hidden_dropout_prob=0.0",
]


@pytest.fixture
def overrides(token_shards, tokenizer_folder, tmp_path):
    """A run of 4 steps of 16 samples on the CPU."""
    return [
        *TINY,
        f"data_local={token_shards}",
        f"tokenizer_name={tokenizer_folder}",
        f"max_seq_len={MAX_SEQ_LEN}",
        "train_loader.num_workers=0",
        "train_loader.num_canonical_nodes=1",
        "eval_loader.num_workers=0",
        "max_duration=4ba",
        "eval_interval=100ba",
        "global_train_batch_size=16",
        "device_train_microbatch_size=16",
        "device_eval_batch_size=32",
        "precision=fp32",
        "progress_bar=false",
        f"save_folder={tmp_path}/checkpoints",
        "save_interval=2ba",
        f"loggers.metrics_file.path={tmp_path}/metrics.jsonl",
    ]


class Losses(Callback):
    """Losses of all steps, and the gradient of the last."""

    def __init__(self):
        self.losses, self.gradient = [], None

    def after_train_batch(self, state, logger):
        self.gradient = torch.cat([p.grad.flatten() for p in state.model.parameters()])

    def batch_end(self, state, logger):
        self.losses.append(state.total_loss_dict["loss/train/total"])


def fit(yaml, overrides):
    trainer = main.build_trainer(load(yaml, overrides))
    losses = Losses()
    trainer.state.callbacks.append(losses)
    trainer.fit()
    trainer.close()
    weights = torch.cat([p.detach().flatten() for p in trainer.state.model.parameters()])
    return trainer, losses, weights


def evaluation(trainer):
    return {name: metric.compute().item() for name, metric in trainer.state.eval_metrics["eval"].items()}


@pytest.mark.parametrize("yaml", sorted(Path("yamls").glob("*.yaml")), ids=lambda p: p.stem)
def test_each_yaml_runs_shrunk(yaml, overrides, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "tensorboard" in (Path(main.__file__).parent / yaml).read_text():
        overrides = [*overrides, f"loggers.tensorboard.log_dir={tmp_path}/tensorboard"]
    main.main([str(Path(main.__file__).parent / yaml), *overrides])
    printed = capsys.readouterr()
    assert "LanguageCrossEntropy=" in printed.out and "MaskedAccuracy=" in printed.out
    saved = (tmp_path / "checkpoints" / "config.yaml").read_text()
    assert "# torch: " in saved and "# commit: " in saved and saved.strip() in printed.err
    assert load(str(tmp_path / "checkpoints" / "config.yaml")).max_duration == "4ba"
    assert (tmp_path / "checkpoints" / "latest-rank0.pt").exists()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5  # 4 steps and the evaluation at the end


@pytest.mark.parametrize("yaml", ["yamls/mosaic_bert.yaml", "yamls/hf_bert.yaml"])
def test_loss_and_gradients_do_not_depend_on_the_microbatch(yaml, overrides):
    options = [*overrides, "save_folder=null", "autoresume=false", "max_duration=2ba"]
    if "hf" in yaml:
        options.append("model.model_config.attention_probs_dropout_prob=0.0")
    _, want, _ = fit(yaml, options)
    for size in (1, 2, 5):
        _, got, _ = fit(yaml, [*options, f"device_train_microbatch_size={size}"])
        assert got.losses == pytest.approx(want.losses, rel=1e-6)
        torch.testing.assert_close(got.gradient, want.gradient, rtol=1e-4, atol=1e-6)


def test_evaluation_does_not_depend_on_batches_workers_or_the_form_of_the_shards(overrides, text_shards):
    options = [*overrides, "save_folder=null", "max_duration=1ba"]
    want = evaluation(fit("yamls/quickstart.yaml", options)[0])
    for change in (
        ["device_eval_batch_size=7"],
        ["eval_loader.num_workers=2", "device_eval_batch_size=10"],
        [f"eval_loader.local={text_shards}"],
    ):
        assert evaluation(fit("yamls/quickstart.yaml", [*options, *change])[0]) == pytest.approx(want, rel=1e-6)


def test_training_and_evaluation_on_one_split(overrides):
    """What the README suggests to those who only want to profile: split val for both."""
    options = [*overrides, "save_folder=null", "train_loader.split=val", "eval_interval=2ba"]
    trainer, losses, _ = fit("yamls/quickstart.yaml", options)
    assert len(losses.losses) == 4 and evaluation(trainer)["LanguageCrossEntropy"] > 0


def test_scheduled_rate_and_worker_count(overrides, tmp_path):
    """A schedule from 0.3 to 0.3 is the constant 0.3, in workers too; a falling one masks less and less."""
    options = [*overrides, "save_folder=null"]
    _, want, weights = fit("yamls/quickstart.yaml", options)
    schedule = "mlm_probability={initial: 0.3, final: 0.3}"
    _, got, same = fit("yamls/quickstart.yaml", [*options, schedule, "train_loader.num_workers=2"])
    assert got.losses == want.losses and torch.equal(weights, same)
    _, other, _ = fit("yamls/quickstart.yaml", [*options, "mlm_probability={initial: 0.3, final: 0.1}"])
    assert other.losses[0] == want.losses[0] and other.losses[1:] != want.losses[1:]
    rates = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if "masking/rate" in line]
    assert len(rates) == 4


def test_loss_falls(overrides):
    options = [*overrides, "save_folder=null", "max_duration=60ba", "optimizer.lr=0.01", "global_train_batch_size=64"]
    _, losses, _ = fit("yamls/quickstart.yaml", [*options, "device_train_microbatch_size=64"])
    assert np.mean(losses.losses[-5:]) < np.mean(losses.losses[:3]) - 0.7


def test_resume_goes_on_as_if_nothing_had_happened(overrides, tmp_path):
    """Without dropout; two epochs of 300 samples. The lines of the metrics file too."""
    options = [*overrides, "global_train_batch_size=100", "device_train_microbatch_size=50", "max_duration=6ba"]
    _, want, weights = fit("yamls/quickstart.yaml", [*options, f"save_folder={tmp_path}/a"])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()

    (tmp_path / "b").mkdir()
    for name in ("ep1-ba4-rank0.pt",):
        os.link(tmp_path / "a" / name, tmp_path / "b" / "latest-rank0.pt")
    resumed = [f"save_folder={tmp_path}/b", "autoresume=true", "save_overwrite=false"]
    trainer, got, same = fit("yamls/quickstart.yaml", [*options, *resumed])
    assert got.losses == want.losses[4:] and torch.equal(weights, same)
    again = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [line.split(",")[:3] for line in again] == [line.split(",")[:3] for line in lines]


def test_speed_and_mfu_are_logged(overrides, tmp_path):
    """Of real tokens; the FLOPs of a step are the model's own count."""
    monitor = ["callbacks.speed_monitor.window_size=1", "callbacks.speed_monitor.gpu_flops_available=1e12"]
    quiet = ["save_folder=null", "autoresume=false", "eval_interval=0"]
    trainer, _, _ = fit("yamls/mosaic_bert.yaml", [*overrides, *monitor, *quiet])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    last = lines[3]
    assert 0 < last["throughput/device/mfu"] < 1
    step = last["seconds"] - lines[2]["seconds"]
    assert last["throughput/tokens_per_sec"] == pytest.approx((last["token"] - lines[2]["token"]) / step, rel=1e-3)
    flops = trainer.state.model.flops_per_batch(trainer.state.batch)
    assert last["throughput/flops_per_sec"] == pytest.approx(flops / step, rel=1e-3)


def test_weights_of_another_run(overrides, tmp_path):
    options = [*overrides, "max_duration=2ba"]
    _, _, weights = fit("yamls/quickstart.yaml", [*options, f"save_folder={tmp_path}/a"])
    load_from = [f"load_path={tmp_path}/a/latest-rank0.pt", "load_weights_only=true", "save_folder=null"]
    trainer = main.build_trainer(load("yamls/quickstart.yaml", [*options, *load_from]))
    assert trainer.state.timestamp.batch == 0
    assert torch.equal(torch.cat([p.detach().flatten() for p in trainer.state.model.parameters()]), weights)


class Attack:
    def __reduce__(self):
        return os.mkdir, (self.path,)

    def __init__(self, path):
        self.path = path


def test_a_checkpoint_cannot_run_commands(overrides, tmp_path):
    crafted, proof = tmp_path / "crafted.pt", tmp_path / "it-ran"
    torch.save({"state": Attack(str(proof)), "rng": None}, crafted)
    with pytest.raises(Exception, match="(?i)weights.only|Unsupported"):
        main.build_trainer(load("yamls/quickstart.yaml", [*overrides, "save_folder=null", f"load_path={crafted}"]))
    assert not proof.exists()
    checkpoint.load_as_data()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(crafted, weights_only=False)
    assert not proof.exists()


def test_what_checkpoints_hold_is_allowed(tmp_path):
    checkpoint.load_as_data()
    held = {"time": datetime.timedelta(seconds=1), "numpy": np.random.get_state(), "version": torch.__version__}
    torch.save(held, tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt", weights_only=False)["time"] == held["time"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("precission=fp32", "precission: unknown; did you mean 'precision'?"),
        ("optimizer.beta2=0.9", "optimizer.adamw: unexpected 'beta2'"),
        ("tokenizer_name=./nowhere", "there is no such folder"),
        ("max_seq_len=64", "max_seq_len is 64"),
        ("train_loader.split=nothing", "holds no dataset (no index.json); splits there: train, val"),
    ],
)
def test_a_users_mistake_is_one_clear_message(change, message, overrides, capsys):
    with pytest.raises(SystemExit) as exit:
        main.run(["yamls/quickstart.yaml", *overrides, change])
    assert message in str(exit.value) and str(exit.value).startswith("main.py: ")


def test_batch_that_does_not_divide(overrides, monkeypatch):
    monkeypatch.setattr(main.builders.dist, "get_world_size", lambda: 3)
    with pytest.raises(main.ConfigError, match="16 is not a multiple of the 3 devices"):
        main.builders.device_train_batch_size(load("yamls/quickstart.yaml", overrides))


def launch(processes, overrides, folder):
    """Losses of the steps, and the last evaluation, of a run of ``composer -n``."""
    bin = Path(sys.executable).parent
    command = [bin / "composer", "-n", str(processes), "main.py", "yamls/quickstart.yaml", *overrides]
    metrics = f"loggers.metrics_file.path={folder}/metrics.jsonl"
    env = {**os.environ, "PATH": f"{bin}:{os.environ['PATH']}"}
    done = subprocess.run([*command, f"save_folder={folder}", metrics], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss/train/total"] for line in lines if "loss/train/total" in line]
    return losses, lines[-1]["metrics/eval/LanguageCrossEntropy"], lines[-1]["token"]


@pytest.mark.slow
def test_losses_do_not_depend_on_the_number_of_processes(overrides, tmp_path):
    """composer -n 1, 2 and 4 on the CPU: the same global batches, losses and evaluation, to fp32 rounding."""
    options = [*overrides, "global_train_batch_size=32", "device_train_microbatch_size=4", "device_eval_batch_size=7"]
    want, want_eval, tokens = launch(1, options, tmp_path / "1")
    assert len(want) == 4
    for processes in (2, 4):
        got, got_eval, got_tokens = launch(processes, options, tmp_path / str(processes))
        assert got == pytest.approx(want, rel=1e-5)
        assert got_eval == pytest.approx(want_eval, rel=1e-5)
        assert got_tokens == tokens


def test_composer_launches(overrides, tmp_path):
    losses, _, _ = launch(1, [*overrides, "max_duration=1ba"], tmp_path / "run")
    assert len(losses) == 1
