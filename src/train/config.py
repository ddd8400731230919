"""What a run is: frozen dataclasses, read from one YAML and ``key=value`` overrides. Imports no torch.

    load("yamls/mosaic_bert.yaml", ["max_duration=10ba"]) -> RunConfig

This is the only place with defaults. Every unknown, missing and ill-typed key is reported in ONE error, by its full
path and with the nearest known name. What a component takes (an optimizer's betas, a callback's interval) is checked
where it is built, by schema.build. Fields that go to Composer's Trainer keep Composer's names, and its units: ``ba``
batches, ``sp`` samples, ``tok`` tokens, ``ep`` epochs, ``dur`` a share of max_duration.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from src.data.source import Source
from src.train.schema import Component, Named, is_within, nearest, read, to_dict


@dataclass(frozen=True)
class MaskingSchedule:
    """A masking rate that goes linearly from one value to another (Ankner et al., 2023, arXiv 2305.15096)."""

    initial: float
    """Share of tokens masked at the first step."""
    final: float
    """Share of tokens masked at the last step."""


@dataclass(frozen=True)
class LoaderConfig:
    """Where samples come from, for training and evaluation."""

    split: str
    """Subfolder of the dataset."""
    local: str | None = None
    """Folder of the dataset, or the cache when there is a remote. None: the run's ``data_local``."""
    remote: str | None = None
    """Where to stream from. None: the run's ``data_remote`` if ``local`` is None too, else nothing is streamed."""
    num_workers: int = 0
    """Processes that load, tokenize and mask. The batches are the same for any number."""
    prefetch_factor: int | None = None
    """Batches that each worker keeps ready. None: 2. Refused without workers."""
    persistent_workers: bool = False
    """Keep the workers from one pass to the next, in place of starting them anew. Refused without workers."""
    timeout: float = 1800
    """Seconds to wait for a batch before giving up, so that a dead stream is no hang. With workers only."""
    cache_limit: str | None = None
    """Size such as ``100gb`` above which streamed shards are dropped again, the one used longest ago first: at least 4
    shards. None keeps all. Refused without a remote."""
    download_retry: int | None = None
    """Times that a download is tried. None: 2. Refused without a remote."""
    download_timeout: float | None = None
    """Seconds that a download may take. None: 60. Refused without a remote."""


@dataclass(frozen=True)
class TrainLoaderConfig(LoaderConfig):
    """The training data."""

    num_canonical_nodes: int = dataclasses.field(kw_only=True)
    """Nodes that the order of samples is made for. It is part of the order, hence required: a multiple or a divisor of
    the nodes that will ever run this (streaming's requirement), kept when their number changes."""
    shuffle: bool = True
    """Whether samples come in random order, another one each epoch."""
    shuffle_seed: int | None = None
    """Seed of that order. None: the run's ``seed``. No effect without shuffle."""
    length_window: int = 0
    """Global batches, 64 for example, within which the shuffled order is grouped by length: a batch then holds samples
    of like length, and ranks equally many tokens (docs/data.md says what that does). 0 does not group. Needs shuffle,
    shards of tokens with their lengths.bin, and a global batch that is a multiple of ``num_canonical_nodes``."""
    moving_crop: bool = False
    """Whether a text of more than ``max_seq_len`` tokens gives another part of itself each epoch, so that none of it is
    lost for ever, in place of its beginning. Needs shards of text."""
    predownload: int | None = None
    """Samples to download ahead of each worker. None: 8 batches. Refused without a remote."""
    streams: dict[str, Source] = field(default_factory=dict)
    """Datasets to mix, by name, in place of the one of ``local`` and ``remote``."""


@dataclass(frozen=True)
class EvalLoaderConfig(LoaderConfig):
    """The held-out data, each sample of which is counted once, always masked alike."""

    mlm_probability: float = 0.15
    """Share of tokens masked; 15% whatever training takes, so that losses compare."""


@dataclass(frozen=True)
class ResumeConfig:
    """What may change when a run goes on from a checkpoint."""

    allow: list[str] = field(default_factory=list)
    """Settings, by path (``optimizer.lr``, ``max_duration``, a section such as ``optimizer``, ``dataset``,
    ``tokenizer``), that may differ from the checkpoint's; else a difference that would change the run is refused."""


@dataclass(frozen=True)
class RunConfig:
    """One pretraining run."""

    run_name: str
    """Names the run in logs and, through ``{run_name}``, in paths."""
    data_local: str
    """Folder of the dataset, with one subfolder a split; the cache when there is a ``data_remote``."""
    max_seq_len: int
    """Longest sample in tokens, [CLS] and [SEP] included."""
    tokenizer_name: str
    """Tokenizer: a folder, or a name on the Hugging Face hub."""
    mlm_probability: float | MaskingSchedule
    """Share of training tokens masked, or ``{initial: …, final: …}``, linear over the run."""
    model: Component
    """``mosaic_bert`` or ``hf_bert``, with ``model_config``."""
    train_loader: TrainLoaderConfig
    """The training data."""
    eval_loader: EvalLoaderConfig
    """The held-out data."""
    optimizer: Component
    """``decoupled_adamw`` or ``adamw``, with ``lr`` and the rest."""
    scheduler: Component
    """``linear_decay_with_warmup``, ``cosine_with_warmup``, ``constant_with_warmup`` or ``warmup_stable_decay``."""
    max_duration: str
    """Length of the run, for example 70000ba, 286720000sp or 1ep."""
    global_train_batch_size: int
    """Sequences in a step, over all devices; a multiple of their number."""
    device_eval_batch_size: int
    """Sequences in a batch of evaluation, on each device. The result does not depend on it."""

    time_limit: str | None = None
    """Time such as 4h, 30min or 90s after which the run stops and saves; the schedule stays that of the whole run."""
    data_remote: str | None = None
    """Where to stream the dataset from: a path or an object-store URI. None: it is in ``data_local`` already."""
    data_verify: Literal["size", "hash", "off"] = "size"
    """What is checked of the shards before the first step: that each is here with its ``size``; its ``hash`` too, which
    reads all of the data once, and each shard that is streamed later; or nothing but the index (``off``)."""
    device_train_microbatch_size: int | Literal["auto"] = "auto"
    """Sequences that a device works on at once; the loss does not depend on it. ``auto`` (GPU) finds what fits."""
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] = "amp_bf16"
    """Type of the matrix products. ``amp_*`` need a GPU."""
    seed: int = 17
    """Of weights, order, masks and dropout."""
    eval_loaders: dict[str, EvalLoaderConfig] = field(default_factory=dict)
    """More held-out data, by name; metrics are ``metrics/<name>/…`` beside eval_loader's ``metrics/eval/…``."""
    eval_interval: str | int = "1ep"
    """How often to evaluate, and at the end; 0 for never."""
    algorithms: Named = field(default_factory=dict)
    """Composer's algorithms by name, with what each takes."""
    callbacks: Named = field(default_factory=dict)
    """Composer's callbacks by name, with what each takes."""
    loggers: Named = field(default_factory=dict)
    """Composer's loggers by name, with what each takes."""
    progress_bar: bool = True
    """Draw a progress bar."""
    save_folder: str | None = None
    """Where checkpoints and the resolved config go: a path or an object-store URI. None saves nothing."""
    save_interval: str = "1ep"
    """How often to save; the end of the run is always saved. No effect without ``save_folder``."""
    save_num_checkpoints_to_keep: int = -1
    """How many of the latest to keep, 2 or more, so that one may be damaged; -1 keeps all. No effect without
    ``save_folder``."""
    save_overwrite: bool = False
    """Whether checkpoints of an earlier run in the same folder may be overwritten."""
    load_path: str | None = None
    """Checkpoint to begin from."""
    load_weights_only: bool = False
    """Take only the weights from ``load_path`` and begin a new run with them."""
    pretrained: str | None = None
    """Weights to begin a new run with: a checkpoint or its folder, or a Hugging Face folder. All of the model's must be
    there, and shape and tokenizer be the run's. Not read when the run goes on from a checkpoint, which has weights."""
    autoresume: bool = False
    """Go on from the latest checkpoint in ``save_folder`` if there is one."""
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    """What may differ from the checkpoint that the run goes on from."""
    compile_config: dict[str, Any] | None = None
    """Arguments of torch.compile; ``{}`` compiles with its defaults. None does not compile."""
    parallelism_config: dict[str, Any] | None = None
    """``{fsdp: {}}`` shards weights, gradients and the optimizer's state over the processes (FSDP2). None is DDP."""
    dist_timeout: float = 1800
    """Seconds after which a process that waits for another gives up."""


FREE = (
    *("run_name", "data_local", "data_remote", "data_verify", "tokenizer_name"),  # what is in them is compared instead
    *(f"train_loader.{f.name}" for f in dataclasses.fields(LoaderConfig)),
    *("eval_loader", "eval_loaders", "device_eval_batch_size", "eval_interval"),
    *("device_train_microbatch_size", "time_limit", "callbacks", "loggers", "progress_bar"),
    *("save_folder", "save_interval", "save_num_checkpoints_to_keep", "save_overwrite"),
    *("load_path", "load_weights_only", "autoresume", "resume", "dist_timeout"),
    *("compile_config", "parallelism_config", "model.attention", "model.gradient_checkpointing"),
)
"""Settings, and sections of them, that do not change what a run computes, but for rounding; all others do."""

DURATION = re.compile(r"[1-9]\d*(ba|sp|tok|ep)")

TIME = re.compile(r"(\d+(?:\.\d+)?)(d|h|min|s)")

INTERVAL = re.compile(r"[1-9]\d*(ba|sp|tok|ep|sec)|0?\.\d+dur|1dur")


def load(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML and ``key=value`` overrides (``train_loader.split=val``) into a run; raises as ``read`` does."""
    return _fill(read(RunConfig, path, overrides, _check))


def seconds(time: str) -> float:
    """A ``time_limit`` in seconds."""
    match = TIME.fullmatch(time)
    assert match is not None, "checked by load"
    return float(match[1]) * {"d": 86400, "h": 3600, "min": 60, "s": 1}[match[2]]


def settings(config: RunConfig) -> dict[str, Any]:
    """What decides a run's result, by path, ``{"optimizer.lr": 5e-4, ...}``: all of the config but what is FREE."""
    flat: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if any(is_within(path, free) for free in FREE):
            return
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                walk(inner, f"{path}.{name}" if path else name)
        else:
            flat[path] = value

    walk(to_dict(config), "")
    return flat


def _check(config: RunConfig, faults: list[str]) -> None:
    """Values that have the right type and make no sense."""

    def want(ok: bool, path: str, value: Any, what: str) -> None:
        if not ok:
            faults.append(f"{path}: {value!r} is not {what}")

    loaders: dict[str, LoaderConfig] = {"train_loader": config.train_loader, "eval_loader": config.eval_loader}
    loaders |= {f"eval_loaders.{name}": loader for name, loader in config.eval_loaders.items()}
    rates = {
        f"{path}.mlm_probability": loader.mlm_probability
        for path, loader in loaders.items()
        if isinstance(loader, EvalLoaderConfig)
    }
    if isinstance(config.mlm_probability, MaskingSchedule):
        rates["mlm_probability.initial"] = config.mlm_probability.initial
        rates["mlm_probability.final"] = config.mlm_probability.final
    else:
        rates["mlm_probability"] = config.mlm_probability
    for path, rate in rates.items():
        want(0 < rate < 1, path, rate, "between 0 and 1")

    for name in ("max_seq_len", "global_train_batch_size", "device_eval_batch_size", "dist_timeout"):
        want(getattr(config, name) > 0, name, getattr(config, name), "positive")
    want(config.max_seq_len > 2, "max_seq_len", config.max_seq_len, "more than the 2 special tokens of a sample")
    if config.device_train_microbatch_size != "auto":
        size = config.device_train_microbatch_size
        want(size > 0, "device_train_microbatch_size", size, "positive")
    nodes = config.train_loader.num_canonical_nodes
    want(nodes > 0, "train_loader.num_canonical_nodes", nodes, "positive")
    for path, loader in loaders.items():
        want(loader.num_workers >= 0, f"{path}.num_workers", loader.num_workers, "0 or more")
        for name in ("prefetch_factor", "predownload", "download_retry", "download_timeout", "timeout"):
            value = getattr(loader, name, None)
            want(value is None or value > 0, f"{path}.{name}", value, "positive")
        streams = loader.streams.values() if isinstance(loader, TrainLoaderConfig) else ()
        for name in ("prefetch_factor", "persistent_workers"):
            if getattr(loader, name) and not loader.num_workers:
                faults.append(f"{path}.{name}: acts only with num_workers")
        for name in ("predownload", "cache_limit", "download_retry", "download_timeout"):
            if getattr(loader, name, None) is not None and not any(_remote(config, x) for x in streams or [loader]):
                faults.append(f"{path}.{name}: acts only on data that is streamed from a remote")
    _check_order(config, faults)
    for name in config.eval_loaders:
        want(name not in ("train", "eval"), "eval_loaders", name, "a name of your own; train and eval are taken")

    want(
        bool(DURATION.fullmatch(config.max_duration)),
        "max_duration",
        config.max_duration,
        "a number with ba, sp, tok or ep",
    )
    intervals = {"save_interval": config.save_interval}
    if config.eval_interval != 0:
        intervals["eval_interval"] = str(config.eval_interval)
    for path, interval in intervals.items():
        want(bool(INTERVAL.fullmatch(interval)), path, interval, "a number with ba, sp, tok, ep, sec or dur")

    if config.time_limit is not None:
        want(bool(TIME.fullmatch(config.time_limit)), "time_limit", config.time_limit, "a number with d, h, min or s")
    if config.autoresume and config.save_folder is None:
        faults.append("autoresume: there is nothing to resume from without a save_folder")
    keep = config.save_num_checkpoints_to_keep
    want(keep == -1 or keep >= 2, "save_num_checkpoints_to_keep", keep, "-1 (all) or at least 2: one may be damaged")
    known = [f.name for f in dataclasses.fields(RunConfig)] + ["dataset", "tokenizer"]
    for name in config.resume.allow:
        if name.split(".")[0] not in known:
            faults.append(f"resume.allow: {name!r} is no setting; {nearest(name.split('.')[0], known)}")
        elif any(is_within(name, free) for free in FREE):
            faults.append(f"resume.allow: {name!r} may always change")
    if config.load_weights_only and config.load_path is None:
        faults.append("load_weights_only: acts only with a load_path")
    if config.load_weights_only and config.pretrained is not None:
        faults.append("pretrained: load_path with load_weights_only gives weights too; take one of them")


def _remote(config: RunConfig, source: LoaderConfig | Source) -> str | None:
    """Where a dataset is streamed from: its own remote, or the run's where it names no folder of its own."""
    return source.remote or (config.data_remote if source.local is None else None)


def _check_order(config: RunConfig, faults: list[str]) -> None:
    """Which samples training draws, and in which order."""
    loader = config.train_loader
    window, nodes = loader.length_window, loader.num_canonical_nodes
    if window < 0:
        faults.append(f"train_loader.length_window: {window} is not 0 or more")
    if window and not loader.shuffle:
        faults.append("train_loader.length_window: acts only with shuffle")
    if window and nodes > 0 and config.global_train_batch_size % nodes:
        faults.append(
            f"train_loader.length_window: needs a global_train_batch_size that is a multiple of num_canonical_nodes; "
            f"{config.global_train_batch_size} is none of {nodes}"
        )
    if loader.streams and (loader.local or loader.remote):
        faults.append("train_loader: local and remote are given by each of the streams, or without streams")
    seen: dict[Any, str] = {}
    kinds = set()
    for name, stream in loader.streams.items():
        path = f"train_loader.streams.{name}"
        weights = [kind for kind in ("proportion", "repeat", "choose") if getattr(stream, kind) is not None]
        kinds.add("proportion" if weights == ["proportion"] else "repeat or choose")
        for kind in weights:
            if getattr(stream, kind) <= 0:
                faults.append(f"{path}.{kind}: {getattr(stream, kind)!r} is not positive")
        if len(weights) > 1:
            faults.append(f"{path}: {' and '.join(weights)}: one weight is enough")
        folder = stream.local or config.data_local, stream.split or loader.split
        if folder in seen:
            faults.append(f"{path}: is the same folder as streams.{seen[folder]}; raise its weight instead")
        seen[folder] = name
    if len(kinds) > 1:
        faults.append("train_loader.streams: all of them take a proportion, or none does")


def _fill(config: RunConfig) -> RunConfig:
    """The run with what one key takes from another written out."""

    def fill(loader: Any, **more: Any) -> Any:
        more |= {"local": loader.local or config.data_local, "remote": _remote(config, loader)}
        return dataclasses.replace(loader, **more)

    train, seed = config.train_loader, config.train_loader.shuffle_seed
    # By name, so that the order of samples, and their ids, do not hang on the order of lines.
    streams = {name: fill(stream, split=stream.split or train.split) for name, stream in sorted(train.streams.items())}
    order = {"shuffle_seed": config.seed if seed is None else seed, "streams": streams}
    return dataclasses.replace(
        config,
        train_loader=dataclasses.replace(train, **order) if streams else fill(train, **order),
        eval_loader=fill(config.eval_loader),
        eval_loaders={name: fill(loader) for name, loader in config.eval_loaders.items()},
    )
