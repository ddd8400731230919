"""What a run will do and need, told before it begins: `main.py --validate`."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from composer.core import Time, Timestamp
from composer.optim import ComposerScheduler
from composer.utils import dist, get_device

from src.data.masking import MaskingCollator
from src.data.microbatches import fullest_batch, num_tokens
from src.data_c4 import StreamingC4
from src.hf_bert import HFBert
from src.mosaic_bert import MosaicBert
from src.train.builders import build_parallelism
from src.train.config import MaskingSchedule, RunConfig
from src.train.data import device_train_batch_size, highest_rate, split_batch

SAMPLES = 512
"""Samples, evenly spread over the training data, from which lengths are estimated."""


def summarize(config: RunConfig, model: MosaicBert | HFBert, dataset: StreamingC4, scheduler: ComposerScheduler) -> str:
    """Size, work and memory of a run, a line each; nothing is trained.

    Args:
        config: of the run.
        model: with its weights on the CPU.
        dataset: the training data; only indexed.
        scheduler: of the learning rate.
    """
    rate = config.mlm_probability
    collator = MaskingCollator(
        dataset.tokenizer, rate.initial if isinstance(rate, MaskingSchedule) else rate, config.seed
    )
    picked = sample_ids(dataset)
    batch = collator([dataset[i] for i in picked])
    tokens = num_tokens(batch)
    per_sample = tokens["total"] / len(picked)
    steps = total_steps(config, dataset.epoch_size, per_sample)
    parameters = sum(p.numel() for p in model.parameters())
    warmup, decay = schedule_shares(scheduler, config, steps, dataset.epoch_size, per_sample)
    lines = {
        "parameters": f"{parameters:,}",
        "training data": f"{dataset.size:,} samples of {per_sample:.1f} tokens, of at most {config.max_seq_len}",
        **({"mixture": mixture(dataset)} if config.train_loader.streams else {}),
        "global batch": f"{config.global_train_batch_size:,} samples, about "
        f"{per_sample * config.global_train_batch_size:,.0f} tokens, over {dist.get_world_size()} devices",
        "steps": f"{steps:,}, {steps * config.global_train_batch_size / dataset.epoch_size:.2f} passes over the data",
        "schedule": f"{warmup:.1%} warmup, {decay:.1%} decay",
        "work": f"{model.flops_per_batch(batch) / tokens['total'] / 1e6:,.1f} MFLOP a real token, forward and backward",
        "memory": memory(config, model, parameters, dataset),
    }
    return "\n".join(f"{name + ':':16}{line}" for name, line in lines.items())


def sample_ids(dataset: StreamingC4) -> np.ndarray[Any, Any]:
    """About ``SAMPLES`` ids, evenly spread over the data; of mixed datasets, of each its share."""
    parts = zip(dataset.sample_offset_per_stream, dataset.samples_per_stream, dataset.shares.values(), strict=True)
    return np.concatenate(
        [
            first + np.unique(np.linspace(0, samples - 1, max(1, round(SAMPLES * share))).astype(int))
            for first, samples, share in parts
        ]
    )


def mixture(dataset: StreamingC4) -> str:
    """Share and number of draws of each of the mixed datasets in an epoch."""
    draws = zip(dataset.shares.items(), dataset.streams, dataset.samples_per_stream, strict=True)
    parts = (
        f"{name} {share:.1%} ({stream.choose:,} draws of {samples:,} samples)"
        for (name, share), stream, samples in draws
    )
    return f"{', '.join(parts)}; an epoch is {dataset.epoch_size:,} samples"


def total_steps(config: RunConfig, samples: int, tokens_per_sample: float) -> int:
    """Steps of the whole run; with a max_duration in tokens, about so many."""
    duration, sequences = Time.from_timestring(config.max_duration), config.global_train_batch_size
    in_steps = {
        "ba": duration.value,
        "sp": duration.value / sequences,
        "tok": duration.value / (sequences * tokens_per_sample),
        "ep": duration.value * steps_per_epoch(config, samples),
    }
    return math.ceil(in_steps[duration.unit.value])


def steps_per_epoch(config: RunConfig, samples: int) -> int:
    """Steps of one pass over the data; the last may repeat samples to be full."""
    return math.ceil(samples / config.global_train_batch_size)


def schedule_shares(
    scheduler: ComposerScheduler, config: RunConfig, steps: int, samples: int, tokens_per_sample: float
) -> tuple[float, float]:
    """Shares of the run in which the rate rises to its highest, and in which it falls from it."""
    points = min(steps, 2000)
    sequences = config.global_train_batch_size

    def factor(point: int) -> float:
        batch = round(steps * point / points)
        now = Timestamp(batch=batch, sample=batch * sequences, token=round(batch * sequences * tokens_per_sample))
        state: Any = SimpleNamespace(
            timestamp=now,
            max_duration=Time.from_timestring(config.max_duration),
            dataloader_len=steps_per_epoch(config, samples),
        )
        return scheduler(state)

    factors = [factor(point) for point in range(points + 1)]
    highest = [point for point, value in enumerate(factors) if value >= max(factors) - 1e-9]
    return highest[0] / points, 1 - highest[-1] / points


def memory(config: RunConfig, model: MosaicBert | HFBert, parameters: int, dataset: StreamingC4) -> str:
    """Bytes of a device at the worst case, every sequence of a microbatch at its longest (T = B * S).

    Weights, gradients and Adam's two moments in fp32 are counted, a device's share of them with FSDP; what the backward
    pass needs is measured on one and two sequences and extrapolated. A framework's workspace and fragmentation come on
    top.
    """
    parallelism = build_parallelism(config)
    sharded = 0 if parallelism is None else 16 if parallelism["fsdp"].reshard_after_forward else 12  # of 16 bytes
    states = (16 - sharded + sharded / dist.get_world_size()) * parameters
    size = config.device_train_microbatch_size
    if size == "auto":
        return f"{states / 2**30:.2f} GiB for weights, gradients and Adam; the microbatch is found on the GPU"
    S = config.max_seq_len
    device = get_device()  # the one that will train: each kind of kernel keeps other things
    model = device.module_to_device(model)
    low = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}.get(config.precision)

    def kept(sequences: int) -> int:
        (part,) = split_batch(config)(fullest_batch(dataset.tokenizer, highest_rate(config), sequences, S), sequences)
        part = device.batch_to_device(part)
        with torch.autocast("cuda" if device.name == "gpu" else "cpu", low, enabled=bool(low)):
            return saved_bytes(model, lambda: model(part))

    activations = extrapolated(kept, min(size, device_train_batch_size(config)))
    return (
        f"about {(states + activations) / 2**30:.2f} GiB a device at the worst case: {states / 2**30:.2f} for weights, "
        f"gradients and Adam, {activations / 2**30:.2f} for a microbatch of {size} x {S} tokens"
    )


def extrapolated(kept: Callable[[int], int], size: int) -> int:
    """What ``size`` sequences keep, from one and two: what is kept once, as copies of weights in bf16, counts once."""
    one = kept(1)
    return one + (size - 1) * (kept(2) - one)


def saved_bytes(model: torch.nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that a forward pass keeps for the backward, beside the model's parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = forward()
    total = sum(saved.values())
    del output  # until here, so that no storage's address was used twice
    return total
