"""Size, work and memory of a run, before it starts: `main.py --validate`."""

import math
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from composer.core import Time, Timestamp
from composer.optim import ComposerScheduler
from composer.utils import dist, get_device
from transformers import PreTrainedTokenizerFast

from src.configuration_bert import MosaicBertConfig
from src.data.masking import MaskingCollator
from src.data.microbatches import fullest_batch, num_tokens
from src.data_c4 import StreamingC4
from src.mosaic_bert import MaskedLMModel
from src.train import builders, checkpoint, models, weights
from src.train.config import MaskingSchedule, RunConfig
from src.train.data import (
    build_evaluators,
    build_train_data,
    device_train_batch_size,
    highest_rate,
    microbatch_size,
    split_batch,
)
from src.train.muon import newton_schulz_flops
from src.train.optim import OPTIMIZERS, build_scheduler
from src.train.schema import build

SAMPLES = 512
"""Samples, evenly spread over the training data, that lengths are estimated from."""


def validate(config: RunConfig) -> str:
    """Build what training would build, and describe the run: a line each for its size, work and memory.

    Raises:
        ConfigError, DataError, CheckpointError: what ``build_trainer`` would raise for this config.
    """
    builders.check_processes(config)
    builders.check_components(config)
    tokenizer = builders.build_tokenizer(config, None)
    model = models.build_model(config, tokenizer)
    checkpoint.check_store("load_path", config.load_path, writes=False)
    optimizer = build("optimizer", OPTIMIZERS, config.optimizer, model=model)
    if config.load_path is None:
        weights.initialise(config, model, tokenizer)
    elif builders.is_local(config.load_path):
        state = checkpoint.read(config.load_path, to_resume=not config.load_weights_only)
        checkpoint.check_fits(config.load_path, state["model"], model)
        if not config.load_weights_only:
            checkpoint.check_optimizer(config.load_path, state["optimizers"], optimizer)
    builders.build_all("algorithms", builders.ALGORITHMS, config.algorithms)
    builders.build_callbacks(config, tokenizer, model)
    builders.build_parallelism(config)
    train_data = build_train_data(config, tokenizer)
    build_evaluators(config, tokenizer, train_data)

    dataset: Any = train_data.dataloader.dataset  # pyright: ignore[reportAttributeAccessIssue]
    rate, sequences = config.mlm_probability, config.global_train_batch_size
    rate = rate.initial if isinstance(rate, MaskingSchedule) else rate
    collator = MaskingCollator(tokenizer, rate, config.seed, config.mlm_whole_words)
    picked = sample_ids(dataset)
    batch = collator([dataset[i] for i in picked])
    tokens = num_tokens(batch)["total"]
    per_sample = tokens / len(picked)
    epoch = math.ceil(dataset.epoch_size / sequences)  # steps; the last batch has what is left
    scheduler = build_scheduler(config.scheduler, config.max_duration, epoch)
    steps = total_steps(config, epoch, dataset.epoch_size, per_sample)
    parameters = sum(p.numel() for p in model.parameters())
    warmup, decay = schedule_shares(scheduler, config, steps, epoch, dataset.epoch_size, per_sample)
    flops = model.flops_per_batch(batch) / tokens
    devices = dist.get_world_size()
    added = newton_schulz_flops(optimizer, devices) / (flops * per_sample * sequences / devices)
    lines = {
        "parameters": f"{parameters:,}",
        "optimizer": f"{config.optimizer.name}: {optimizer_groups(optimizer)}",
        "training data": f"{dataset.size:,} samples of {per_sample:.1f} tokens, of at most {config.max_seq_len}",
        **({"mixture": mixture(dataset)} if config.train_loader.streams else {}),
        "global batch": f"{sequences:,} samples, about {per_sample * sequences:,.0f} tokens, over {devices} devices",
        "steps": f"{steps:,}, {steps / epoch:.2f} epochs",
        "schedule": f"{warmup:.1%} warmup, {decay:.1%} decay",
        "work": f"{flops / 1e6:,.1f} MFLOP per token, forward and backward"
        + (f"; Muon's products add {added:.1%}" if added else ""),
        **memory(config, model, parameters, tokenizer),
    }
    return "\n".join(f"{name + ':':16}{line}" for name, line in lines.items())


def optimizer_groups(optimizer: torch.optim.Optimizer) -> str:
    """Which parameters change by Muon and which by AdamW, their learning rates if they differ, and what share of a
    weight a step's decay takes."""
    kinds, rates = defaultdict(list), {group["lr"] for group in optimizer.param_groups}
    for group in optimizer.param_groups:
        kinds["Muon" if group.get("parts") else "AdamW", group["lr"], group["weight_decay"]].append(group)
    parts = []
    for (method, lr, decay), groups in sorted(kinds.items(), key=lambda kind: kind[0][0] == "AdamW"):  # Muon first
        count = sum(max(1, group.get("parts", 0)) * len(group["params"]) for group in groups)
        every = [p for group in groups for p in group["params"]]
        are_matrices = {p.ndim > 1 for p in every}
        what = "tensors" if len(are_matrices) > 1 else "matrices" if True in are_matrices else "vectors"
        shown = f"{count:,} {what} ({sum(p.numel() for p in every) / 1e6:,.1f} M)"
        shown += f", lr {lr:g}" if len(rates) > 1 else ""
        parts.append(f"{method} for {shown}, {f'decay {decay:g} * lr' if decay else 'no decay'}")
    return "; ".join(parts)


def sample_ids(dataset: StreamingC4) -> np.ndarray[Any, Any]:
    """About ``SAMPLES`` ids, evenly spread over the data; from each dataset of a mixture, its share."""
    parts = zip(dataset.sample_offset_per_stream, dataset.samples_per_stream, dataset.shares.values(), strict=True)
    picked = [
        first + np.linspace(0, size - 1, max(1, round(SAMPLES * share))).astype(int) for first, size, share in parts
    ]
    return np.unique(np.concatenate(picked))


def mixture(dataset: StreamingC4) -> str:
    """Share and number of draws per epoch of each dataset in a mixture."""
    sources = zip(dataset.shares.items(), dataset.streams, dataset.samples_per_stream, strict=True)
    parts = [
        f"{name} {share:.1%} ({stream.choose:,} draws of {size:,} samples)" for (name, share), stream, size in sources
    ]
    return f"{', '.join(parts)}; an epoch is {dataset.epoch_size:,} samples"


def total_steps(config: RunConfig, steps_per_epoch: int, samples_per_epoch: int, tokens_per_sample: float) -> int:
    """Steps of the whole run; an estimate if max_duration is in tokens. The last step of an epoch may be smaller."""
    duration = Time.from_timestring(config.max_duration)
    if duration.unit.value == "ba":
        return duration.value
    samples_per_unit = {"sp": 1, "tok": 1 / tokens_per_sample, "ep": samples_per_epoch}[duration.unit.value]
    epochs, samples = divmod(duration.value * samples_per_unit, samples_per_epoch)
    return int(epochs) * steps_per_epoch + math.ceil(samples / config.global_train_batch_size)


def schedule_shares(
    scheduler: ComposerScheduler,
    config: RunConfig,
    steps: int,
    steps_per_epoch: int,
    samples_per_epoch: int,
    tokens_per_sample: float,
) -> tuple[float, float]:
    """Shares of the run with warmup, before the highest learning rate, and with decay, after it."""
    points = min(steps, 2000)
    end = Time.from_timestring(config.max_duration)
    state: Any = SimpleNamespace(max_duration=end, dataloader_len=steps_per_epoch)
    factors = []
    for point in range(points + 1):
        batch = round(steps * point / points)
        samples = round(batch / steps_per_epoch * samples_per_epoch)
        state.timestamp = Timestamp(batch=batch, sample=samples, token=round(samples * tokens_per_sample))
        factors.append(scheduler(state))
    highest = [point for point, value in enumerate(factors) if value >= max(factors) - 1e-9]
    return highest[0] / points, 1 - highest[-1] / points


CARDS = (16, 24, 40, 48, 80, 141)
"""Memory of GPUs that people have, in GB (1e9 bytes)."""


def memory(
    config: RunConfig, model: MaskedLMModel, parameters: int, tokenizer: PreTrainedTokenizerFast
) -> dict[str, str]:
    """GiB per device in the worst case: all sequences of a microbatch have max_seq_len tokens (T = B * S), or as many
    tokens as ``device_train_microbatch_tokens``; and what fits on the ``CARDS``.

    Counts weights, gradients and Adam's two moments in fp32; with FSDP, a device's share of them. Muon has one moment,
    but its step holds a batch of updates: it counts as Adam. Activations are measured on one and two sequences and
    extrapolated; for ``amp_*`` without a GPU, those that the kernels save are counted. With gradient checkpointing the
    backward also holds a layer, recomputed. Workspaces and fragmentation are not included: a tenth of a card is left to
    them.
    """
    parallelism = builders.build_parallelism(config)
    sharded = 0 if parallelism is None else 16 if parallelism["fsdp"].reshard_after_forward else 12  # of 16 bytes
    states = (16 - sharded + sharded / dist.get_world_size()) * parameters
    size, tokens, S = microbatch_size(config), config.device_train_microbatch_tokens, config.max_seq_len
    device = get_device()  # the one that trains: kernels for CPU and GPU save different tensors
    model = device.module_to_device(model)
    low = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}.get(config.precision)

    options = models.read_options(config.model)
    impls = [(options.model_config or {}).get(name) for name in ("attention", "kernels")]
    # With amp_* the run trains on a GPU. Without one here, count what the kernels save there.
    counted = low is not None and device.name == "cpu" and impls == ["auto", "auto"]

    def saved(sequences: int, checkpointing: bool) -> int:
        if counted and not checkpointing:
            T = sequences * S
            return 2 * parameters + kernels_saved_bytes(model.config, T, math.ceil(highest_rate(config) * T))
        largest = split_batch(config)(fullest_batch(tokenizer, highest_rate(config), sequences, S), sequences)
        part = largest[0].to(next(model.parameters()).device)
        with torch.autocast("cuda" if device.name == "gpu" else "cpu", low, enabled=bool(low)):
            return saved_bytes(model, lambda: model(part))

    def kept(sequences: int) -> int:
        held = saved(sequences, options.gradient_checkpointing)
        if options.gradient_checkpointing:
            model.model.gradient_checkpointing_disable()
            layers = saved(sequences, False) - held  # the last one saves less than the others
            model.model.gradient_checkpointing_enable({"use_reentrant": False})
            held += layers // max(1, model.config.num_hidden_layers - 1)
        return held

    first, further = first_and_further(kept)
    lines = {}
    shown = f"{states / 2**30:.2f} GiB for weights, gradients and moments"
    if size == "auto":
        lines["memory"] = f"{shown}; auto finds the microbatch on the GPU"
    else:
        T = min(size * S, tokens or size * S)
        activations = first + (math.ceil(T / S) - 1) * further
        described = f"{size} x {S} tokens" if T == size * S else f"{T:,} tokens"
        lines["memory"] = (
            f"about {(states + activations) / 2**30:.2f} GiB per device in the worst case: {shown}, "
            f"{activations / 2**30:.2f} for a microbatch of {described}"
        )
    what, unit = ("sequences", 1) if tokens is None else ("tokens", S)
    share = device_train_batch_size(config)
    most = [int((0.9e9 * card - states - first) // further) + 1 for card in CARDS]
    fits = ["none" if n < 1 else "all of a step" if n >= share else f"{unit * n:,}" for n in most]
    on = ", ".join(f"{n} on {card} GB" for n, card in zip(fits, CARDS, strict=True))
    lines["microbatch"] = f"{what} that fit on a card: {on}"
    return lines


def first_and_further(kept: Callable[[int], int]) -> tuple[int, int]:
    """Bytes of one sequence, and of each further one. Constant parts, such as bf16 weights, are in the first."""
    first = kept(1)
    return first, kept(2) - first


def kernels_saved_bytes(config: MosaicBertConfig, T: int, M: int) -> int:
    """Bytes that the kernels save for the backward, in bf16 or fp16, of T tokens, M of them masked; without weights.

    The last layer saves, behind attention, M rows only. The logits are saved once, in the products' dtype.
    """
    D, N, V = config.hidden_size, config.num_attention_heads, config.vocab_size
    glu = 6 * config.intermediate_size  # the packed product and the result
    layer = 16 * D + glu + 4 * N + 16
    embeddings_and_last = (15 if config.hidden_dropout_prob else 14) * D + 4 * N + 16
    masked = 2 * V + glu + 18 * D + 48
    return T * ((config.num_hidden_layers - 1) * layer + embeddings_and_last) + M * masked


def saved_bytes(model: torch.nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that a forward pass saves for the backward, without the parameters."""
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
    del output  # kept until here: no address may be used twice
    return total
