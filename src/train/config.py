"""What a run is: frozen dataclasses, read from one YAML and ``key=value`` overrides. Imports no torch.

    load("yamls/mosaic_bert.yaml", ["max_duration=10ba"]) -> RunConfig

This is the only place with defaults. One error reports every unknown, missing and ill-typed key, by its full path and
with the nearest known name. ``builders.check_components`` checks the options of components (an optimizer's betas, a
callback's interval). Texts are YAML 1.2: true and false are the only booleans, and ``off`` is a text. Fields that go to
Composer's Trainer keep Composer's names and units: ``ba`` batches, ``sp`` samples, ``tok`` tokens, ``ep`` epochs,
``dur`` a share of max_duration.
"""

import dataclasses
import fnmatch
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from src.data.source import Source, real_folder
from src.train.schema import (
    INTERVAL,
    NAMES,
    NO_KEY,
    PLACEHOLDERS,
    Component,
    Named,
    are_known,
    flat,
    keys_of,
    nearest,
    read,
    to_dict,
)
from src.train.yaml12 import interpolation, is_within, stored


@dataclass(frozen=True)
class MaskingSchedule:
    """A masking rate that changes linearly over the run (Ankner et al., 2023, arXiv 2305.15096)."""

    initial: float
    """Share of tokens masked at the first step."""
    final: float
    """Share of tokens masked at the last step."""


@dataclass(frozen=True)
class LoaderConfig:
    """Where the samples of training or evaluation come from."""

    split: str
    """Subfolder of the dataset."""
    local: str | None = None
    """Folder of the dataset; the cache if it is streamed. None: the run's ``data_local``."""
    remote: str | None = None
    """Where to stream from, into a ``local`` of its own. None: the run's ``data_remote`` if ``local`` is None too, else
    no streaming."""
    num_workers: int = 0
    """Worker processes that load, tokenize and mask. Batches do not depend on their number."""
    prefetch_factor: int | None = None
    """Batches that each worker loads ahead. None: 2. Refused without workers."""
    persistent_workers: bool = False
    """Keep the workers alive between epochs. Refused without workers."""
    timeout: float = 1800
    """Seconds to wait for a batch; then the run stops with an error. No effect without workers."""
    cache_limit: str | None = None
    """Size of the loader's caches together, for example ``100gb``, of at least 4 shards. Above it their least recently
    used shards are deleted. None keeps all. Refused without a remote."""
    download_retry: int | None = None
    """Attempts of a download. None: 2. Refused without a remote."""
    download_timeout: float | None = None
    """Seconds that a download may take. None: 60. Refused without a remote."""


@dataclass(frozen=True)
class TrainLoaderConfig(LoaderConfig):
    """The training data."""

    num_canonical_nodes: int = dataclasses.field(kw_only=True)
    """Nodes that the order of samples is computed for. It decides the order, so it is required; any number of nodes
    then sees the same global batches. A node reads fewest shards if it is a multiple of the number of nodes."""
    shuffle: bool = True
    """Random order, a different one each epoch."""
    shuffle_seed: int | None = None
    """Seed of that order. None: the run's ``seed``. No effect without ``shuffle``."""
    length_window: int = 0
    """Group the shuffled samples by length within windows of this many global batches, for example 64 (docs/data.md).
    A batch then has samples of similar lengths, and all ranks get nearly equal numbers of tokens. 0: no grouping. Needs
    ``shuffle``, tokenized shards with lengths.bin, and a global batch that is a multiple of ``num_canonical_nodes``."""
    moving_crop: bool = False
    """Random crop: each epoch takes another part of a text longer than ``max_seq_len`` tokens, not always its start.
    Needs shards of text."""
    predownload: int | None = None
    """Samples that each worker downloads ahead. None: 8 batches. Refused without a remote."""
    streams: dict[str, Source] = field(default_factory=dict)
    """Datasets to mix, by name; ``local`` and ``remote`` are then given per dataset."""


@dataclass(frozen=True)
class EvalLoaderConfig(LoaderConfig):
    """Validation data. Every sample counts once, and its masks are always the same."""

    mlm_probability: float = 0.15
    """Share of tokens masked. 15% at any rate of training: losses stay comparable."""
    mlm_whole_words: bool = False
    """Mask all pieces of a word or none. False, also if training masks whole words: losses stay comparable."""


@dataclass(frozen=True)
class ResumeConfig:
    """What may change when a run resumes from a checkpoint."""

    allow: list[str] = field(default_factory=list)
    """Paths of settings that may differ from the checkpoint's: ``optimizer.lr``, ``max_duration``, a section such as
    ``optimizer``, and ``dataset`` and ``tokenizer``. Any other difference that would change the run is refused."""


@dataclass(frozen=True)
class RunConfig:
    """One pretraining run."""

    run_name: str
    """Name of the run, in logs and in paths (``{run_name}``)."""
    data_local: str
    """Folder of the dataset, with one subfolder per split; the cache if there is a ``data_remote``."""
    max_seq_len: int
    """Longest sample in tokens, including [CLS] and [SEP]."""
    tokenizer_name: str | None
    """A folder, or a name on the Hugging Face Hub. null: the tokenizer of the checkpoint that the run resumes or starts
    from (``autoresume``, ``load_path``, ``pretrained``)."""
    mlm_probability: float | MaskingSchedule
    """Share of training tokens masked; or ``{initial: …, final: …}``, linear over the run."""
    model: Component
    """``mosaic_bert`` or ``hf_bert``, with ``model_config``."""
    train_loader: TrainLoaderConfig
    """The training data."""
    eval_loader: EvalLoaderConfig
    """The validation data."""
    optimizer: Component
    """``decoupled_adamw``, ``adamw`` or ``muon``, with ``lr`` and other options."""
    scheduler: Component
    """``linear_decay_with_warmup``, ``cosine_with_warmup``, ``constant_with_warmup`` or ``warmup_stable_decay``."""
    max_duration: str
    """Length of the run, for example 70000ba, 286720000sp or 1ep."""
    global_train_batch_size: int
    """Sequences per step, over all devices; a multiple of their number."""
    device_eval_batch_size: int
    """Sequences per evaluation batch, on each device. No effect on the result."""

    mlm_whole_words: bool = False
    """Mask all pieces of a word or none, in training; the share of tokens stays ``mlm_probability``."""
    time_limit: str | None = None
    """Stop and save after this time, for example 4h, 30min or 90s. The schedule stays that of the whole run."""
    data_remote: str | None = None
    """Where to stream the dataset from: a path or an object-store URI. None: it is in ``data_local``."""
    special_tokens: Literal["text", "tokens"] = "text"
    """What a word such as [MASK] in a text becomes: ordinary word pieces, or the special token. No effect on shards of
    tokens."""
    data_verify: Literal["size", "hash", "off"] = "size"
    """Check of the shards before the first step. ``size``: every shard is there, with its size. ``hash``: its hash too,
    which reads all the data once. ``off``: only the index. Streamed shards are always checked when they arrive."""
    device_train_microbatch_size: int | Literal["auto"] | None = None
    """Most sequences per microbatch. No effect on the loss. ``auto`` (GPU) finds what fits into memory. None: ``auto``,
    or no limit if there is a ``device_train_microbatch_tokens``."""
    device_train_microbatch_tokens: int | None = None
    """Most non-padding tokens per microbatch, for example 65536; at least ``max_seq_len``. No effect on the loss. The
    sequences of a step are dealt out to as few microbatches as possible, of nearly equal numbers of tokens
    (docs/data.md). Both limits hold, also with ``auto``. None: no limit. Refused for ``hf_bert``, with FSDP, and with
    ``auto`` on several GPUs."""
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] = "amp_bf16"
    """Dtype of matrix products. ``amp_*`` need a GPU."""
    seed: int = 17
    """Seed of weights, order, dropout and the masks of training. Evaluation masks alike for every seed."""
    eval_loaders: dict[str, EvalLoaderConfig] = field(default_factory=dict)
    """More validation sets, by name. Their metrics are ``metrics/<name>/…``; eval_loader's are ``metrics/eval/…``."""
    eval_interval: str | int = "1ep"
    """How often to evaluate, and once at the end; 0: never."""
    algorithms: Named = field(default_factory=dict)
    """Composer's algorithms by name, with their options."""
    callbacks: Named = field(default_factory=dict)
    """Callbacks by name, with their options."""
    loggers: Named = field(default_factory=dict)
    """Loggers by name, with their options."""
    progress_bar: bool = True
    """Draw a progress bar."""
    save_folder: str | None = None
    """Folder for checkpoints, tokenizer and config; or an object-store URI, for checkpoints only. None: no saving."""
    save_interval: str = "1ep"
    """How often to save, and once at the end. No effect without ``save_folder``."""
    save_num_checkpoints_to_keep: int = -1
    """Newest checkpoints to keep: at least 2 (one may be damaged), -1 for all. No effect without ``save_folder``."""
    save_overwrite: bool = False
    """Overwrite checkpoints of an earlier run in the same folder."""
    load_path: str | None = None
    """Checkpoint to start from."""
    load_weights_only: bool = False
    """Load only the weights from ``load_path``, and start a new run with them."""
    pretrained: str | None = None
    """Weights to start a new run with: a checkpoint, its folder, or a Hugging Face folder. They must have the model's
    shape, all its weights, and the run's tokenizer. Not read when the run resumes from a checkpoint."""
    autoresume: bool = False
    """Resume from the newest checkpoint in ``save_folder`` if there is one."""
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    """What may differ from the checkpoint that the run resumes from."""
    compile_config: dict[str, Any] | None = None
    """Arguments of torch.compile; ``{}`` compiles with the defaults. None: no compilation."""
    parallelism_config: dict[str, Any] | None = None
    """``{fsdp: {}}`` shards weights, gradients and optimizer state over the processes (FSDP2). None: DDP."""
    dist_timeout: float = 1800
    """Seconds that a process waits for another before it stops with an error."""

    interpolations: dict[str, Any] = field(default_factory=dict, compare=False, repr=False, metadata=NO_KEY)
    """Values that depend on the environment, as the YAML has them, by path. They are written in place of the values."""


RESUME_SAFE = (
    *("run_name", "data_local", "data_remote", "data_verify", "tokenizer_name"),  # fingerprints of the contents count
    *(f"train_loader.{f.name}" for f in dataclasses.fields(LoaderConfig)),
    *(f"train_loader.streams.*.{name}" for name in ("local", "remote", "split")),
    *("eval_loader", "eval_loaders", "device_eval_batch_size", "eval_interval"),
    *("device_train_microbatch_size", "device_train_microbatch_tokens", "time_limit"),
    *("callbacks", "loggers", "progress_bar"),
    *("save_folder", "save_interval", "save_num_checkpoints_to_keep", "save_overwrite"),
    *("load_path", "load_weights_only", "autoresume", "resume", "dist_timeout"),
    *("compile_config", "parallelism_config", "model.attention", "model.gradient_checkpointing"),
)
"""Settings and sections that may change on resume: they affect the result at most by rounding. ``*`` is any name."""

ADDED = {"train_loader.moving_crop": False, "mlm_whole_words": False, "special_tokens": "tokens"}
"""Settings that checkpoints of earlier versions lack, with the values that these runs had."""

FILLED_FROM = ("data_local", "data_remote", "seed", "train_loader.split")
"""Settings that are the default of others."""

DURATION = re.compile(r"[1-9]\d{0,17}(ba|sp|tok|ep)")
LONGEST_WAIT = 2_000_000
"""Seconds: poll(2), which waits for workers, takes less than 2^31 milliseconds."""
TIME = re.compile(r"(\d+(?:\.\d+)?)(d|h|min|s)")


def load(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """A run's config from a YAML and overrides such as ``train_loader.split=val``; raises what ``read`` does."""
    config = read(RunConfig, path, overrides, _check)
    filled = _fill(config)
    before, after = flat(to_dict(config)), flat(to_dict(filled))
    sources = [name for name in from_environment(config) if name in FILLED_FROM]
    new = [(path, value) for path, value in after.items() if value is not None and before.get(path) is None]
    copies = {path: f"${{{name}}}" for path, value in new for name in sources if value == before[name]}
    return dataclasses.replace(filled, interpolations={**config.interpolations, **copies})


def seconds(time: str) -> float:
    """A ``time_limit`` in seconds."""
    match = TIME.fullmatch(time)
    assert match is not None, "checked by load"
    return float(match[1]) * {"d": 86400, "h": 3600, "min": 60, "s": 1}[match[2]]


def resume_safe(path: str) -> bool:
    """Whether a setting may change on resume."""
    return any(is_within(path, safe) or fnmatch.fnmatchcase(path, safe) for safe in RESUME_SAFE)


def settings(config: RunConfig) -> dict[str, Any]:
    """Settings that decide a run's result, by path: ``{"optimizer.lr": 5e-4, ...}``; all but RESUME_SAFE.

    A value from the environment is replaced by its interpolation and a digest: checkpoints hold these settings. Not so
    the model's, without which nobody could load the weights.
    """
    hidden = {path: text for path, text in config.interpolations.items() if not is_within(path, "model")}
    values = flat(stored(to_dict(config), hidden))
    return {path: value for path, value in values.items() if not resume_safe(path)}


def from_environment(config: RunConfig) -> dict[str, Any]:
    """Values that depend on the environment, by path: what earlier versions stored in checkpoints."""
    values = flat(to_dict(config))
    return {path: value for path, value in values.items() if interpolation(path, config.interpolations) is not None}


def _check(config: RunConfig, faults: list[str]) -> None:
    """Append to ``faults`` what is wrong with values of the right type."""

    def expect(ok: bool, path: str, what: str, value: Any) -> None:
        if not ok:
            faults.append(f"{path}: expected {what}, got {value!r}")

    rate = config.mlm_probability
    if isinstance(rate, MaskingSchedule):
        expect(0 < rate.initial < 1, "mlm_probability.initial", "a share between 0 and 1", rate.initial)
        expect(0 < rate.final < 1, "mlm_probability.final", "a share between 0 and 1", rate.final)
    else:
        expect(0 < rate < 1, "mlm_probability", "a share between 0 and 1", rate)
    for name in ("global_train_batch_size", "device_eval_batch_size", "dist_timeout"):
        expect(getattr(config, name) > 0, name, "a positive number", getattr(config, name))
    wait = config.dist_timeout
    expect(wait <= LONGEST_WAIT, "dist_timeout", f"at most {LONGEST_WAIT:,} seconds", wait)
    expect(config.max_seq_len > 2, "max_seq_len", "more than the 2 special tokens of a sample", config.max_seq_len)
    size = config.device_train_microbatch_size
    expect(size in ("auto", None) or int(size) > 0, "device_train_microbatch_size", "a positive number", size)
    if (tokens := config.device_train_microbatch_tokens) is not None:
        path, least = "device_train_microbatch_tokens", f"at least max_seq_len ({config.max_seq_len})"
        expect(tokens >= config.max_seq_len, path, least, tokens)
        if config.model.name == "hf_bert":
            faults.append(f"{path}: hf_bert computes padding too, so give device_train_microbatch_size")
    _check_loaders(config, faults, expect)
    _check_order(config, faults, expect)

    for name in config.eval_loaders:
        expect(name not in ("train", "eval"), "eval_loaders", "a name other than train and eval", name)
    duration, time = config.max_duration, config.time_limit
    expect(bool(DURATION.fullmatch(duration)), "max_duration", "a number with ba, sp, tok or ep", duration)
    limits = time is None or (bool(TIME.fullmatch(time)) and seconds(time) > 0)
    expect(limits, "time_limit", "a number with d, h, min or s", time)
    for name, seed in (("seed", config.seed), ("train_loader.shuffle_seed", config.train_loader.shuffle_seed)):
        expect(seed is None or 0 <= seed < 2**32, name, "a number from 0 to less than 2^32", seed)
    folder, known = config.save_folder or "", PLACEHOLDERS if "://" in (config.save_folder or "") else ["run_name"]
    expect(are_known(folder, known), "save_folder", "no {placeholder} but " + ", ".join(known), folder)
    path = config.load_path or ""
    expect(are_known(path, NAMES), "load_path", "no {placeholder} but " + ", ".join(NAMES), path)
    interval, every = "a number with ba, sp, tok, ep, sec or dur", config.eval_interval
    expect(bool(INTERVAL.fullmatch(config.save_interval)), "save_interval", interval, config.save_interval)
    expect(every == 0 or bool(INTERVAL.fullmatch(str(every))), "eval_interval", interval, every)
    if config.autoresume and config.save_folder is None:
        faults.append("autoresume: nothing to resume from without a save_folder")
    keep = config.save_num_checkpoints_to_keep
    expect(keep == -1 or keep >= 2, "save_num_checkpoints_to_keep", "-1 (all) or at least 2 (one may be damaged)", keep)
    known = {**_setting_paths(RunConfig), "dataset": False, "tokenizer": False}
    for name in config.resume.allow:
        # Options of components, and names that users choose: builders.check_components knows those that can be.
        if name not in known and not any(is_open and is_within(name, path) for path, is_open in known.items()):
            faults.append(f"resume.allow: unknown setting {name!r}; {nearest(name, list(known))}")
        elif resume_safe(name):
            faults.append(f"resume.allow: {name!r} may always change; remove it")
    if config.load_weights_only and config.load_path is None:
        faults.append("load_weights_only: has no effect without load_path")
    if config.load_weights_only and config.pretrained is not None:
        faults.append("pretrained: load_path with load_weights_only sets the weights, too; give one of them")


def _setting_paths(kind: type, prefix: str = "") -> dict[str, bool]:
    """Paths of a dataclass's settings, and whether a path is a section with names of its own."""
    paths: dict[str, bool] = {}
    hints = typing.get_type_hints(kind)
    for name, hint in ((f.name, hints[f.name]) for f in keys_of(kind)):
        is_open = hint is Component or typing.get_origin(hint) is dict
        paths[f"{prefix}{name}"] = is_open
        for part in () if is_open else (hint, *typing.get_args(hint)):
            paths |= _setting_paths(part, f"{prefix}{name}.") if dataclasses.is_dataclass(part) else {}
    return paths


def _check_loaders(config: RunConfig, faults: list[str], expect: Callable[[bool, str, str, Any], None]) -> None:
    more = {f"eval_loaders.{name}": loader for name, loader in config.eval_loaders.items()}
    loaders: dict[str, LoaderConfig] = {"train_loader": config.train_loader, "eval_loader": config.eval_loader, **more}
    for path, loader in loaders.items():
        if isinstance(loader, EvalLoaderConfig):
            rate = loader.mlm_probability
            expect(0 < rate < 1, f"{path}.mlm_probability", "a share between 0 and 1", rate)
        expect(loader.num_workers >= 0, f"{path}.num_workers", "0 or more", loader.num_workers)
        for name in ("prefetch_factor", "predownload", "download_retry", "download_timeout", "timeout"):
            value = getattr(loader, name, None)
            expect(value is None or value > 0, f"{path}.{name}", "a positive number", value)
        for name in ("timeout", "download_timeout"):
            wait = getattr(loader, name) or 0
            expect(wait <= LONGEST_WAIT, f"{path}.{name}", f"at most {LONGEST_WAIT:,} seconds", wait)
        for name in ("prefetch_factor", "persistent_workers"):
            if getattr(loader, name) and not loader.num_workers:
                faults.append(f"{path}.{name}: has no effect without num_workers")
        sources = loader.streams.values() if isinstance(loader, TrainLoaderConfig) and loader.streams else [loader]
        for name in ("predownload", "cache_limit", "download_retry", "download_timeout"):
            if getattr(loader, name, None) is not None and all(_place(config, source).complete for source in sources):
                faults.append(f"{path}.{name}: has no effect without a remote to stream from")

    streams = config.train_loader.streams
    places: dict[str, LoaderConfig | Source] = {f"train_loader.streams.{name}": each for name, each in streams.items()}
    places |= {path: loader for path, loader in loaders.items() if not streams or path != "train_loader"}
    seen: dict[str, tuple[str, str]] = {}
    for path, source in places.items():
        if source.remote and not source.local and source.remote != config.data_remote:
            faults.append(f"{path}.remote: needs a local folder of its own as cache ({path}.local)")
            continue
        place = _place(config, source)
        other, origin = seen.setdefault(real_folder(place.local, place.split), (path, place.origin))
        if origin != place.origin:
            faults.append(f"{path}.local: {place.folder} is for {place.origin}, and in {other} for {origin}")


def _place(config: RunConfig, source: LoaderConfig | Source) -> Source:
    """Where a dataset is, with the defaults of the run."""
    split = source.split or config.train_loader.split
    return Source(source.local or config.data_local, _remote(config, source), split)


def _remote(config: RunConfig, source: LoaderConfig | Source) -> str | None:
    """Where a dataset is streamed from: its own remote; the run's if it has no folder of its own."""
    return source.remote or (config.data_remote if source.local is None else None)


def _check_order(config: RunConfig, faults: list[str], expect: Callable[[bool, str, str, Any], None]) -> None:
    """Check which samples training draws, and in which order."""
    loader, batch = config.train_loader, config.global_train_batch_size
    window, nodes = loader.length_window, loader.num_canonical_nodes
    expect(nodes > 0, "train_loader.num_canonical_nodes", "a positive number", nodes)
    expect(window >= 0, "train_loader.length_window", "0 or more", window)
    if window and not loader.shuffle:
        faults.append("train_loader.length_window: has no effect without shuffle")
    if window and nodes > 0:
        multiple = f"a multiple of num_canonical_nodes ({nodes}) with length_window"
        expect(batch % nodes == 0, "global_train_batch_size", multiple, batch)
    if loader.streams and (loader.local or loader.remote):
        faults.append("train_loader: with streams, give local and remote in each of them")
    expect("" not in loader.streams, "train_loader.streams", "names that are not empty", "")
    seen: dict[Any, str] = {}
    for name, stream in loader.streams.items():
        path = f"train_loader.streams.{name}"
        weights = [kind for kind in ("proportion", "repeat", "choose") if getattr(stream, kind) is not None]
        for kind in weights:
            most, value = (1e6 if kind == "repeat" else 1e12), getattr(stream, kind)
            expect(0 < value <= most, f"{path}.{kind}", f"a positive number of at most {most:g}", value)
        if len(weights) > 1:
            faults.append(f"{path}: {' and '.join(weights)}: give one of them")
        place = _place(config, stream)
        folder = real_folder(place.local, place.split), place.origin
        if folder in seen:
            faults.append(f"{path}: same folder as streams.{seen[folder]}; raise the weight of that one")
        seen[folder] = name
    if len({stream.proportion is None for stream in loader.streams.values()}) > 1:
        faults.append("train_loader.streams: give a proportion to each of them, or to none")


def _fill(config: RunConfig) -> RunConfig:
    """The config with every default that another key gives written out."""

    def fill(loader: Any, **more: Any) -> Any:
        more |= {"local": loader.local or config.data_local, "remote": _remote(config, loader)}
        return dataclasses.replace(loader, **more)

    train, seed = config.train_loader, config.train_loader.shuffle_seed
    # Sorted by name: the order of lines in the YAML must not change sample ids.
    streams = {name: fill(stream, split=stream.split or train.split) for name, stream in sorted(train.streams.items())}
    order = {"shuffle_seed": config.seed if seed is None else seed, "streams": streams}
    auto = config.device_train_microbatch_size is None and config.device_train_microbatch_tokens is None
    return dataclasses.replace(
        config,
        device_train_microbatch_size="auto" if auto else config.device_train_microbatch_size,
        train_loader=dataclasses.replace(train, **order) if streams else fill(train, **order),
        eval_loader=fill(config.eval_loader),
        eval_loaders={name: fill(loader) for name, loader in config.eval_loaders.items()},
    )
