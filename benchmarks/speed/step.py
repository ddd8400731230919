"""A training step of MosaicBERT and of its baselines: same batches, same optimizer, one process, interleaved.

    python -m benchmarks.speed.step [--lengths 128 512 2048] [--fill c4 1.0] [--arms …] [--rounds 15] [--out FOLDER]
    python -m benchmarks.speed.step --toy      # seconds: only that all of it runs

The variants are those of benchmarks/variants.py. First each one's loss and gradients are compared with those of the
same weights in a plain implementation (two layers of the same widths, the same batch). A baseline above the tolerance
is not timed; for MosaicBERT the exit status is 1.

In each round each variant makes a step (forward, loss, backward, fused AdamW) on the same batch, and the matrix
products of our step run once more alone, on inputs of the same shapes and strides. Reported: tokens per second (without
padding) of the fastest round; the median ratio of times to ours; the ratio of FLOPs (counted as a variant runs, padding
included); peak memory of weights, gradients, AdamW's moments and a step; the share of our step that is not matrix
products. Lengths: all S (fill 1.0), or like C4's (c4): lognormal, median 250, mean 430 tokens, cut at S.

Last line: ``step overhead_share=… vs_hf_128=… flop_ratio_128=… … vs_strong=… vs_modernbert=… device=… layers=…``.
A ratio above 1 means that ours is faster. vs_hf_S is at C4's lengths (vs_hf_S_full at fill 1.0); vs_strong and
vs_modernbert (at equal parameters) are the lowest of the run. Needs neither Composer nor streaming.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import report, timing
from benchmarks.variants import (
    FAMILIES,
    VARIANTS,
    Batch,
    Shape,
    Variant,
    c4_like_lengths,
    check,
    make_batch,
    step_flops,
)

OURS = "mosaic_bert"
LOWEST = {"vs_strong": "hf_strong", "vs_modernbert": "modernbert"}
TOY = Shape(layers=2, hidden=64, heads=4, width=128, vocabulary=512)
SETTINGS = ("layers", "length", "fill", "tokens", "masked")
"""Results with the same of these replace each other."""


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
        """A tensor of the same layout; calls with the same layout share it."""
        key = (x.shape, x.stride(), x.dtype, x.device)
        if key not in self._inputs:
            y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            self._inputs[key] = y.normal_() if 0 not in x.stride() else y.zero_()
        return self._inputs[key]

    def run(self) -> None:
        for call in self.calls:
            call()


class Trained:
    """A variant with its optimizer; variants of one family share both parameters and optimizer."""

    def __init__(self, variant: Variant, optimizer: torch.optim.Optimizer):
        self.variant, self.optimizer = variant, optimizer

    def step(self, batch: Batch) -> None:
        self.variant.backward(batch)
        self.optimizer.step()
        self.optimizer.zero_grad()


def build(names: list[str], shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Trained]:
    """The named variants, ready to train."""
    torch.manual_seed(0)
    first: dict[str, Trained] = {}
    trained = {}
    for name in names:
        variant = VARIANTS[name](shape, device, dtype)
        family = next(family for family in FAMILIES if name.startswith(family))
        if family in first:
            variant.share(first[family].variant)
            trained[name] = Trained(variant, first[family].optimizer)
        else:
            optimizer = torch.optim.AdamW(variant.model.parameters(), lr=1e-4, fused=True)
            trained[name] = first[family] = Trained(variant, optimizer)
    return trained


def lengths_of(S: int, fill: str, tokens: int) -> torch.Tensor:
    """(B,) lengths of a batch of about ``tokens`` padded tokens; with C4's lengths at least 8 sequences."""
    if fill == "c4":
        return c4_like_lengths(max(8, tokens // S), S)
    return torch.full((max(1, tokens // S),), S)


def peak_bytes_cuda(trained: Trained, batch: Batch) -> int:
    """Peak memory of weights, optimizer and a step in torch's allocator, without those of other variants."""
    trained.step(batch)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trained.step(batch)
    torch.cuda.synchronize()
    moments = [x for state in trained.optimizer.state.values() for x in state.values() if x.dim()]
    own = sum(x.nbytes for x in (*trained.variant.model.parameters(), *moments))
    return torch.cuda.max_memory_allocated() - before + own


def peak_bytes_here(make: Callable[[], Trained], batch: Batch) -> int:
    """Peak memory of making a variant and of two steps, in a process that has allocated nothing large (Linux)."""

    def status(field: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024

    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    trained = make()
    trained.step(batch)
    trained.step(batch)
    return status("VmHWM") - before


def peak_bytes_cpu(name: str, shape: Shape, S: int, fill: str, tokens: int, masked: float) -> int:
    """``peak_bytes_here`` of a variant; for a new process."""
    batch = make_batch(lengths_of(S, fill, tokens), shape.vocabulary, masked)
    return peak_bytes_here(lambda: build([name], shape, "cpu", torch.float32)[name], batch)


def checked(
    name: str, trained: Trained, batch: Batch, S: int, fill: str, args: argparse.Namespace
) -> dict[str, Any] | None:
    """Errors, parameters, FLOPs and peak memory of a variant; None: it is wrong or does not fit, and is not timed."""
    try:
        loss, gradients = check(VARIANTS[name], args.shape, args.device, args.dtype, batch)
        trained.step(batch)  # warm up
    except (torch.OutOfMemoryError, ValueError) as error:
        said = f"S={S} fill={fill} {name}: not timed: {str(error).splitlines()[0]}"
        if name == OURS or (name.startswith(OURS) and isinstance(error, ValueError)):
            sys.exit(said)
        print(said, flush=True)
        return None
    row = {
        "parameters": sum(p.numel() for p in trained.variant.model.parameters()),
        "loss_error": loss,
        "gradient_error": gradients,
        "flops": step_flops(trained.variant, batch),
    }
    if args.device == "cuda":
        row["peak_bytes"] = peak_bytes_cuda(trained, batch)
    elif args.memory:
        settings = (name, args.shape, S, fill, args.tokens, args.masked)
        row["peak_bytes"] = report.in_new_process(peak_bytes_cpu, *settings)
    return row


def measure(S: int, fill: str, trained: dict[str, Trained], args: argparse.Namespace) -> dict:
    """The results of all variants at one length and fill."""
    batch = make_batch(lengths_of(S, fill, args.tokens), args.shape.vocabulary, args.masked)
    tokens = int(batch["attention_mask"].sum())
    found = {name: checked(name, each, batch, S, fill, args) for name, each in trained.items()}
    rows = {name: row for name, row in found.items() if row is not None}
    with MatrixProducts() as products:
        trained[OURS].step(batch)
    runs = {name: partial(trained[name].step, batch) for name in rows}
    times = timing.interleaved({**runs, "products": products.run}, args.rounds, timing.wall_clock(args.device))
    for name, row in rows.items():
        median, low, high = timing.ratios(times[OURS], times[name])
        row |= {
            "seconds": min(times[name]),
            "tokens_per_s": tokens / min(times[name]),
            "flops_per_s": row["flops"] / min(times[name]),
            "time_ratio": median,
            "time_ratio_low": low,
            "time_ratio_high": high,
            "flop_ratio": row["flops"] / rows[OURS]["flops"],
        }
    return {
        "length": S,
        "fill": fill,
        **{name: getattr(args, name) for name in ("layers", "tokens", "masked", "rounds")},
        "sequences": len(batch["input_ids"]),
        "longest": batch["input_ids"].shape[1],
        "real_tokens": tokens,
        "real_share": tokens / batch["input_ids"].numel(),
        "products_seconds": min(times["products"]),
        "overhead_share": 1 - min(times["products"]) / min(times[OURS]),
        "arms": rows,
        "machine": report.machine(args.device),
    }


TITLES = (
    "variant | M parameters | tokens/s | time / ours, median (range) | FLOPs / ours | TFLOP/s | peak GiB "
    "| error of loss, gradients"
)
TIME_RATIO = "{time_ratio:.2f} ({time_ratio_low:.2f} to {time_ratio_high:.2f})"
ROW = (
    f"{{variant}} | {{parameters:M.1f}} | {{tokens_per_s:,.0f}} | {TIME_RATIO} | {{flop_ratio:.2f}} "
    "| {flops_per_s:T.3g} | {peak_bytes:Gi.2f} | {loss_error:.0e}, {gradient_error:.0e}"
)


def table(result: dict) -> str:
    return report.table(TITLES, ROW, [{"variant": name, **row} for name, row in result["arms"].items()])


def heading(result: dict) -> str:
    return (
        f"S={result['length']} fill={result['fill']}: {result['sequences']} sequences, longest {result['longest']}, "
        f"{result['real_tokens']:,} tokens ({result['real_share']:.0%} of the padded batch), {result['layers']} "
        f"layers, {result['masked']:.0%} masked, {result['rounds']} rounds; non-matmul overhead of our step: "
        f"{result['overhead_share']:.0%}"
    )


def publish(folder: Path, device: str, result: dict) -> None:
    """Add a result to the folder's, in place of one with the same SETTINGS."""
    path = folder / f"step-{device}.json"
    known = [*json.loads(path.read_text()), result] if path.exists() else [result]
    merged = {tuple(each[name] for name in SETTINGS): each for each in known}
    ordered, lines = [merged[key] for key in sorted(merged)], []
    for each in ordered:
        lines += [f"## {heading(each)}", f"{report.described(each['machine'])}. `{each['command']}`"]
        lines += [table(each)]
    report.write_page(path, "A training step", "benchmarks.speed.step", lines, ordered)


def summary(results: list[dict], args: argparse.Namespace) -> str:
    """The last line."""
    whole = sum(result["arms"][OURS]["seconds"] for result in results)
    fields = [f"overhead_share={1 - sum(result['products_seconds'] for result in results) / whole:.3f}"]
    for result in results:
        if "hf_bert" in result["arms"]:
            label, row = f"{result['length']}{'' if result['fill'] == 'c4' else '_full'}", result["arms"]["hf_bert"]
            fields += [f"vs_hf_{label}={row['time_ratio']:.3f}", f"flop_ratio_{label}={row['flop_ratio']:.3f}"]
    for field, name in LOWEST.items():
        ratios = [result["arms"][name]["time_ratio"] for result in results if name in result["arms"]]
        fields += [f"{field}={min(ratios):.3f}"] if ratios else []
    return f"step {' '.join(fields)} device={args.device} layers={args.layers}"


def main(argv: list[str]) -> None:
    """Check, measure, print."""
    parser = report.parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--fill", nargs="+", choices=("c4", "1.0"), default=["c4", "1.0"])
    default = "default: all; mosaic_bert_compiled only on a GPU"
    parser.add_argument("--arms", nargs="+", choices=[*VARIANTS], help=f"variants to compare with ours ({default})")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, help="padded tokens of a batch (default: CPU 4,096, GPU 65,536)")
    parser.add_argument("--masked", type=float, default=0.3, help="share of tokens masked")
    report.add_device(parser)
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="on a CPU: measure no peak memory")
    parser.add_argument("--out", type=Path, help="folder for step-DEVICE.json and .md; other results there are kept")
    parser.add_argument("--toy", action="store_true", help="tiny; its figures mean nothing")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device found; leave out --device to measure on the CPU")
    args.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    args.tokens = args.tokens or (65536 if args.device == "cuda" else 4096)
    args.shape = Shape(layers=args.layers, length=max([512, *args.lengths]))
    if args.toy:
        args.layers, args.tokens, args.rounds, args.memory = 2, 256, 2, False
        args.lengths, args.shape = [128], TOY
    chosen = args.arms or [name for name in VARIANTS if args.device == "cuda" or name != "mosaic_bert_compiled"]
    print(f"# {report.described(report.machine(args.device))}, {args.dtype}", flush=True)
    trained = build(list(dict.fromkeys([OURS, *chosen])), args.shape, args.device, args.dtype)
    results = []
    for S in args.lengths:
        for fill in args.fill:
            result = measure(S, fill, trained, args)
            results.append({**result, "command": f"python -m benchmarks.speed.step {' '.join(argv)}"})
            print(f"{heading(result)}\n{table(result)}", flush=True)
            if args.out is not None:
                publish(args.out, args.device, results[-1])
    print(summary(results, args))


if __name__ == "__main__":
    main(sys.argv[1:])
