import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
import yaml
from composer.core import Time, Timestamp
from composer.devices import DeviceCPU
from composer.loggers import TensorboardLogger
from composer.optim import DecoupledAdamW
from composer.utils.parallelism import FSDP2Config

from src.common.errors import ConfigError
from src.data.masking import mask_batch
from src.data.packing import Microbatch, SplitBatch
from src.train import builders, config, models, optim
from src.train.data import build_train_data
from src.train.models import padded_vocab_size
from src.train.schema import Component, build, check_options
from src.train.validate import validate
from tests.conftest import YAMLS
from tests.runs import ADAMW

SECTIONS = {
    "model": {name: kind.options for name, kind in models.KINDS.items()},
    "optimizer": optim.OPTIMIZERS,
    "scheduler": optim.SCHEDULERS,
    "callbacks": builders.CALLBACKS,
    "loggers": builders.LOGGERS,
    "algorithms": builders.ALGORITHMS,
}


def model_of(name, tokenizer, model_config, **options):
    run = config.load("yamls/quickstart.yaml")
    model = Component(name, {"model_config": model_config, **options})
    return models.build_model(dataclasses.replace(run, model=model), tokenizer)


def options_of(tree):
    """(section, component, option) of every option of a component in a YAML."""
    for section in ("model", "optimizer", "scheduler"):
        yield from ((section, tree[section]["name"], option) for option in tree[section] if option != "name")
    for section in ("callbacks", "loggers", "algorithms"):
        for name, options in (tree.get(section) or {}).items():
            yield from ((section, name, option) for option in options or {})


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_each_option_misspelt_is_refused(path, tokenizer):
    tree = yaml.safe_load(path.read_text())
    given = {"optimizer": ["model"]}
    for section, name, option in options_of(tree):
        with pytest.raises(ConfigError, match=f"{section}.{name}: unexpected '{option}x'.*it takes"):
            check_options(f"{section}.{name}", SECTIONS[section][name], {option + "x": 1}, given.get(section, []))
    model_config = tree["model"]["model_config"]
    for option in model_config:
        misspelt = {k + "x" if k == option else k: v for k, v in model_config.items()}
        with pytest.raises(ConfigError, match=f"model.model_config: unexpected '{option}x'"):
            model_of(tree["model"]["name"], tokenizer, misspelt)


def test_loggers_of_services_take_any_option():
    check_options("loggers.neptune", builders.LOGGERS["neptune"], {"anything": 1}, [])


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        *((f"{section}.nonsense", {}, f"{section}: unknown 'nonsense'") for section in SECTIONS),
        ("optimizer.adam", {}, "did you mean 'adamw'"),
        ("callbacks.lr_monitor", {"window": 3}, "callbacks.lr_monitor: unexpected 'window'.*it takes nothing"),
        (
            "optimizer.decoupled_adamw",
            {"beta2": 0.9},
            "adamw: unexpected 'beta2'.*missing 'lr'; it takes lr, betas, eps, weight_decay, decay_matrices_only$",
        ),
        (
            "optimizer.muon",
            {"nesterov": True},
            "unexpected 'nesterov'.*missing 'lr'; it takes lr, momentum, betas, eps, w",
        ),
        ("optimizer.decoupled_adamw", {"lr": 0.0}, "optimizer.decoupled_adamw.lr: expected a positive number, got 0"),
    ],
)
def test_build_refuses(path, options, message):
    section, name = path.split(".")
    given = {"model": torch.nn.Linear(2, 2)} if section == "optimizer" else {}
    with pytest.raises(ConfigError, match=message):
        build(section, SECTIONS[section], Component(name, options), **given)


SHAPE = {"hidden_size": 12, "num_hidden_layers": 1}


def test_vocabulary_is_the_tokenizers_rounded_up_to_a_multiple_of_64(tokenizer):
    model = model_of("mosaic_bert", tokenizer, SHAPE)
    assert model.config.vocab_size == padded_vocab_size(tokenizer) and model.config.vocab_size % 64 == 0
    assert 0 <= model.config.vocab_size - len(tokenizer) < 64


@pytest.mark.parametrize(
    ("name", "model_config", "options", "message"),
    [
        ("mosaic_bert", {"vocab_size": 10}, {}, "vocab_size: expected at least the tokenizer's 1000, got 10"),
        ("hf_bert", {"max_position_embeddings": 32}, {}, "64 is more than the model's 32 positions"),
        ("mosaic_bert", SHAPE, {"attention": "nope"}, "unknown attention 'nope'"),
        ("mosaic_bert", SHAPE, {"kernels": "nope"}, "unknown kernels 'nope'; expected one of auto, triton, torch"),
        ("mosaic_bert", {"attention": "torch"}, {}, "model.model_config.attention: it is model.attention"),
        ("mosaic_bert", {"hidden_size": 10}, {}, "not a multiple"),
        ("mosaic_bert", "abc", {}, "model.model_config: expected keys and values, got 'abc'"),
        ("hf_bert", 5, {}, "model.model_config: expected keys and values, got 5"),
    ],
)
def test_model_refuses_settings_without_effect(name, model_config, options, message, tokenizer):
    with pytest.raises(ConfigError, match=message):
        model_of(name, tokenizer, model_config, **options)


@pytest.mark.parametrize("options", [{"half_life": "1ep"}, {"half_life": "2ep", "update_interval": "1ep"}])
def test_average_of_weights_by_epochs_is_refused(options):
    with pytest.raises(ConfigError, match="algorithms.ema: half_life and update_interval: expected ba, got"):
        build("algorithms", builders.ALGORITHMS, Component("ema", options))


def test_algorithms_callbacks_and_loggers_by_name(tmp_path, tokenizer):
    clipping = "algorithms.gradient_clipping={clipping_type: norm, clipping_threshold: 1.0}"
    options = [clipping, f"loggers.tensorboard.log_dir={tmp_path}", "mlm_probability={initial: 0.3, final: 0.15}"]
    run = config.load("yamls/mosaic_bert.yaml", options)
    algorithms = builders.build_all("algorithms", builders.ALGORITHMS, run.algorithms)
    assert [type(a).__name__ for a in algorithms] == ["GradientClipping"]
    model = model_of("mosaic_bert", tokenizer, SHAPE)
    names = [type(c).__name__ for c in builders.build_callbacks(run, tokenizer, model)]
    from_yaml = ["StepMonitor", "LRMonitor", "MemoryMonitor", "RuntimeEstimator"]
    of_every_run = ["Reseed", "TrainMetrics", "StopOnSilentFailure", "MemoryProbe"]
    assert names == ["RunEnd", *from_yaml, *of_every_run, "CastWeightsOnce", "ScheduledMasking"]
    loggers = builders.build_all("loggers", builders.LOGGERS, run.loggers)
    assert [type(logger).__name__ for logger in loggers] == ["ConsoleLine", "MetricsFile", "TensorboardLogger"]
    assert isinstance(loggers[2], TensorboardLogger) and loggers[2].log_dir == str(tmp_path)


@pytest.mark.parametrize(
    "override", ["precision=fp32", "parallelism_config={fsdp: {}}", "model.gradient_checkpointing=true"]
)
def test_weights_are_cast_in_each_microbatch(override, tokenizer):
    run = config.load("yamls/mosaic_bert.yaml", [override])
    built = builders.build_callbacks(run, tokenizer, model_of("mosaic_bert", tokenizer, SHAPE))
    assert "CastWeightsOnce" not in [type(c).__name__ for c in built]


# FSDP; test_fsdp.py runs it.


def fsdp(*overrides):
    run = config.load("yamls/quickstart.yaml", [*ADAMW, "parallelism_config={fsdp: {}}", *overrides])
    return builders.build_parallelism(run)


def test_fsdp_is_fsdp2_with_whole_checkpoints_and_fp32_weights():
    assert builders.build_parallelism(config.load("yamls/quickstart.yaml")) is None
    given = fsdp()["fsdp"]
    assert isinstance(given, FSDP2Config) and given.reshard_after_forward is True
    assert (given.state_dict_type, given.mixed_precision) == ("full", "FULL")
    assert fsdp("parallelism_config.fsdp.reshard_after_forward=false")["fsdp"].reshard_after_forward is False


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallelism_config={tp: {}}", "expected {fsdp: {...}}, got {'fsdp': {}, 'tp': {}}"),
        ("parallelism_config={fsdp: null}", "expected {fsdp: {...}}, got {'fsdp': None}"),
        ("parallelism_config.fsdp.reshard_after_foward=false", "unknown key; did you mean 'reshard_after_forward'?"),
        ("parallelism_config.fsdp.reshard_after_forward=2", "reshard_after_forward: expected true or false, got 2"),
        ("parallelism_config.fsdp.sharding_strategy=FULL_SHARD", "sharding_strategy: reshard_after_forward: true is"),
        ("parallelism_config.fsdp.mixed_precision=PURE", "mixed_precision: weights are gathered in fp32"),
        ("parallelism_config.fsdp.state_dict_type=sharded", "state_dict_type: checkpoints hold full weights"),
        ("parallelism_config.fsdp.cpu_offload=true", "cpu_offload: an option of FSDP1, or without effect"),
        ("algorithms.ema.half_life=1ba", "algorithms.ema: Composer's cannot average sharded weights"),
        (
            "optimizer={name: muon, lr: 1e-3}",
            "optimizer.name: muon needs whole matrices, and FSDP shards them; use adamw",
        ),
        ("callbacks.optimizer_monitor={}", "optimizer_monitor: Composer's logs norms of one process's shards"),
        ("device_train_microbatch_size=auto", "size: give a number. Composer supports auto for FSDP1"),
        ("device_train_microbatch_tokens=65536", "tokens: processes would run different numbers of microbatches"),
    ],
)
def test_fsdp_refuses(override, message):
    with pytest.raises(ConfigError) as error:
        fsdp(override)
    assert message in str(error.value)


def test_fsdp_names_all_faults_in_one_error():
    clipping = "algorithms.gradient_clipping={clipping_type: adaptive, clipping_threshold: 0.1}"
    with pytest.raises(ConfigError) as error:
        fsdp(clipping, "algorithms.swa={}", "parallelism_config.fsdp.forward_prefetch=true")
    paths = [line.strip().split(": ")[0] for line in str(error.value).splitlines()[1:]]
    options = ["parallelism_config.fsdp.forward_prefetch", "algorithms.swa"]
    assert paths == [*options, "algorithms.gradient_clipping.clipping_type"]


def test_machine_without_gpu_refuses_in_one_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = config.load("yamls/mosaic_bert.yaml", ["device_train_microbatch_size=auto"])
    with pytest.raises(ConfigError) as error:
        builders.check_device(run)
    message = str(error.value)
    assert "precision: amp_bf16 needs a GPU" in message and "device_train_microbatch_size: auto" in message
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    builders.check_device(run)


@pytest.mark.parametrize("check", [builders.build_trainer, validate])
def test_auto_with_a_budget_of_tokens_runs_on_one_gpu_only(check, monkeypatch):
    """Composer's first step with auto sums gradients after each microbatch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    auto, tokens = "device_train_microbatch_size=auto", "device_train_microbatch_tokens=65536"
    builders.check_processes(config.load("yamls/mosaic_bert.yaml", [auto, tokens]))
    monkeypatch.setattr(builders.dist, "get_world_size", lambda: 2)
    for alone in (auto, tokens):
        builders.check_processes(config.load("yamls/mosaic_bert.yaml", [alone]))
    with pytest.raises(ConfigError, match="size: auto with device_train_microbatch_tokens runs on one GPU only"):
        check(config.load("yamls/mosaic_bert.yaml", [auto, tokens]))


# Optimizers and schedules


def test_decoupled_adamw_is_composers():
    """Over 100 steps of a falling rate, in fp64: rounding hides no difference."""
    weights, lr, decay = [], 5e-4, 1e-3

    def composers(model, lr, weight_decay):
        return DecoupledAdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=weight_decay)

    for make, weight_decay in ((composers, decay), (optim.decoupled_adamw, decay), (optim.adamw, decay / lr)):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3)).double()
        optimizer = make(model, lr=lr, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 120)
        for _ in range(100):
            optimizer.zero_grad()
            model(torch.randn(11, 7, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
            schedule.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(weights[1], weights[2])
    # Composer rounds the denominator differently: 2e-7 measured. Without decay, weights would differ by 5e-3.
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [optim.decoupled_adamw, optim.adamw, optim.muon])
def test_decay_of_matrices_only(make):
    model = torch.nn.Sequential(torch.nn.Embedding(4, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 2))
    assert len(make(model, lr=1e-3).param_groups) == 1
    decayed, others = make(model, lr=1.0, weight_decay=0.1, decay_matrices_only=True).param_groups
    assert decayed["weight_decay"] == 0.1 and {p.ndim for p in decayed["params"]} == {2}
    assert others["weight_decay"] == 0.0 and {p.ndim for p in others["params"]} == {1}
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def state_at(batch, max_duration="100ba"):
    return SimpleNamespace(
        timestamp=Timestamp(batch=batch), max_duration=Time.from_timestring(max_duration), dataloader_len=None
    )


@pytest.mark.parametrize(
    ("name", "options", "points"),
    [
        ("linear_decay_with_warmup", {"t_warmup": "0.1dur", "alpha_f": 0.02}, {5: 0.5, 10: 1, 55: 0.51, 100: 0.02}),
        ("cosine_with_warmup", {"t_warmup": "10ba"}, {0: 0, 10: 1, 55: 0.5, 100: 0}),
        ("constant_with_warmup", {"t_warmup": "10ba"}, {5: 0.5, 10: 1, 100: 1}),
        (
            "warmup_stable_decay",
            {"t_warmup": "0.1dur", "t_decay": "20ba", "alpha_f": 0.1},
            {0: 0, 5: 0.5, 10: 1, 80: 1, 90: 0.55, 100: 0.1},
        ),
        (
            "warmup_stable_decay",
            {"t_warmup": "0.1dur", "t_decay": "20ba", "alpha_f": 0.1, "decay": "sqrt"},
            {5: 0.5, 10: 1, 80: 1, 85: 0.55, 100: 0.1},
        ),
    ],
)
def test_schedules(name, options, points):
    scheduler = build("scheduler", optim.SCHEDULERS, Component(name, options))
    for batch, factor in points.items():
        assert scheduler(state_at(batch)) == pytest.approx(factor, abs=1e-9)


@pytest.mark.parametrize(
    ("warmup", "message"),
    [("0.6dur", "at most the run's length .*; got 0.6dur and 0.6dur"), ("5sp", "in dur, ba or ep, with")],
)
def test_warmup_stable_decay_refuses_times_that_do_not_fit(warmup, message):
    with pytest.raises(ConfigError, match=message):
        optim.WarmupStableDecayScheduler(warmup, "0.6dur")(state_at(0))


def test_loader_settings_reach_dataset_and_workers(overrides, text_shards, tokenizer, tmp_path):
    options = ["num_workers=3", "prefetch_factor=5", "persistent_workers=true", "timeout=77", "moving_crop=true"]
    options += ["cache_limit=20mb", "predownload=32", "download_retry=4", "download_timeout=8"]
    remote = [f"data_remote={text_shards}", f"data_local={tmp_path}/cache"]
    remote += ["special_tokens=tokens"]
    run = config.load("yamls/quickstart.yaml", [*overrides, *remote, *(f"train_loader.{option}" for option in options)])
    loader = build_train_data(run, tokenizer).dataloader
    found = [loader.num_workers, loader.prefetch_factor, loader.persistent_workers, loader.timeout]
    assert found == [3, 5, True, 77]
    dataset = loader.dataset
    assert (dataset.cache_limit, dataset.predownload, dataset.moving_crop) == (20 << 20, 32, True)
    assert dataset.encoder.ids("[MASK]") == [tokenizer.mask_token_id]
    assert (dataset.streams[0].download_retry, dataset.streams[0].download_timeout) == (4, 8)


@pytest.mark.parametrize("limit", ["size=3", "tokens=64"])
def test_workers_split_unless_only_the_main_process_knows_how(limit, overrides, tokenizer):
    """The microbatches are the same, and Composer hands them on as they are: no copy, one on the way to the model."""
    limits = ["device_train_microbatch_size=16", f"device_train_microbatch_{limit}"]
    scheduled = "mlm_probability={initial: 0.3, final: 0.3}"
    first = {}
    for name, changes in {"fixed": ["mlm_probability=0.3"], "scheduled": [scheduled]}.items():
        run = config.load("yamls/quickstart.yaml", [*overrides, *limits, *changes])
        spec = build_train_data(run, tokenizer)
        batch = next(iter(spec.dataloader))
        assert isinstance(batch, SplitBatch) == (name == "fixed")
        assert spec.get_num_samples_in_batch(batch) == 16
        batch = batch if name == "fixed" else mask_batch(batch, 0.3)
        first[name] = spec.split_batch(batch, run.device_train_microbatch_size)
        if limit == "size=3":
            assert [part["num_samples"] for part in first[name]] == [3, 3, 3, 3, 3, 1]
        else:
            assert len(first[name]) > 3 and all(part["num_tokens"] <= 64 for part in first[name])
        part = first[name][0]
        moved = spec.microbatch_transforms(DeviceCPU().batch_to_device(part))
        assert moved.packed is part.packed and copy.deepcopy(moved) is moved
    assert torch.equal(first["fixed"].packed, first["scheduled"].packed)


def test_auto_splits_in_the_main_process(overrides, tokenizer):
    """Workers load ahead, and the size may still fall."""
    run = config.load("yamls/quickstart.yaml", [*overrides, "device_train_microbatch_size=auto"])
    spec = build_train_data(run, tokenizer)
    batch = next(iter(spec.dataloader))
    assert [len(spec.split_batch(batch, size)) for size in (16, 8, 3)] == [1, 2, 6]


@pytest.mark.parametrize("change", [[], ["mlm_probability={initial: 0.3, final: 0.3}"]])
def test_batches_reach_a_gpu_from_pinned_memory(change, overrides, tokenizer, monkeypatch):
    """Workers' batches are pinned by the loader, those of the main process when it splits them."""
    pinned, moved = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(SplitBatch, "pin_memory", lambda self: pinned.append(self) or self)
    monkeypatch.setattr(Microbatch, "to", lambda self, device: moved.append(device) or self)
    run = config.load("yamls/quickstart.yaml", [*overrides, *change, "model.attention=torch"])
    spec = build_train_data(run, tokenizer)
    assert spec.dataloader.pin_memory == (not change)
    batch = spec.dataloader.collate_fn([spec.dataloader.dataset[i] for i in range(16)])
    parts = spec.split_batch(mask_batch(batch, 0.3) if change else batch, 8)
    spec.microbatch_transforms(parts[0])
    assert len(pinned) == len(change) and moved == ["cuda"]
