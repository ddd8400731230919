"""From a run's config to its parts: tables of names, each with the class that it stands for.

A name that is in no table, and an option that its class does not take, are errors that name what there is. What comes
from Composer is Composer's, under its class's name in snake_case.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
import transformers
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
from composer.core import Algorithm, Callback, DataSpec, Evaluator, State
from composer.loggers import (
    CometMLLogger,
    FileLogger,
    LoggerDestination,
    MLFlowLogger,
    NeptuneLogger,
    TensorboardLogger,
    WandBLogger,
)
from composer.optim import (
    ComposerScheduler,
    ConstantWithWarmupScheduler,
    CosineAnnealingWithWarmupScheduler,
    LinearWithWarmupScheduler,
)
from composer.optim.scheduler import _convert_time
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config, FSDPConfig
from transformers import PreTrainedTokenizerFast

from src import checkpoint, data_c4, pretrained, processes
from src.attention import resolve
from src.callbacks import (
    AverageGradients,
    ConsoleLine,
    Guard,
    LargestStep,
    MetricsFile,
    Reseed,
    ScheduledMasking,
    StepMonitor,
    StopOnSignal,
    StreamShares,
    TimeLimit,
)
from src.config import (
    Component,
    ConfigError,
    LoaderConfig,
    MaskingSchedule,
    Named,
    RunConfig,
    StreamConfig,
    nearest,
    seconds,
)
from src.configuration_bert import MosaicBertConfig
from src.flash_attn_triton import TILE_ROWS
from src.hf_bert import HFBert
from src.microbatches import Batch, num_samples, num_tokens, split_padded, split_unpadded
from src.mosaic_bert import MosaicBert

VARIADIC = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def build(path: str, table: Mapping[str, Callable[..., Any]], component: Component, **given: Any) -> Any:
    """``table[name](**options, **given)``; ``given`` comes from the code and is no option of the YAML's.

    Raises:
        ConfigError: the name is not in the table, options are unknown or missing, or a package that it needs is not
            installed; by the key's full path.
    """
    if component.name not in table:
        raise ConfigError(f"{path}: unknown {component.name!r}; {nearest(component.name, list(table))}")
    target = table[component.name]
    check_options(f"{path}.{component.name}", target, component.options, given)
    try:
        return target(**component.options, **given)
    except ImportError as error:  # Composer's loggers import their service's package when they are made
        raise ConfigError(f"{path}.{component.name}: a package is not installed: {error}") from None
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}.{component.name}: {error}") from None


def check_options(path: str, target: Callable[..., Any], options: Mapping[str, Any], given: Iterable[str]) -> None:
    """Refuse, in one error, options that ``target`` does not take, and say which it lacks."""
    parameters = inspect.signature(target).parameters
    takes = [
        name
        for name, p in parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and name not in given
    ]
    # Loggers hand **kwargs on to their service; *args, **kwargs are a base class's and go nowhere.
    kinds = {p.kind for p in parameters.values()}
    open_ended = inspect.isclass(target) and kinds & VARIADIC == {inspect.Parameter.VAR_KEYWORD}
    faults = []
    for name in options:
        if name not in takes and not open_ended:
            faults.append(f"unexpected {str(name)!r} ({nearest(str(name), takes)})")
    faults += [
        f"missing {name!r}"
        for name in takes
        if parameters[name].default is inspect.Parameter.empty and name not in options
    ]
    if faults:
        raise ConfigError(f"{path}: {'; '.join(faults)}; it takes {', '.join(takes) or 'nothing'}")


# ----------------------------------------------------------------------------------------------------------------------
# Models
# ----------------------------------------------------------------------------------------------------------------------


def padded_vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows of the word embeddings: the tokenizer's entries, up to a multiple of 64, which matrix products like."""
    return math.ceil(len(tokenizer) / 64) * 64


def build_model_config(kind: type, tokenizer: PreTrainedTokenizerFast, options: Mapping[str, Any], path: str) -> Any:
    """A Hugging Face config of ``kind`` from the YAML's options, its vocabulary the tokenizer's."""
    check_options(path, kind.__init__, options, ["self"])
    options = {"vocab_size": padded_vocab_size(tokenizer), "pad_token_id": tokenizer.pad_token_id, **options}
    if options["vocab_size"] < len(tokenizer):
        raise ConfigError(f"{path}.vocab_size: {options['vocab_size']} is less than the tokenizer's {len(tokenizer)}")
    try:
        return kind(**options)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def with_kernels(model_config: dict[str, Any] | None, attention: str, kernels: str) -> dict[str, Any]:
    """``model_config`` with the keys that stand beside it."""
    for name in ("attention", "kernels"):
        if name in (model_config or {}):
            raise ConfigError(f"model.model_config.{name}: it is model.{name}, beside model_config")
    return {**(model_config or {}), "attention": attention, "kernels": kernels}


def mosaic_bert(
    tokenizer: PreTrainedTokenizerFast,
    max_seq_len: int,
    model_config: dict[str, Any] | None = None,
    attention: str = "auto",
    kernels: str = "auto",
    gradient_checkpointing: bool = False,
) -> MosaicBert:
    """MosaicBERT; ``model_config`` takes what MosaicBertConfig does; sequences may have any length."""
    options = with_kernels(model_config, attention, kernels)
    config = build_model_config(MosaicBertConfig, tokenizer, options, "model.model_config")
    try:
        return MosaicBert(config, gradient_checkpointing)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None


def hf_bert(
    tokenizer: PreTrainedTokenizerFast,
    max_seq_len: int,
    model_config: dict[str, Any] | None = None,
    gradient_checkpointing: bool = False,
) -> HFBert:
    """Hugging Face's BERT; ``model_config`` takes what transformers' BertConfig does."""
    config = build_model_config(transformers.BertConfig, tokenizer, model_config or {}, "model.model_config")
    if max_seq_len > config.max_position_embeddings:
        raise ConfigError(
            f"max_seq_len: {max_seq_len} is more than this model's {config.max_position_embeddings} positions "
            "(model.model_config.max_position_embeddings)"
        )
    return HFBert(config, gradient_checkpointing)


MODELS = {"mosaic_bert": mosaic_bert, "hf_bert": hf_bert}


def build_model(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> MosaicBert | HFBert:
    """The model, with fresh weights, on the CPU."""
    return build("model", MODELS, config.model, tokenizer=tokenizer, max_seq_len=config.max_seq_len)


def load_pretrained(config: RunConfig, model: MosaicBert | HFBert, tokenizer: PreTrainedTokenizerFast) -> None:
    """Put the weights of ``config.pretrained``, if there is one, into the model."""
    if config.pretrained is None:
        return
    source = pretrained.read(config.pretrained)
    pretrained.check_kind(source, type(model.model))
    pretrained.check_tokenizer(source, tokenizer)
    pretrained.load_weights(model.model, source)


# ----------------------------------------------------------------------------------------------------------------------
# Optimizers and schedules
# ----------------------------------------------------------------------------------------------------------------------


def _groups(model: torch.nn.Module, weight_decay: float, decay_matrices_only: bool) -> list[dict[str, Any]]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not decay_matrices_only:
        return [{"params": parameters, "weight_decay": weight_decay}]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def decoupled_adamw(
    model: torch.nn.Module,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-6,
    weight_decay: float = 1e-5,
    decay_matrices_only: bool = False,
) -> torch.optim.AdamW:
    """AdamW whose decay is apart from ``lr``: a step shrinks weights by weight_decay * lr / initial lr.

    What Composer's DecoupledAdamW computes, by torch's fused kernel: Composer's reads a step count from the device for
    each parameter in turn.
    """
    if lr <= 0:
        raise ValueError(f"lr={lr}: it must be above 0, as the decay is a part of it")
    return adamw(model, lr, betas, eps, weight_decay / lr, decay_matrices_only)


def adamw(
    model: torch.nn.Module,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-6,
    weight_decay: float = 0.02,
    decay_matrices_only: bool = False,
) -> torch.optim.AdamW:
    """torch's fused AdamW: a step shrinks weights by weight_decay * lr. decoupled_adamw's decay d is d / lr here."""
    groups = _groups(model, weight_decay, decay_matrices_only)
    return torch.optim.AdamW(groups, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, fused=True)  # pyright: ignore


class WarmupStableDecayScheduler(ComposerScheduler):
    """Linear warmup, then the full rate, then a linear decay at the end (Hu et al., 2024, MiniCPM, arXiv 2404.06395).

    Args:
        t_warmup: length of the warmup, for example ``0.06dur`` or ``2000ba``.
        t_decay: length of the decay.
        alpha_f: share of the rate that is left at the end.
    """

    def __init__(self, t_warmup: str, t_decay: str, alpha_f: float = 0.0):
        self.t_warmup, self.t_decay, self.alpha_f = t_warmup, t_decay, alpha_f

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        warmup = _convert_time(self.t_warmup, state, ssr)
        decay, end = _convert_time(self.t_decay, state, ssr), _convert_time("1dur", state, ssr)
        if not warmup.unit == decay.unit == end.unit or warmup.value + decay.value > end.value:
            raise ConfigError(
                f"scheduler: t_warmup {self.t_warmup} and t_decay {self.t_decay} must be in the unit of max_duration "
                f"({end.to_timestring()}), or in dur, and not add up to more"
            )
        now = state.timestamp.get(end.unit).value
        if now < warmup.value:
            return now / warmup.value
        if now <= end.value - decay.value:
            return 1.0
        return 1.0 - (1.0 - self.alpha_f) * min(1.0, (now - (end.value - decay.value)) / decay.value)


OPTIMIZERS = {"decoupled_adamw": decoupled_adamw, "adamw": adamw}
SCHEDULERS = {
    "linear_decay_with_warmup": LinearWithWarmupScheduler,
    "cosine_with_warmup": CosineAnnealingWithWarmupScheduler,
    "constant_with_warmup": ConstantWithWarmupScheduler,
    "warmup_stable_decay": WarmupStableDecayScheduler,
}


def build_optimizer(config: RunConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer over all of the model's parameters."""
    return build("optimizer", OPTIMIZERS, config.optimizer, model=model)


def build_scheduler(config: RunConfig) -> ComposerScheduler:
    """The schedule of the learning rate, stepped every batch."""
    return build("scheduler", SCHEDULERS, config.scheduler)


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
        largest = data_c4.fullest_batch(tokenizer, highest_rate(config), size, config.max_seq_len)
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


# ----------------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------------


def device_train_batch_size(config: RunConfig) -> int:
    """Sequences that each device takes in a step."""
    world_size = dist.get_world_size()
    if config.global_train_batch_size % world_size:
        raise ConfigError(
            f"global_train_batch_size: {config.global_train_batch_size} is not a multiple of the {world_size} devices"
        )
    return config.global_train_batch_size // world_size


def build_train_data(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> DataSpec:
    """The training data, shuffled, in batches of the device's share."""
    loader = config.train_loader
    batch_size = device_train_batch_size(config)
    dataset = _streaming_c4(
        config,
        tokenizer,
        loader,
        batch_size=batch_size,
        shuffle=loader.shuffle,
        shuffle_seed=loader.shuffle_seed,
        num_canonical_nodes=loader.num_canonical_nodes,
        length_window=loader.length_window,
        moving_crop=loader.moving_crop,
        predownload=loader.predownload,
    )
    rate = None if isinstance(config.mlm_probability, MaskingSchedule) else config.mlm_probability
    collator = data_c4.MaskingCollator(tokenizer, rate, config.seed)
    return _data_spec(config, dataset, collator, loader, batch_size)


def build_evaluators(config: RunConfig, tokenizer: PreTrainedTokenizerFast, train: DataSpec) -> list[Evaluator]:
    """The held-out data, each sample once; labels are part of metrics' names: metrics/eval/LanguageCrossEntropy."""
    # Streaming allows one dataset a folder, and evaluation only indexes it, so those on the same folder share it.
    streams = {_folder(stream): name for name, stream in config.train_loader.streams.items()}
    alone = {} if streams else {_folder(config.train_loader): train.dataloader.dataset}  # pyright: ignore
    datasets: dict[Any, Any] = alone
    evaluators = []
    for label, loader in {"eval": config.eval_loader, **config.eval_loaders}.items():
        batch_size, folder = config.device_eval_batch_size, _folder(loader)
        if folder in streams:
            raise ConfigError(
                f"{label}: evaluates on train_loader.streams.{streams[folder]} itself; take another split"
            )
        if folder not in datasets:
            datasets[folder] = _streaming_c4(config, tokenizer, loader, batch_size=batch_size)
        once = data_c4.EachSampleOnce(datasets[folder], batch_size, dist.get_global_rank(), dist.get_world_size())
        collator = data_c4.MaskingCollator(tokenizer, loader.mlm_probability, config.seed)
        spec = _data_spec(config, once, collator, loader, batch_size)
        evaluators.append(Evaluator(label=label, dataloader=spec, device_eval_microbatch_size=batch_size))
    return evaluators


def highest_rate(config: RunConfig) -> float:
    """Largest share of tokens that a training batch will have masked."""
    rate = config.mlm_probability
    return max(rate.initial, rate.final) if isinstance(rate, MaskingSchedule) else rate


def split_batch(config: RunConfig) -> Callable[[Batch, int], list[Batch]]:
    """What cuts a padded batch into the model's microbatches."""
    if config.model.name != "mosaic_bert":
        return split_padded
    triton = resolve(config.model.options.get("attention", "auto")) == "triton"
    return partial(split_unpadded, tile_sizes=TILE_ROWS if triton else ())


def _folder(source: LoaderConfig | StreamConfig) -> tuple[str | None, str | None]:
    return source.local, source.split


def _streaming_c4(
    config: RunConfig, tokenizer: PreTrainedTokenizerFast, loader: LoaderConfig, **order: Any
) -> data_c4.StreamingC4:
    streams = config.train_loader.streams if loader is config.train_loader else {}
    sources = {name: data_c4.Source(**vars(stream)) for name, stream in streams.items()}
    one = {"local": loader.local, "remote": loader.remote, "split": loader.split}
    downloads = {"download_retry": loader.download_retry, "download_timeout": loader.download_timeout}
    dataset = data_c4.StreamingC4(
        tokenizer,
        config.max_seq_len,
        **({"sources": sources} if sources else one),
        verify=config.data_verify,
        cache_limit=loader.cache_limit,
        **{name: value for name, value in downloads.items() if value is not None},  # None leaves it to streaming
        **order,
    )
    if dist.get_local_rank() == 0:
        processes.own_shared_memory(dataset._shm_prefix_int, dataset._filelock_root)
    return dataset


def _data_spec(
    config: RunConfig,
    dataset: data_c4.StreamingC4 | data_c4.EachSampleOnce,
    collator: data_c4.MaskingCollator,
    loader: LoaderConfig,
    batch_size: int,
) -> DataSpec:
    """Batches are cut by us: Composer's default would cut a microbatch's layout into nonsense."""
    return DataSpec(
        data_c4.build_dataloader(
            dataset,
            collator,
            batch_size,
            num_workers=loader.num_workers,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
            timeout=loader.timeout,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=processes.settle_worker,
        ),
        split_batch=split_batch(config),  # pyright: ignore
        get_num_samples_in_batch=num_samples,
        get_num_tokens_in_batch=num_tokens,  # pyright: ignore
    )
