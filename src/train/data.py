"""A run's training and validation data."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from composer.core import DataSpec, Evaluator
from composer.utils import dist
from transformers import PreTrainedTokenizerFast

from src import data_c4
from src.attention import resolve
from src.attention_tiles import tile_tables
from src.common.errors import ConfigError
from src.data.masking import EVALUATION_SEED, MaskingCollator
from src.data.microbatches import Batch, SplittingCollator, num_samples, num_tokens, split_padded, split_unpadded
from src.data.packing import Microbatch, SplitBatch
from src.data.source import real_folder
from src.train import processes
from src.train.config import LoaderConfig, MaskingSchedule, RunConfig


def device_train_batch_size(config: RunConfig) -> int:
    """Sequences per step and device."""
    sequences, devices = config.global_train_batch_size, dist.get_world_size()
    if sequences % devices:
        raise ConfigError(f"global_train_batch_size: expected a multiple of the {devices} devices, got {sequences}")
    return sequences // devices


def microbatch_size(config: RunConfig) -> int | Literal["auto"]:
    """Most sequences of a microbatch: the setting, but at most those of a step on a device."""
    size, most = config.device_train_microbatch_size, device_train_batch_size(config)
    return size if size == "auto" else min(size or most, most)


def build_train_data(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> DataSpec:
    """The training data, in batches of one device's share."""
    loader, batch_size = config.train_loader, device_train_batch_size(config)
    order = ("shuffle", "shuffle_seed", "num_canonical_nodes", "length_window", "moving_crop", "predownload")
    options = {name: getattr(loader, name) for name in order}
    dataset = _streaming_c4(config, tokenizer, loader, batch_size, **options)
    rate = None if isinstance(config.mlm_probability, MaskingSchedule) else config.mlm_probability
    collator = MaskingCollator(tokenizer, rate, config.seed, config.mlm_whole_words)
    size, tokens = microbatch_size(config), config.device_train_microbatch_tokens
    # Workers load ahead: of a scheduled rate, and a size that may still fall, only the main process knows.
    known = None if rate is None or size == "auto" else size
    return _data_spec(config, dataset, collator, loader, batch_size, known, tokens)


def build_evaluators(config: RunConfig, tokenizer: PreTrainedTokenizerFast, train: DataSpec) -> list[Evaluator]:
    """The validation sets: each sample once, the same masks for any ``seed``. Metrics are named by the set's label."""
    # streaming allows one dataset per folder. Evaluation only indexes it, so sets on the same folder share one.
    streams = {real_folder(stream.local, stream.split): name for name, stream in config.train_loader.streams.items()}
    datasets: dict[str, Any] = {}
    if not streams:
        own = real_folder(config.train_loader.local, config.train_loader.split)
        datasets[own] = train.dataloader.dataset  # pyright: ignore
    evaluators = []
    for label, loader in {"eval": config.eval_loader, **config.eval_loaders}.items():
        batch_size, folder = config.device_eval_batch_size, real_folder(loader.local, loader.split)
        if folder in streams:
            name = f"train_loader.streams.{streams[folder]}"
            raise ConfigError(f"{label}: this is the training data of {name}; use another split")
        if folder not in datasets:
            datasets[folder] = _streaming_c4(config, tokenizer, loader, batch_size)
        once = data_c4.ExactEvalDataset(datasets[folder], batch_size, dist.get_global_rank(), dist.get_world_size())
        collator = MaskingCollator(tokenizer, loader.mlm_probability, EVALUATION_SEED, loader.mlm_whole_words)
        spec = _data_spec(config, once, collator, loader, batch_size, batch_size)
        evaluators.append(Evaluator(label=label, dataloader=spec, device_eval_microbatch_size=batch_size))
    return evaluators


def highest_rate(config: RunConfig) -> float:
    """Highest masking rate of the run."""
    rate = config.mlm_probability
    return max(rate.initial, rate.final) if isinstance(rate, MaskingSchedule) else rate


def split_batch(config: RunConfig, tokens: int | None = None) -> Callable[[Batch | SplitBatch, int], SplitBatch]:
    """The function that hands out the microbatches of a split batch, and first splits a padded one, into microbatches
    of at most ``tokens``."""
    return partial(_hand_out, _split_of(config, tokens))


def _split_of(config: RunConfig, tokens: int | None) -> Callable[[Batch, int], SplitBatch]:
    if config.model.name != "mosaic_bert":
        return split_padded
    triton = resolve(config.model.options.get("attention", "auto")) == "triton"
    return partial(split_unpadded, tables_of=tile_tables if triton else None, tokens=tokens)


def _hand_out(split: Callable[[Batch, int], SplitBatch], batch: Batch | SplitBatch, microbatch_size: int) -> SplitBatch:
    if isinstance(batch, SplitBatch):
        return batch
    parts = split(batch, microbatch_size)
    return parts.pin_memory() if torch.cuda.is_available() else parts


def to_device(microbatch: Microbatch) -> Microbatch:
    """The microbatch where Composer puts the model: on this process's GPU if there is one."""
    return microbatch.to("cuda" if torch.cuda.is_available() else "cpu")


def _streaming_c4(
    config: RunConfig, tokenizer: PreTrainedTokenizerFast, loader: LoaderConfig, batch_size: int, **options: Any
) -> data_c4.StreamingC4:
    if loader is config.train_loader and config.train_loader.streams:
        options["sources"] = config.train_loader.streams
    else:
        options |= {"local": loader.local, "remote": loader.remote, "split": loader.split}
    for name in ("download_retry", "download_timeout"):
        if getattr(loader, name) is not None:  # None: streaming's default
            options[name] = getattr(loader, name)
    options["special_tokens"] = config.special_tokens
    options |= {"verify": config.data_verify, "cache_limit": loader.cache_limit, "batch_size": batch_size}
    dataset = data_c4.StreamingC4(tokenizer, config.max_seq_len, **options)
    if dist.get_local_rank() == 0:
        dataset.own_shared_memory()
    return dataset


def _data_spec(
    config: RunConfig,
    dataset: data_c4.StreamingC4 | data_c4.ExactEvalDataset,
    collator: MaskingCollator,
    loader: LoaderConfig,
    batch_size: int,
    size: int | None,
    tokens: int | None = None,
) -> DataSpec:
    """Of batches that the workers split into microbatches of ``size``, in pinned memory; without a size, of padded
    batches, which ``split_batch`` splits and pins."""
    workers = ("num_workers", "prefetch_factor", "persistent_workers", "timeout")
    return DataSpec(
        data_c4.build_dataloader(
            dataset,
            collator if size is None else SplittingCollator(collator, _split_of(config, tokens), size),
            batch_size,
            **{name: getattr(loader, name) for name in workers},
            pin_memory=torch.cuda.is_available() and size is not None,
            worker_init_fn=processes.settle_worker,
        ),
        split_batch=split_batch(config, tokens),  # pyright: ignore
        microbatch_transforms=to_device,  # pyright: ignore  # Composer passes a microbatch by, as it is no tensor
        get_num_samples_in_batch=num_samples,
        get_num_tokens_in_batch=num_tokens,  # pyright: ignore
    )
