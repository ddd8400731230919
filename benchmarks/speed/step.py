"""A training step, ours beside what a user would run instead: same batches, same optimizer, one process, interleaved.

    python -m benchmarks.speed.step [--lengths 128 512 2048] [--fill c4 1.0] [--arms …] [--rounds 15] [--out FOLDER]
    python -m benchmarks.speed.step --toy      # seconds: only that all of it runs

The arms are those of benchmarks/variants.py. Before an arm is timed, its loss and gradients are compared with those of
the same weights run plainly (two layers of the same widths, on the same batch); one that is off gets no time, and ours
being off ends the run with status 1.

In each round each arm makes a step (forward, loss, backward, fused AdamW) on the same batch, and our step's matrix
products run once more alone, on inputs of the same shapes and strides. Printed: real tokens a second (from minima), the
median over rounds of the ratio of times to ours beside the ratio of FLOPs (counted as the arms run, padding included),
peak memory, and the share of our step that is not matrix products. Lengths: all S long (fill 1.0), or like C4's (c4):
lognormal, median 250 and mean 430 tokens, cut at S, in even quantiles, padded to the longest of the batch.

Memory is that of weights, gradients, AdamW's moments and a step: on a CPU what a process of its own holds at most above
what it held before it made the model, on a GPU what torch's allocator gave out at most.

Last line: ``step overhead_share=… vs_hf_128=… flop_ratio_128=… … vs_strong=… vs_modernbert=… device=… layers=…``.
Ratios above 1 mean that ours is faster; vs_hf_S is that at C4's lengths (with _full at fill 1.0), vs_strong and
vs_modernbert (at equal parameters) are the lowest over all lengths and fills of the run. Imports neither Composer nor
streaming.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import report
from benchmarks.variants import (
    ARMS,
    Arm,
    Batch,
    Shape,
    c4_like_lengths,
    check,
    family,
    make_batch,
    runnable,
    step_flops,
)

OURS = "mosaic_bert"
RIVALS = {"vs_strong": "hf_strong", "vs_modernbert": "modernbert"}
TOY = Shape(layers=2, hidden=64, heads=4, width=128, vocabulary=512)


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


class Trained:
    """An arm with its optimizer, which arms of one family share, as they share their parameters."""

    def __init__(self, arm: Arm, optimizer: torch.optim.Optimizer):
        self.arm, self.optimizer = arm, optimizer

    def step(self, batch: Batch) -> None:
        self.arm.backward(batch)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_bytes(self) -> int:
        """Of weights and the optimizer's moments."""
        tensors = [*self.arm.model.parameters()]
        tensors += [x for state in self.optimizer.state.values() for x in state.values() if x.dim()]
        return sum(x.nbytes for x in tensors)


def build(names: list[str], shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Trained]:
    """The arms, ready to train."""
    torch.manual_seed(0)
    first: dict[str, Trained] = {}
    trained = {}
    for name in names:
        arm, kind = ARMS[name](shape, device, dtype), family(name)
        if kind in first:
            arm.share(first[kind].arm)
            trained[name] = Trained(arm, first[kind].optimizer)
        else:
            optimizer = torch.optim.AdamW(arm.model.parameters(), lr=1e-4, fused=True)
            trained[name] = first[kind] = Trained(arm, optimizer)
    return trained


def lengths_of(S: int, fill: str, tokens: int) -> torch.Tensor:
    """(B,) lengths of a batch of about ``tokens`` tokens if all were S long; at C4's lengths 8 sequences at least."""
    if fill == "c4":
        return c4_like_lengths(max(8, tokens // S), S)
    return torch.full((max(1, tokens // S),), S)


# ----------------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------------


def peak_bytes_cuda(trained: Trained, batch: Batch) -> int:
    """Of weights, optimizer and a step; the other arms' are left out."""
    trained.step(batch)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trained.step(batch)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before + trained.state_bytes()


def peak_bytes_here(make: Callable[[], Trained], batch: Batch) -> int:
    """Of making an arm and two steps, in this process, which must have done nothing large before (Linux)."""

    def status(field: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024

    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    trained = make()
    trained.step(batch)
    trained.step(batch)
    return status("VmHWM") - before


def peak_bytes_apart(name: str, S: int, fill: str, args: argparse.Namespace) -> int:
    """``peak_bytes_here`` of an arm in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.speed.step", "--peak_memory", name]
    command += [
        "--lengths",
        str(S),
        "--fill",
        fill,
        "--tokens",
        str(args.tokens),
        "--layers",
        str(args.layers),
        "--masked",
        str(args.masked),
    ]
    done = subprocess.run(command + ["--toy"] * args.toy, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the process that measures the memory of {name} ended with {done.returncode}: {done.stderr[-500:]}")
    return int(done.stdout.splitlines()[-1])


# ----------------------------------------------------------------------------------------------------------------------
# Time
# ----------------------------------------------------------------------------------------------------------------------


def measure(S: int, fill: str, names: list[str], trained: dict[str, Trained], args: argparse.Namespace) -> dict:
    """One length and fill, all arms: what goes into the results."""
    shape, device = args.shape, args.device
    batch = make_batch(lengths_of(S, fill, args.tokens), shape.vocabulary, args.masked)
    real, arms = int(batch["attention_mask"].sum()), {}
    for name in names:
        arm = trained[name].arm
        try:
            loss, gradients = check(ARMS[name], shape, device, args.dtype, batch)
            trained[name].step(batch)  # warm
        except torch.OutOfMemoryError as error:
            if name == OURS:
                sys.exit(f"S={S} fill={fill}: ours does not fit; lower --tokens: {str(error).splitlines()[0]}")
            print(f"S={S} fill={fill} {name}: does not fit: {str(error).splitlines()[0]}", flush=True)
            continue
        except ValueError as error:
            if name.startswith(OURS):
                sys.exit(f"S={S} fill={fill} {name}: wrong: {error}")
            print(f"S={S} fill={fill} {name}: no time is taken: {error}", flush=True)
            continue
        arms[name] = {
            "parameters": sum(p.numel() for p in arm.model.parameters()),
            "loss_error": loss,
            "gradient_error": gradients,
            "flops": step_flops(arm, batch),
        }
        if device == "cuda":
            arms[name]["peak_bytes"] = peak_bytes_cuda(trained[name], batch)
        elif args.memory:
            arms[name]["peak_bytes"] = peak_bytes_apart(name, S, fill, args)

    def timed(run: Callable[..., Any], *inputs: Any) -> float:
        started = time.perf_counter()
        run(*inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    with MatrixProducts() as products:
        trained[OURS].step(batch)
    times: dict[str, list[float]] = {name: [] for name in [*arms, "products"]}
    for _ in range(args.rounds):
        for name in arms:
            times[name].append(timed(trained[name].step, batch))
        times["products"].append(timed(lambda: [call() for call in products.calls]))
    for name, arm in arms.items():
        ratios = [b / a for a, b in zip(times[OURS], times[name], strict=True)]
        arm |= {
            "seconds": min(times[name]),
            "seconds_median": statistics.median(times[name]),
            "tokens_per_s": real / min(times[name]),
            "flops_per_s": arm["flops"] / min(times[name]),
            "time_ratio": statistics.median(ratios),
            "time_ratio_low": min(ratios),
            "time_ratio_high": max(ratios),
            "flop_ratio": arm["flops"] / arms[OURS]["flops"],
        }
    return {
        "length": S,
        "fill": fill,
        "layers": shape.layers,
        "tokens": args.tokens,
        "masked": args.masked,
        "rounds": args.rounds,
        "sequences": len(batch["input_ids"]),
        "longest": batch["input_ids"].shape[1],
        "real_tokens": real,
        "real_share": real / batch["input_ids"].numel(),
        "products_seconds": min(times["products"]),
        "overhead_share": 1 - min(times["products"]) / min(times[OURS]),
        "arms": arms,
        "machine": report.machine(device),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Results
# ----------------------------------------------------------------------------------------------------------------------


def rows(cell: dict) -> Iterator[list[str]]:
    """A line of the table for each arm."""
    for name, arm in cell["arms"].items():
        memory = f"{arm['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in arm else ""
        yield [
            name,
            f"{arm['parameters'] / 1e6:.1f}",
            f"{arm['tokens_per_s']:,.0f}",
            f"{arm['time_ratio']:.2f} ({arm['time_ratio_low']:.2f} to {arm['time_ratio_high']:.2f})",
            f"{arm['flop_ratio']:.2f}",
            f"{arm['flops_per_s'] / 1e12:.3g}",
            memory,
            f"{arm['loss_error']:.0e}, {arm['gradient_error']:.0e}",
        ]


HEADER = ["arm", "M parameters", "real tokens/s", "time / ours, median (range)", "FLOPs / ours", "TFLOP/s", "peak GiB"]


def heading(cell: dict) -> str:
    return (
        f"S={cell['length']} fill={cell['fill']}: {cell['sequences']} sequences, longest {cell['longest']}, "
        f"{cell['real_tokens']:,} real tokens ({cell['real_share']:.0%}), {cell['layers']} layers, "
        f"{cell['masked']:.0%} masked, {cell['rounds']} rounds; beside its matrix products "
        f"{cell['overhead_share']:.0%} of our step"
    )


def publish(folder: Path, device: str, cells: list[dict], command: str) -> None:
    """Add cells to the folder's results, in the place of those of the same settings."""
    path = folder / f"step-{device}.json"
    known = json.loads(path.read_text()) if path.exists() else []
    merged = {tuple(c[k] for k in ("layers", "length", "fill", "tokens", "masked")): c for c in known}
    for cell in cells:
        key = tuple(cell[k] for k in ("layers", "length", "fill", "tokens", "masked"))
        merged[key] = {**cell, "command": command}
    ordered = [merged[key] for key in sorted(merged)]
    report.write_json(path, ordered)
    parts = [
        "# A training step",
        "",
        "Made by `python -m benchmarks.speed.step`, whose first lines say what is measured.",
        "",
    ]
    for cell in ordered:
        parts += [f"## {heading(cell)}", "", f"{report.described(cell['machine'])}. `{cell['command']}`", ""]
        parts += [report.table([*HEADER, "error of loss, gradients"], list(rows(cell))), ""]
    path.with_suffix(".md").write_text("\n".join(parts))


def summary(cells: list[dict], args: argparse.Namespace) -> str:
    """The last line."""
    whole = sum(cell["arms"][OURS]["seconds"] for cell in cells)
    fields = [f"overhead_share={1 - sum(cell['products_seconds'] for cell in cells) / whole:.3f}"]
    for cell in cells:
        if "hf_bert" in cell["arms"]:
            label, arm = f"{cell['length']}{'' if cell['fill'] == 'c4' else '_full'}", cell["arms"]["hf_bert"]
            fields += [f"vs_hf_{label}={arm['time_ratio']:.3f}", f"flop_ratio_{label}={arm['flop_ratio']:.3f}"]
    for field, name in RIVALS.items():
        ratios = [cell["arms"][name]["time_ratio"] for cell in cells if name in cell["arms"]]
        fields += [f"{field}={min(ratios):.3f}"] if ratios else []
    return f"step {' '.join(fields)} device={args.device} layers={args.layers}"


def main(argv: list[str]) -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--fill", nargs="+", choices=("c4", "1.0"), default=["c4", "1.0"])
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=[*ARMS],
        help="beside ours (default: all that run on the device; mosaic_bert_compiled only on a GPU)",
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--tokens", type=int, help="padded tokens of a batch (default: 4,096 on a CPU, 65,536 on a GPU)"
    )
    parser.add_argument("--masked", type=float, default=0.3, help="share of tokens masked")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="on a CPU: measure no peak memory")
    parser.add_argument(
        "--out", type=Path, help="folder for step-DEVICE.json and .md; what is there is kept and added to"
    )
    parser.add_argument("--toy", action="store_true", help="tiny; its figures mean nothing")
    parser.add_argument("--peak_memory", choices=[*ARMS], help=argparse.SUPPRESS)  # the process that measures it
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is found; leave --device out to measure on the CPU")
    missing = [name for name in args.arms or () if name not in runnable(args.device)]
    if missing:
        parser.error(f"{', '.join(missing)}: not on this device; choose from {', '.join(runnable(args.device))}")
    args.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    args.tokens = args.tokens or (65536 if args.device == "cuda" else 4096)
    args.shape = Shape(layers=args.layers, length=max([512, *args.lengths]))
    if args.toy:
        args.layers, args.tokens, args.rounds, args.memory = 2, 256, 2, False
        args.lengths, args.shape = [128], TOY
    if args.peak_memory:
        (S,), (fill,) = args.lengths, args.fill
        batch = make_batch(lengths_of(S, fill, args.tokens), args.shape.vocabulary, args.masked)
        name = args.peak_memory
        print(peak_bytes_here(lambda: build([name], args.shape, args.device, args.dtype)[name], batch))
        return

    default = [name for name in runnable(args.device) if args.device == "cuda" or not name.endswith("_compiled")]
    names = [OURS, *(name for name in args.arms or default if name != OURS)]
    print(f"# {report.described(report.machine(args.device))}, {args.dtype}", flush=True)
    trained, cells = build(names, args.shape, args.device, args.dtype), []
    for S in args.lengths:
        for fill in args.fill:
            cell = measure(S, fill, names, trained, args)
            cells.append(cell)
            print(f"{heading(cell)}\n{report.table(HEADER, [row[:-1] for row in rows(cell)])}", flush=True)
            if args.out is not None:
                publish(args.out, args.device, [cell], f"python -m benchmarks.speed.step {' '.join(argv)}")
    print(summary(cells, args))


if __name__ == "__main__":
    main(sys.argv[1:])
