"""A training step, ours beside Hugging Face's BERT: the same lengths, the same optimizer, one process, interleaved.

    python -m benchmarks.step [--layers 12] [--rounds 15] [--device cpu]

In each round each arm makes a step (forward, loss, backward, fused AdamW) on the same batch, and our step's matrix
products run once more alone, on inputs of the same shapes and strides. Printed: real tokens a second (from minima), the
median over rounds of the ratio of times beside the ratio of FLOPs, and the share of our step that is not matrix
products. Lengths are like C4's: lognormal, median 250 and mean 430 tokens, cut at S, in even quantiles. Hugging Face's
model runs without attention dropout, where it is fastest. Unpadding is part of our step. Imports neither Composer nor
streaming.
"""

import argparse
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from src.bert_layers import BertForMaskedLM, Layout
from src.bert_padding import unpad_input, unpad_layout
from src.configuration_bert import BertConfig

Batch = dict[str, torch.Tensor]
Arm = tuple[torch.nn.Module, Callable[[Batch], torch.Tensor]]

BASE: dict[str, Any] = {
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_dropout_prob": 0.1,
}
VOCABULARY = 30528


def c4_like_lengths(B: int, S: int) -> torch.Tensor:
    """(B,) lengths at even quantiles of a lognormal of median 250 and mean 430, cut at S, in random order."""
    sigma = math.sqrt(2 * math.log(430 / 250))
    quantiles = (torch.arange(B, dtype=torch.float64) + 0.5) / B
    lengths = (math.log(250) + sigma * torch.special.ndtri(quantiles)).exp().round().clamp(3, S).long()
    return lengths[torch.randperm(B, generator=torch.Generator().manual_seed(0))]


def make_batch(S: int, tokens: int, masked: float) -> Batch:
    """About ``tokens`` padded tokens (B * S) of random ids, with labels."""
    generator = torch.Generator().manual_seed(0)
    lengths = c4_like_lengths(max(1, tokens // S), S)
    shape = (len(lengths), int(lengths.max()))
    real = torch.arange(shape[1]) < lengths[:, None]
    ids = torch.randint(5, VOCABULARY, shape, generator=generator)
    labels = torch.where((torch.rand(shape, generator=generator) < masked) & real, ids, -100)
    return {"input_ids": ids * real, "attention_mask": real.long(), "labels": labels}


def mosaic_bert(layers: int, device: str, dtype: torch.dtype) -> Arm:
    model = BertForMaskedLM(BertConfig(**BASE, num_hidden_layers=layers, vocab_size=VOCABULARY)).train()

    def loss(batch: Batch) -> torch.Tensor:
        indices, cu_seqlens, max_seqlen = unpad_layout(batch["attention_mask"])
        ids, labels = (unpad_input(batch[name], indices) for name in ("input_ids", "labels"))
        masked_index = (labels >= 0).nonzero().squeeze(1)
        inputs = [x.to(device) for x in (ids, masked_index, labels[masked_index], cu_seqlens)]
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            output = model.forward_unpadded(inputs[0], Layout(inputs[3], max_seqlen), inputs[1], inputs[2])
        assert output.loss is not None
        return output.loss

    return model, loss


def hf_bert(layers: int, device: str, dtype: torch.dtype) -> Arm:
    config = transformers.BertConfig(
        **BASE, num_hidden_layers=layers, vocab_size=VOCABULARY, attention_probs_dropout_prob=0.0
    )
    model = transformers.BertForMaskedLM(config).train()

    def loss(batch: Batch) -> torch.Tensor:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return model(**{name: x.to(device) for name, x in batch.items()}).loss

    return model, loss


ARMS = {"mosaic_bert": mosaic_bert, "hf_bert": hf_bert}


class MatrixProducts(TorchDispatchMode):
    """Records the matrix products that run under it, to run them again alone."""

    OPS = ("mm", "addmm", "bmm", "baddbmm")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []
        self._inputs: dict[Any, torch.Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # pyright: ignore
        if func.overloadpacket.__name__ in self.OPS:
            inputs = [self._like(x) if isinstance(x, torch.Tensor) else x for x in args]
            self.calls.append(lambda: func(*inputs, **(kwargs or {})))
        return func(*args, **(kwargs or {}))

    def _like(self, x: torch.Tensor) -> torch.Tensor:
        """Of the same layout; one tensor serves all calls that want this layout."""
        key = (x.shape, x.stride(), x.dtype, x.device)
        if key not in self._inputs:
            y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            self._inputs[key] = y.normal_() if 0 not in x.stride() else y.zero_()
        return self._inputs[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=2048, help="padded tokens in a batch")
    parser.add_argument("--masked", type=float, default=0.3, help="share of tokens masked")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"# {device}, {dtype}, python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, commit {commit}, {vars(args)}"
    )

    arms = {}
    for name, make in ARMS.items():
        model, loss = make(args.layers, args.device, dtype)
        model.to(args.device)
        arms[name] = (loss, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True))

    def step(name: str, batch: Batch) -> None:
        loss, optimizer = arms[name]
        loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    def timed(run: Callable[..., Any], *inputs: Any) -> float:
        started = time.perf_counter()
        run(*inputs)
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    summary, whole, alone = [], 0.0, 0.0
    for S in (128, 512):
        batch = make_batch(S, args.tokens, args.masked)
        real = int(batch["attention_mask"].sum())
        flops = {}
        for name, (loss, _) in arms.items():
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                loss(batch)
            flops[name] = counter.get_total_flops()
            step(name, batch)  # warm
        with MatrixProducts() as products:
            step("mosaic_bert", batch)

        times: dict[str, list[float]] = {name: [] for name in [*arms, "products"]}
        for _ in range(args.rounds):
            for name in arms:
                times[name].append(timed(step, name, batch))
            times["products"].append(timed(lambda: [call() for call in products.calls]))
        ratios = [b / a for a, b in zip(times["mosaic_bert"], times["hf_bert"], strict=True)]
        shares = [1 - p / a for a, p in zip(times["mosaic_bert"], times["products"], strict=True)]
        speed, work = statistics.median(ratios), flops["hf_bert"] / flops["mosaic_bert"]
        overhead = 1 - min(times["products"]) / min(times["mosaic_bert"])
        ours, theirs = (real / min(times[name]) for name in ("mosaic_bert", "hf_bert"))
        print(
            f"S={S} sequences={len(batch['input_ids'])} fill={real / batch['input_ids'].numel():.2f} "
            f"mosaic_bert={ours:.0f}tok/s hf_bert={theirs:.0f}tok/s "
            f"speed_ratio={speed:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) flop_ratio={work:.2f} "
            f"overhead_share={overhead:.2f} (median of rounds {statistics.median(shares):.2f})",
            flush=True,
        )
        whole, alone = whole + min(times["mosaic_bert"]), alone + min(times["products"])
        summary.append(f"vs_hf_{S}={speed:.3f} flop_ratio_{S}={work:.3f}")
    print(f"step overhead_share={1 - alone / whole:.3f} {' '.join(summary)} device={args.device} layers={args.layers}")


if __name__ == "__main__":
    main()
