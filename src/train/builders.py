"""From a run's config to its parts: tables of names, each with the class that it stands for.

A name that is in no table, and an option that its class does not take, are errors that name what there is. What comes
from Composer is Composer's, under its class's name in snake_case.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from composer.algorithms import EMA, SWA, GradientClipping, LowPrecisionLayerNorm
from composer.callbacks import (
    EarlyStopper,
    LRMonitor,
    MemoryMonitor,
    MemorySnapshot,
    NaNMonitor,
    OOMObserver,
    OptimizerMonitor,
    RuntimeEstimator,
    SpeedMonitor,
    SystemMetricsMonitor,
    ThresholdStopper,
)
from composer.core import Algorithm, Callback
from composer.loggers import (
    CometMLLogger,
    FileLogger,
    LoggerDestination,
    MLFlowLogger,
    NeptuneLogger,
    TensorboardLogger,
    WandBLogger,
)
from composer.utils.parallelism import FSDP2Config, FSDPConfig
from transformers import PreTrainedTokenizerFast

from src.common.errors import ConfigError
from src.data.microbatches import fullest_batch
from src.train import checkpoint
from src.train.callbacks import AverageGradients, Guard, LargestStep, Reseed, ScheduledMasking, StopOnSignal, TimeLimit
from src.train.config import MaskingSchedule, RunConfig, seconds
from src.train.data import device_train_batch_size, highest_rate, split_batch
from src.train.monitors import ConsoleLine, MetricsFile, StepMonitor, StreamShares
from src.train.schema import Named, build, nearest

# ----------------------------------------------------------------------------------------------------------------------
# Algorithms, callbacks, loggers
# ----------------------------------------------------------------------------------------------------------------------

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "ema": EMA,
    "gradient_clipping": GradientClipping,
    "low_precision_layernorm": LowPrecisionLayerNorm,
    "swa": SWA,
}

REFUSED = {
    ("alibi", "mosaic_bert"): "MosaicBERT has ALiBi already",
    ("alibi", "hf_bert"): "Composer's does not work with this version of transformers; use model mosaic_bert",
    ("fused_layernorm", "mosaic_bert"): "Composer has it no longer, and MosaicBERT's LayerNorm is its own",
    ("fused_layernorm", "hf_bert"): "Composer has it no longer",
    ("gated_linear_units", "mosaic_bert"): "MosaicBERT has gated linear units already",
    ("gated_linear_units", "hf_bert"): "Composer's takes its own HuggingFaceModel only; use model mosaic_bert",
    ("low_precision_layernorm", "mosaic_bert"): "MosaicBERT's LayerNorm keeps its statistics in fp32",
    (
        "seq_length_warmup",
        "mosaic_bert",
    ): "Composer's takes its own HuggingFaceModel only; convert shorter samples",
    ("seq_length_warmup", "hf_bert"): "Composer's takes its own HuggingFaceModel only; convert shorter samples",
}
"""Algorithms of Composer's that cannot act on a model, and why."""

CALLBACKS: dict[str, Callable[..., Callback]] = {
    "early_stopper": EarlyStopper,
    "lr_monitor": LRMonitor,
    "memory_monitor": MemoryMonitor,
    "memory_snapshot": MemorySnapshot,
    "nan_monitor": NaNMonitor,
    "oom_observer": OOMObserver,
    "optimizer_monitor": OptimizerMonitor,
    "runtime_estimator": RuntimeEstimator,
    "speed_monitor": SpeedMonitor,
    "step_monitor": StepMonitor,
    "system_metrics_monitor": SystemMetricsMonitor,
    "threshold_stopper": ThresholdStopper,
}

LOGGERS: dict[str, Callable[..., LoggerDestination]] = {
    "cometml": CometMLLogger,
    "console_line": ConsoleLine,
    "file_logger": FileLogger,
    "metrics_file": MetricsFile,
    "mlflow": MLFlowLogger,
    "neptune": NeptuneLogger,
    "tensorboard": TensorboardLogger,
    "wandb": WandBLogger,
}


def _build_all(path: str, table: Mapping[str, Callable[..., Any]], components: Named) -> list[Any]:
    return [build(path, table, component) for component in components.values()]


def build_algorithms(config: RunConfig) -> list[Algorithm]:
    """Composer's algorithms; those that cannot act on the run's model are refused."""
    for name in config.algorithms:
        reason = REFUSED.get((name, config.model.name))
        if reason:
            raise ConfigError(f"algorithms.{name}: {reason}")
    return _build_all("algorithms", ALGORITHMS, config.algorithms)


def build_callbacks(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> list[Callback]:
    """The config's callbacks; what each run has; what a time limit, mixed data and a scheduled rate need."""
    callbacks = [*_build_all("callbacks", CALLBACKS, config.callbacks), Reseed(config.seed), Guard()]
    if config.device_train_microbatch_size != "auto":  # which finds what fits, and again whenever something does not
        size = min(config.device_train_microbatch_size, device_train_batch_size(config))
        largest = fullest_batch(tokenizer, highest_rate(config), size, config.max_seq_len)
        callbacks.append(LargestStep(split_batch(config)(largest, size)[0]))
    if config.parallelism_config is not None:
        callbacks.append(AverageGradients())
    if config.time_limit is not None:
        callbacks.append(TimeLimit(seconds(config.time_limit)))
    if config.train_loader.streams:
        callbacks.append(StreamShares())
    if isinstance(config.mlm_probability, MaskingSchedule):
        callbacks.append(ScheduledMasking(config.mlm_probability))
    return callbacks


def local_save_folder(config: RunConfig) -> str | None:
    """The ``save_folder`` if it is one on this machine or a file system that it mounts."""
    if config.save_folder is None or "://" in config.save_folder:
        return None
    return config.save_folder.format(run_name=config.run_name)


def build_savers(config: RunConfig, folder: checkpoint.RunFolder | None, resumed: bool) -> list[Callback]:
    """What writes checkpoints to a ``save_folder`` here, also when a signal comes; to an object store the Trainer's.

    (Given one for an object store, the Trainer would look for a checkpoint to resume from in its temporary folder.)
    """
    path = local_save_folder(config)
    if path is None:
        return [StopOnSignal()]
    # Later checkpoints than the one that the run goes on from are its own, of before it was killed.
    overwrite, keep = config.save_overwrite or resumed, config.save_num_checkpoints_to_keep
    return [checkpoint.Saver(folder, path, config.save_interval, overwrite, keep), StopOnSignal()]


FSDP_OPTIONS = {
    **{f.name: "FSDP1's, or has no effect here; remove it" for f in dataclasses.fields(FSDPConfig)},
    "activation_checkpointing": "set model.gradient_checkpointing: true",
    "mixed_precision": "weights are gathered in fp32 and autocast casts them; FSDP would cast ALiBi's slopes too",
    "sharding_strategy": "reshard_after_forward: true is FSDP1's FULL_SHARD, false its SHARD_GRAD_OP",
    "state_dict_type": "checkpoints hold whole weights, so that any number of processes resumes from them",
}
"""Options of Composer's for FSDP that cannot be set, and what to do."""

WITHOUT_FSDP = {
    "algorithms.ema": "Composer's cannot average sharded weights",
    "algorithms.swa": "Composer's cannot average sharded weights",
    "callbacks.optimizer_monitor": "Composer's logs norms of one process's shards; take step_monitor's grad_norm",
}
"""What Composer gets wrong with FSDP."""


def build_parallelism(config: RunConfig) -> dict[str, Any] | None:
    """Composer's ``parallelism_config``: FSDP2 (``fully_shard``), each BertLayer a unit and the rest another.

    ``{fsdp: {reshard_after_forward: true}}`` frees gathered weights after the forward pass and gathers them again for
    the backward; false keeps them.

    Raises:
        ConfigError: options that cannot be set, and parts of the run that do not work with FSDP; all in one message.
    """
    if config.parallelism_config is None:
        return None
    given = config.parallelism_config.get("fsdp")
    if list(config.parallelism_config) != ["fsdp"] or not isinstance(given, dict):
        raise ConfigError(f"parallelism_config: expected {{fsdp: {{...}}}}, got {config.parallelism_config!r}")
    faults, takes = [], ["reshard_after_forward"]
    for name in map(str, given):
        if name not in takes:
            reason = FSDP_OPTIONS.get(name, f"unknown; {nearest(name, takes)}")
            faults.append(f"parallelism_config.fsdp.{name}: {reason}")
    reshard = given.get("reshard_after_forward", True)
    if not isinstance(reshard, bool):
        faults.append(f"parallelism_config.fsdp.reshard_after_forward: expected true or false, got {reshard!r}")
    for path, reason in WITHOUT_FSDP.items():
        section, name = path.split(".")
        if name in getattr(config, section):
            faults.append(f"{path}: {reason}")
    clipping = config.algorithms.get("gradient_clipping")
    if clipping is not None and clipping.options.get("clipping_type") == "adaptive":
        faults.append(
            "algorithms.gradient_clipping.clipping_type: adaptive compares norms of shards; take norm or value"
        )
    if config.device_train_microbatch_size == "auto":
        faults.append(
            "device_train_microbatch_size: give a number. Composer has auto for FSDP1 alone, and fails there on torch "
            "2.7.1 and later (unshard_with_sync is not defined)"
        )
    if faults:
        raise ConfigError("\n  ".join(["this run cannot use FSDP", *faults]))
    # An instance, because Composer takes FSDP1 of a dict.
    return {"fsdp": FSDP2Config(reshard_after_forward=reshard, state_dict_type="full", mixed_precision="FULL")}


def check_device(config: RunConfig) -> None:
    """Refuse, in one error, what this machine's device cannot do."""
    if torch.cuda.is_available():
        return
    faults = []
    if config.precision != "fp32":
        faults.append(f"precision: {config.precision} needs a GPU, and none is found; precision=fp32 runs here")
    if config.device_train_microbatch_size == "auto":
        faults.append("device_train_microbatch_size: auto needs a GPU, and none is found; give a number")
    if faults:
        raise ConfigError("\n  ".join(["this machine cannot run it", *faults]))


def build_loggers(config: RunConfig) -> list[LoggerDestination]:
    """Loggers, beside the console and the progress bar, which the Trainer makes."""
    return _build_all("loggers", LOGGERS, config.loggers)
