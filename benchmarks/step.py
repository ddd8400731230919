"""A training step, ours beside Hugging Face's BERT: the same lengths, the same optimizer, one process, interleaved.

    python -m benchmarks.step [--layers 12] [--rounds 5] [--device cpu]

Each arm makes a step (forward, loss, backward, fused AdamW) on the same batch in turn; what is printed is the minimum of
each arm and the median over rounds of the ratio of their times, beside the ratio of their FLOPs (forward products,
counted by torch). Hugging Face's model runs without attention dropout, where it is fastest. Imports no Composer.
"""

import argparse
import platform
import statistics
import subprocess
import time
from collections.abc import Callable

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from src.bert_layers import BertForMaskedLM, Layout
from src.configuration_bert import BertConfig
from src.data_c4 import Batch, split_padded, split_unpadded

CASES = [(128, 1.0), (128, 0.75), (512, 1.0), (512, 0.55)]
"""Padded length and share of it that is real, on average: lengths are uniform between (2 * share - 1) * S and S."""

BASE = dict(hidden_size=768, num_attention_heads=12, intermediate_size=3072, hidden_dropout_prob=0.1)


def make_batch(S: int, fill: float, tokens: int, masked: float, V: int) -> Batch:
    """About ``tokens`` padded tokens of random ids, with labels."""
    generator = torch.Generator().manual_seed(0)
    B = max(1, tokens // S)
    shortest = round((2 * fill - 1) * S)
    lengths = torch.linspace(shortest, S, B).round().long() if fill < 1 else torch.full((B,), S)
    real = torch.arange(S) < lengths[torch.randperm(B, generator=generator), None]
    ids = torch.randint(5, V, (B, S), generator=generator)
    labels = torch.where((torch.rand(B, S, generator=generator) < masked) & real, ids, -100)
    return {"input_ids": ids * real, "attention_mask": real.long(), "labels": labels}


def mosaic_bert(
    layers: int, device: str, dtype: torch.dtype
) -> tuple[torch.nn.Module, Callable[[Batch], torch.Tensor]]:
    model = BertForMaskedLM(BertConfig(**BASE, num_hidden_layers=layers)).to(device).train()

    def loss(batch: Batch) -> torch.Tensor:
        (part,) = split_unpadded(batch, 10**9)
        part = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in part.items()}
        layout = Layout(part["cu_seqlens"], part["max_seqlen"])
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            output = model.forward_unpadded(part["input_ids"], layout, part["masked_index"], part["labels"])
        assert output.loss is not None
        return output.loss

    return model, loss


def hf_bert(layers: int, device: str, dtype: torch.dtype) -> tuple[torch.nn.Module, Callable[[Batch], torch.Tensor]]:
    config = transformers.BertConfig(
        **BASE, num_hidden_layers=layers, attention_probs_dropout_prob=0.0, vocab_size=30528
    )
    model = transformers.BertForMaskedLM(config).to(device).train()

    def loss(batch: Batch) -> torch.Tensor:
        (part,) = split_padded(batch, 10**9)
        part = {k: v.to(device) for k, v in part.items() if isinstance(v, torch.Tensor)}
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return model(**part).loss

    return model, loss


ARMS = {"mosaic_bert": mosaic_bert, "hf_bert": hf_bert}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048, help="padded tokens in a batch")
    parser.add_argument("--masked", type=float, default=0.3, help="share of tokens masked")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"# {device}, {dtype}, python {platform.python_version()}, torch {torch.__version__}, commit {commit}")

    arms = {}
    for name, make in ARMS.items():
        model, loss = make(args.layers, args.device, dtype)
        arms[name] = (loss, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True))

    def step(name: str, batch: Batch) -> float:
        loss, optimizer = arms[name]
        started = time.perf_counter()
        loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    summary = []
    for S, fill in CASES:
        batch = make_batch(S, fill, args.tokens, args.masked, 30522)
        real = int(batch["attention_mask"].sum())
        flops = {}
        for name, (loss, _) in arms.items():
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                loss(batch)
            flops[name] = counter.get_total_flops()
            step(name, batch)  # warm
        times = {name: [] for name in arms}
        for _ in range(args.rounds):
            for name in arms:
                times[name].append(step(name, batch))
        ratios = [b / a for a, b in zip(times["mosaic_bert"], times["hf_bert"], strict=True)]
        speed, work = statistics.median(ratios), flops["hf_bert"] / flops["mosaic_bert"]
        ours, theirs = (real / min(times[name]) for name in ("mosaic_bert", "hf_bert"))
        print(
            f"S={S} fill={real / batch['input_ids'].numel():.2f} real_tokens={real} "
            f"mosaic_bert={ours:.0f}tok/s hf_bert={theirs:.0f}tok/s speed_ratio={speed:.2f} "
            f"(min {min(ratios):.2f}, max {max(ratios):.2f}) flop_ratio={work:.2f}",
            flush=True,
        )
        summary.append(f"vs_hf_{S}_{fill:g}={speed:.3f}")
    print(f"step device={args.device} layers={args.layers} {' '.join(summary)}")


if __name__ == "__main__":
    main()
