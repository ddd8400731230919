"""From a run's config to its Trainer: ``build_trainer``, top to bottom.

Components are looked up by name in tables. An unknown name, and an option that the class does not take, are errors that
list what exists. Composer's classes have their own names, in snake_case.
"""

import contextlib
import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from composer import Trainer, algorithms, callbacks
from composer.core import Algorithm, Callback, Timestamp
from composer.utils import dist, reproducibility
from composer.utils.parallelism import FSDP2Config, FSDPConfig
from transformers import PreTrainedTokenizerFast

from src.common.errors import CheckpointError, ConfigError, first_line
from src.data import shared_memory
from src.data.microbatches import fullest_batch
from src.data.shards import dataset_fingerprints
from src.data.streaming import alone_on_node
from src.data.tokenizer import load_tokenizer, tokenizer_fingerprints
from src.hf_bert import HFBert
from src.mosaic_bert import MosaicBert
from src.train import checkpoint, models, weights
from src.train.averages import SWA, ema
from src.train.callbacks import (
    AverageGradients,
    CastWeightsOnce,
    MemoryProbe,
    Reseed,
    ScheduledMasking,
    StopAtTimeLimit,
    StopOnSignal,
    StopOnSilentFailure,
    TrainMetrics,
)
from src.train.config import MaskingSchedule, RunConfig, from_environment, seconds, settings
from src.train.data import (
    build_evaluators,
    build_train_data,
    device_train_batch_size,
    highest_rate,
    microbatch_size,
    split_batch,
)
from src.train.ending import TIME_LIMIT, EvalInterval, RunEnd, SaveInterval
from src.train.loggers import LOGGERS, build_loggers, check_package
from src.train.monitors import StepMonitor, StreamShares
from src.train.optim import OPTIMIZERS, SCHEDULERS, build_scheduler
from src.train.processes import meet
from src.train.resume import ResumeCheck
from src.train.schema import ILL_TYPED, Named, build, check_component, check_options, nearest
from src.train.stoppers import EarlyStopper, ThresholdStopper, check_stoppers
from src.train.yaml12 import interpolation, is_within, stored, unresolved


def build_trainer(config: RunConfig) -> Trainer:
    """The Trainer of a run; nothing is trained yet.

    Raises:
        ConfigError, DataError, CheckpointError: settings, data or checkpoint are wrong or do not fit together.
        Finished: the run has ended before.
    """
    checkpoint.load_as_data()
    check_device(config)
    check_processes(config)
    check_components(config)
    meet(config.dist_timeout)
    checkpoint.check_store("load_path", config.load_path, writes=False)
    checkpoint.check_store("save_folder", config.save_folder, writes=True)
    if dist.get_local_rank() == 0:
        with alone_on_node():
            shared_memory.remove_stale_shared_memory()
    folder, found = checkpoint.find(local_save_folder(config), config.autoresume)
    with contextlib.ExitStack() as on_error:
        if folder is not None:
            on_error.callback(folder.close)
        reproducibility.seed_all(config.seed)  # the same weights on every rank
        tokenizer = build_tokenizer(config, found)
        model = models.build_model(config, tokenizer)
        start = found or config.load_path
        if start is None:
            weights.initialise(config, model, tokenizer)
        train_data = build_train_data(config, tokenizer)
        loader: Any = train_data.dataloader
        dataset, steps_per_epoch = loader.dataset, len(loader)
        data, data_before = dataset_fingerprints(source.folder for source in dataset.sources.values())
        words, *words_before = tokenizer_fingerprints(tokenizer)
        check = ResumeCheck(
            {**settings(config), "dataset": data, "tokenizer": words},
            config.resume.allow,
            {
                **{k: [v] for k, v in from_environment(config).items()},
                "dataset": [data_before],
                "tokenizer": words_before,
            },
        )
        optimizer = build("optimizer", OPTIMIZERS, config.optimizer, model=model)
        end, *others = build_callbacks(config, tokenizer, model)
        assert isinstance(end, RunEnd)
        stop = StopOnSignal()
        interval = SaveInterval(config.save_interval, stop)
        with checked_start(config, start, found is not None, model, optimizer, check, end):
            trainer = Trainer(
                run_name=config.run_name,
                seed=config.seed,
                model=model,
                optimizers=optimizer,
                schedulers=build_scheduler(config.scheduler, config.max_duration, steps_per_epoch),
                train_dataloader=train_data,
                eval_dataloader=build_evaluators(config, tokenizer, train_data),
                max_duration=config.max_duration,
                eval_interval=EvalInterval(config.eval_interval, end, steps_per_epoch) if config.eval_interval else 0,
                precision=config.precision,
                device_train_microbatch_size=microbatch_size(config),
                # Every masked token of the global batch has the same weight, for any microbatch size and rank.
                accumulate_train_batch_on_tokens=True,
                algorithms=build_all("algorithms", ALGORITHMS, config.algorithms),
                callbacks=[
                    end,
                    *others,
                    check,
                    *build_savers(config, folder, found is not None, tokenizer, interval),
                    stop,
                ],
                # Without load_path, what Composer finds in an object store is this run's.
                loggers=build_loggers(config.loggers, found is not None or config.load_path is None),
                progress_bar=config.progress_bar,
                save_folder=config.save_folder,
                save_interval=interval,
                save_num_checkpoints_to_keep=config.save_num_checkpoints_to_keep,
                save_overwrite=config.save_overwrite,
                load_path=start,
                load_weights_only=config.load_weights_only and found is None,
                autoresume=config.autoresume and local_save_folder(config) is None,
                compile_config=config.compile_config,
                parallelism_config=build_parallelism(config),
                dist_timeout=config.dist_timeout,
            )
        on_error.pop_all()
    return trainer


def checked_start(
    config: RunConfig,
    start: str | None,
    resumes: bool,
    model: MosaicBert | HFBert,
    optimizer: torch.optim.Optimizer,
    check: ResumeCheck,
    end: RunEnd,
) -> contextlib.AbstractContextManager[None]:
    """Refuse a checkpoint before the Trainer loads it; the context that the Trainer must be built in.

    Args:
        start: the checkpoint, or None: Composer may find one in an object store.
        resumes: whether it is of this run.

    Raises:
        ConfigError, CheckpointError: it does not fit, is damaged, or cannot be read.
        Finished: the run had ended there.
    """
    where, to_resume = start or f"{config.save_folder}", resumes or not config.load_weights_only

    def check_parts(state: dict[str, Any]) -> None:
        checkpoint.check_fits(where, state["model"], model)
        if to_resume:
            checkpoint.check_optimizer(where, state["optimizers"], optimizer)

    if start is None or not is_local(start):  # Composer's to find
        return checkpoint.checked_loading(where, check_parts, to_resume)
    state = checkpoint.read(start, to_resume)
    if resumes:  # first: it names settings, check_parts only shapes
        check.compare(state["callbacks"].get("ResumeCheck"), start)
    check_parts(state)
    if to_resume:
        timestamp = Timestamp()
        timestamp.load_state_dict(state["timestamp"]["Timestamp"])
        end.check(timestamp, state["callbacks"].get("RunEnd", {}).get("stopped"))
    return checkpoint.loading(where)


def is_local(start: str) -> bool:
    """Whether ``load_path`` is a file here. Else Composer finds it: in an object store, or by a name with ``{rank}``.

    Raises CheckpointError: it cannot be a checkpoint of main.py.
    """
    if Path(start).is_dir():
        raise CheckpointError(
            f"load_path: {start} is a folder; expected a file, such as {checkpoint.LATEST.format(rank=0)} in it. "
            "Sharded checkpoints (a folder with .metadata) are not read, because that could run code in them"
        )
    if "://" in start:
        return False
    checkpoint.check_name(start, start)
    if not Path(start).is_file() and "{" not in start:
        raise CheckpointError(f"load_path: {start}: no such file")
    return Path(start).is_file()


def build_tokenizer(config: RunConfig, found: str | None) -> PreTrainedTokenizerFast:
    """The tokenizer of the config, or that of the checkpoint that the run starts from; ``found`` is one to resume."""
    if config.tokenizer_name is not None:
        return load_tokenizer(config.tokenizer_name)
    start = found or config.load_path or config.pretrained
    if start is None:
        hint = "give load_path, pretrained or a name"
        raise ConfigError(f"tokenizer_name: null takes the tokenizer of a checkpoint; {hint}")
    return weights.load_tokenizer(weights.read(start))


ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "ema": ema,
    "gradient_clipping": algorithms.GradientClipping,
    "low_precision_layernorm": algorithms.LowPrecisionLayerNorm,
    "swa": SWA,
}

REFUSED = {
    ("alibi", "mosaic_bert"): "MosaicBERT has ALiBi already",
    ("alibi", "hf_bert"): "Composer's does not work with this version of transformers; use model mosaic_bert",
    ("fused_layernorm", "mosaic_bert"): "removed from Composer; MosaicBERT has its own LayerNorm",
    ("fused_layernorm", "hf_bert"): "removed from Composer",
    ("gated_linear_units", "mosaic_bert"): "MosaicBERT has gated linear units already",
    ("gated_linear_units", "hf_bert"): "Composer's supports only its own HuggingFaceModel; use model mosaic_bert",
    ("low_precision_layernorm", "mosaic_bert"): "MosaicBERT's LayerNorm keeps its statistics in fp32",
    ("seq_length_warmup", "mosaic_bert"): "Composer's supports only its own HuggingFaceModel; convert shorter samples",
    ("seq_length_warmup", "hf_bert"): "Composer's supports only its own HuggingFaceModel; convert shorter samples",
}
"""Composer's algorithms that have no effect on a model or fail on it, with the reason."""

CALLBACKS: dict[str, Callable[..., Callback]] = {
    "early_stopper": EarlyStopper,
    "lr_monitor": callbacks.LRMonitor,
    "memory_monitor": callbacks.MemoryMonitor,
    "memory_snapshot": callbacks.MemorySnapshot,
    "nan_monitor": callbacks.NaNMonitor,
    "oom_observer": callbacks.OOMObserver,
    "optimizer_monitor": callbacks.OptimizerMonitor,
    "runtime_estimator": callbacks.RuntimeEstimator,
    "speed_monitor": callbacks.SpeedMonitor,
    "step_monitor": StepMonitor,
    "system_metrics_monitor": callbacks.SystemMetricsMonitor,
    "threshold_stopper": ThresholdStopper,
}

KINDS = {name: kind.options for name, kind in models.KINDS.items()}


def check_components(config: RunConfig) -> None:
    """Refuse unknown, ill-typed and missing options of all components, those of REFUSED, and unknown ones in
    ``resume.allow``.

    One ConfigError names all of them; nothing is built.
    """
    parts = [("model", KINDS, config.model), ("scheduler", SCHEDULERS, config.scheduler)]
    refused = {name: REFUSED.get((name, config.model.name)) for name in config.algorithms}
    parts += [("algorithms", ALGORITHMS, part) for name, part in config.algorithms.items() if not refused[name]]
    parts += [("callbacks", CALLBACKS, part) for part in config.callbacks.values()]
    parts += [("loggers", LOGGERS, part) for part in config.loggers.values()]
    checks = [partial(check_component, *part, given=[]) for part in parts]
    checks += [partial(check_package, part.name) for part in config.loggers.values()]
    checks.append(partial(check_component, "optimizer", OPTIMIZERS, config.optimizer, given=["model"]))
    shape, kind = config.model.options.get("model_config"), models.KINDS.get(config.model.name)
    if isinstance(shape, dict) and kind is not None:
        checks.append(partial(models.check_shape, kind, shape, config.interpolations))
    checks.append(partial(check_compile, config))
    faults = [f"algorithms.{name}: {reason}" for name, reason in refused.items() if reason]
    for check in checks:
        try:
            check()
        except ConfigError as error:
            faults.append(str(error))
    known = option_paths()
    for name in config.resume.allow:
        if is_within(name, "model") or name.split(".")[0] in ("optimizer", "scheduler", "algorithms"):
            if not any(is_within(path, name) for path in known):
                faults.append(f"resume.allow: unknown setting {name!r}; {nearest(name, known)}")
    if faults:
        raise ConfigError("\n  ".join(faults))


def check_compile(config: RunConfig) -> None:
    """Refuse arguments that torch.compile refuses; compiles nothing."""
    path, texts, given = "compile_config", config.interpolations, config.compile_config
    if given is None:
        return
    check_options(path, torch.compile, given, ["model"], interpolations=texts)
    try:
        torch.compile(torch.nn.Identity(), **given)
    except (RuntimeError, ValueError, *ILL_TYPED) as error:
        shown = unresolved(given, texts, path)
        reason = textwrap.shorten(first_line(error), 200) if shown == given else "torch.compile refuses it"
        raise ConfigError(f"{path}: {reason}; got {shown!r}") from None


def option_paths() -> list[str]:
    """Paths of all options that a model, optimizer, schedule or algorithm can have."""
    tables: dict[str, Mapping[str, Callable[..., Any]]]
    tables = {"model": KINDS, "optimizer": OPTIMIZERS, "scheduler": SCHEDULERS}
    targets = [(path, target) for path, table in tables.items() for target in table.values()]
    targets += [(f"algorithms.{name}", target) for name, target in ALGORITHMS.items()]
    targets += [("model.model_config", kind.config_class.__init__) for kind in models.KINDS.values()]
    options = [f"{path}.{name}" for path, target in targets for name in inspect.signature(target).parameters]
    return [*options, *(f"{path}.name" for path in tables), *(f"algorithms.{name}" for name in ALGORITHMS)]


def build_all(path: str, table: Mapping[str, Callable[..., Any]], components: Named) -> list[Any]:
    """The components of a section; raises what ``build`` does."""
    return [build(path, table, component) for component in components.values()]


def build_callbacks(
    config: RunConfig, tokenizer: PreTrainedTokenizerFast, model: MosaicBert | HFBert
) -> list[Callback]:
    """RunEnd, the config's callbacks, those of every run, and those that other settings need."""
    end, built = RunEnd(config.run_name, config.max_duration), build_all("callbacks", CALLBACKS, config.callbacks)
    check_stoppers(built, config, model)
    for callback, component in zip(built, config.callbacks.values(), strict=True):
        end.watch(callback, component.name, stored(component.options, component.interpolations, component.path))
    built = [end, *built, Reseed(config.seed), TrainMetrics(), StopOnSilentFailure()]
    size, tokens = microbatch_size(config), config.device_train_microbatch_tokens
    if size != "auto":  # auto finds what fits
        largest = fullest_batch(tokenizer, highest_rate(config), size, config.max_seq_len, tokens)
        limit = "tokens" if tokens is not None and tokens < size * config.max_seq_len else "size"
        microbatch = split_batch(config)(largest, size)[0]
        accumulates = microbatch["num_tokens"] < device_train_batch_size(config) * config.max_seq_len
        built.append(MemoryProbe(microbatch, f"device_train_microbatch_{limit}", accumulates))
    if config.parallelism_config is not None:
        built.append(AverageGradients())
    elif config.precision != "fp32" and not config.model.options.get("gradient_checkpointing"):
        built.append(CastWeightsOnce())
    if config.time_limit is not None:
        built.append(end.watch(StopAtTimeLimit(seconds(config.time_limit)), TIME_LIMIT))
    if config.train_loader.streams:
        built.append(StreamShares())
    if isinstance(config.mlm_probability, MaskingSchedule):
        built.append(ScheduledMasking(config.mlm_probability))
    return built


def local_save_folder(config: RunConfig) -> str | None:
    """The ``save_folder`` if it is on this machine or a mounted file system."""
    if config.save_folder is None or "://" in config.save_folder:
        return None
    return config.save_folder.format(run_name=config.run_name)


def build_savers(
    config: RunConfig,
    folder: checkpoint.RunFolder | None,
    resumed: bool,
    tokenizer: PreTrainedTokenizerFast,
    interval: SaveInterval,
) -> list[Callback]:
    """The callback that saves checkpoints in a local ``save_folder``.

    For an object store the Trainer makes its own saver; with ours it would look for checkpoints in a temporary folder.
    """
    path = local_save_folder(config)
    if path is None:
        return []
    # Checkpoints after the one that the run resumes from are its own, from before it was killed.
    overwrite, keep = config.save_overwrite or resumed, config.save_num_checkpoints_to_keep
    options = {"save_interval": interval, "overwrite": overwrite, "num_checkpoints_to_keep": keep}
    return [checkpoint.Saver(folder, path, tokenizer, **options)]


FSDP_OPTIONS = {
    **{f.name: "an option of FSDP1, or without effect here; remove it" for f in dataclasses.fields(FSDPConfig)},
    "activation_checkpointing": "set model.gradient_checkpointing: true",
    "mixed_precision": "weights are gathered in fp32 and autocast casts them; FSDP would also cast ALiBi's slopes",
    "sharding_strategy": "reshard_after_forward: true is FSDP1's FULL_SHARD, false its SHARD_GRAD_OP",
    "state_dict_type": "checkpoints hold full weights, from which any number of processes can resume",
}
"""Options of Composer's FSDP that cannot be set, and what to do instead."""

WITHOUT_FSDP = {
    "optimizer.name": "muon needs whole matrices, and FSDP shards them; use adamw or decoupled_adamw",
    "algorithms.ema": "Composer's cannot average sharded weights",
    "algorithms.swa": "Composer's cannot average sharded weights",
    "algorithms.gradient_clipping.clipping_type": "adaptive compares norms of shards; use norm or value",
    "callbacks.optimizer_monitor": "Composer's logs norms of one process's shards; use step_monitor's grad_norm",
    "device_train_microbatch_size": "give a number. Composer supports auto for FSDP1 only, and not on torch >= 2.7.1",
    "device_train_microbatch_tokens": "processes would run different numbers of microbatches, and wait for ever in the "
    "one that gathers weights; give device_train_microbatch_size alone",
}
"""What gives wrong results with Composer's FSDP."""


def build_parallelism(config: RunConfig) -> dict[str, Any] | None:
    """Composer's ``parallelism_config``: FSDP2 (``fully_shard``), one unit per BertLayer and one for the rest.

    ``{fsdp: {reshard_after_forward: true}}`` frees weights after the forward pass and gathers them again for the
    backward; false keeps them. Raises one ConfigError that names every option and part of the run that is refused.
    """
    if config.parallelism_config is None:
        return None
    given = config.parallelism_config.get("fsdp")
    if list(config.parallelism_config) != ["fsdp"] or not isinstance(given, dict):
        shown = unresolved(config.parallelism_config, config.interpolations, "parallelism_config")
        raise ConfigError(f"parallelism_config: expected {{fsdp: {{...}}}}, got {shown!r}")
    takes, path = ["reshard_after_forward"], "parallelism_config.fsdp"
    unknown = [str(name) for name in given if name not in takes]
    faults = [f"{path}.{name}: {FSDP_OPTIONS.get(name, f'unknown key; {nearest(name, takes)}')}" for name in unknown]
    reshard = given.get("reshard_after_forward", True)
    if not isinstance(reshard, bool):
        shown = interpolation(f"{path}.reshard_after_forward", config.interpolations) or reshard
        faults.append(f"{path}.reshard_after_forward: expected true or false, got {shown!r}")
    used = {f"{section}.{name}" for section in ("algorithms", "callbacks") for name in getattr(config, section)}
    clipping = config.algorithms.get("gradient_clipping")
    if clipping is not None and clipping.options.get("clipping_type") == "adaptive":
        used.add("algorithms.gradient_clipping.clipping_type")
    if config.optimizer.name == "muon":
        used.add("optimizer.name")
    if config.device_train_microbatch_size == "auto":
        used.add("device_train_microbatch_size")
    if config.device_train_microbatch_tokens is not None:
        used.add("device_train_microbatch_tokens")
    faults += [f"{name}: {reason}" for name, reason in WITHOUT_FSDP.items() if name in used]
    if faults:
        raise ConfigError("\n  ".join(["this run cannot use FSDP", *faults]))
    # An instance: from a dict Composer makes FSDP1.
    return {"fsdp": FSDP2Config(reshard_after_forward=reshard, state_dict_type="full", mixed_precision="FULL")}


def check_device(config: RunConfig) -> None:
    """Refuse settings that this machine cannot run, in one ConfigError."""
    if torch.cuda.is_available():
        return
    faults = []
    if config.precision != "fp32":
        faults.append(f"precision: {config.precision} needs a GPU, but none was found; use precision=fp32")
    if config.device_train_microbatch_size == "auto":
        faults.append("device_train_microbatch_size: auto, the default, needs a GPU, but none was found; give a number")
    if faults:
        raise ConfigError("\n  ".join(["this machine cannot run it", *faults]))


def check_processes(config: RunConfig) -> None:
    """Refuse settings that this number of processes cannot run."""
    auto, tokens = config.device_train_microbatch_size == "auto", config.device_train_microbatch_tokens
    if auto and tokens is not None and dist.get_world_size() > 1:
        raise ConfigError(
            "device_train_microbatch_size: auto with device_train_microbatch_tokens runs on one GPU only: in its first "
            "step Composer sums gradients after each microbatch, whose number differs between processes. Remove auto"
        )
