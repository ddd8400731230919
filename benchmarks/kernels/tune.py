"""Find the fastest tiles of the attention kernels on this card, for TILES in src/attention_tiles.py.

    python -m benchmarks.kernels.tune [--head_sizes 64 128] [--dtypes bfloat16] [--lengths 128 512 2048] [--out FOLDER]
    TRITON_INTERPRET=1 python -m benchmarks.kernels.tune --toy      # a CPU, toy sizes: only that all of it runs

Each kernel runs with the table's tile and with every candidate that compiles and fits, on C4-like lengths, in
interleaved rounds, each after the L2 cache was overwritten; the one-tile backward if the table has one, at lengths that
fit in it. A candidate whose output differs from that of the table's tile is rejected. The best tile has the smallest
product of its median times over lengths. The last lines can be pasted into TILES, with the gain over the present tiles.
Needs no Composer.
"""

import argparse
import itertools
import math
import multiprocessing
import os
import statistics
import sys
from dataclasses import astuple
from functools import partial
from pathlib import Path

import torch

from benchmarks import report, timing
from benchmarks.variants import c4_like_lengths
from src import attention_tiles
from src import flash_attn_triton as kernels
from src.attention import alibi_slopes
from src.attention_tiles import Tile
from src.bert_padding import unpad_layout

CANDIDATES = {
    "forward": [(128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 3), (128, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 2)]
    + [(64, 128, 4, 2), (128, 128, 8, 2)],
    "dkdv": [(64, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 1), (128, 64, 8, 1), (128, 64, 8, 2), (128, 32, 8, 2)]
    + [(64, 32, 4, 2), (64, 32, 4, 3), (64, 128, 4, 1)],
    "dq": [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 128, 4, 2)]
    + [(64, 32, 4, 3), (128, 64, 4, 2)],
    "whole": [(128, 64, 8, 1), (128, 64, 8, 2), (128, 32, 8, 1), (128, 32, 8, 2), (128, 16, 8, 1)],
}
"""By kernel: rows, cols, warps, stages. Most do not spill on sm_80 or sm_90 at head size 64."""
TOY_CANDIDATES = {name: [(16, 16, 4, 1), (32, 16, 4, 1)] for name in CANDIDATES}


class Attention:
    """Inputs of the kernels, for lengths like C4's cut at ``length``, 768 wide."""

    def __init__(self, head_size: int, dtype: torch.dtype, length: int, tokens: int, device: str):
        torch.manual_seed(0)
        num_heads = 768 // head_size if device == "cuda" else 2
        layout = unpad_layout(c4_like_lengths(max(1, tokens // length), length).to(device))
        sizes = {rows for tiles in (*CANDIDATES.values(), *TOY_CANDIDATES.values()) for rows, *_ in tiles}
        self.tables = attention_tiles.tile_tables(layout) | attention_tiles.tile_tables(layout, sizes)
        shape = (int(layout.cu_seqlens[-1]), num_heads, head_size)
        self.q, self.k, self.v, self.do, *outputs = (torch.randn(shape).to(device, dtype) for _ in range(7))
        self.dq, self.dk, self.dv = outputs
        self.slopes = alibi_slopes(num_heads).to(device)
        self.present = attention_tiles.tiles_for(head_size, dtype, attention_tiles.architecture(self.q.device))
        forward = self.tables[self.present.forward.rows]
        self.out, self.lse = kernels._forward(self.q, self.k, self.v, self.slopes, forward, self.present.forward)
        self.delta = kernels._delta(self.out, self.do)

    def run(self, kernel: str, tile: Tile) -> list[torch.Tensor]:
        """The kernel's outputs."""
        table = self.tables[tile.rows]
        if kernel == "forward":
            return [kernels._forward(self.q, self.k, self.v, self.slopes, table, tile)[0]]
        if kernel == "whole":
            grads = [self.dq, self.dk, self.dv]
            inputs = (self.do, self.q, self.k, self.v, self.slopes, [table], self.out, self.lse)
            kernels._backward(*inputs, grads, tile)
            return grads
        inputs = (self.do, self.q, self.k, self.v, self.lse, self.delta, self.slopes, table)
        grads = [self.dq] if kernel == "dq" else [self.dk, self.dv]
        kernels._launch_gradients(getattr(kernels, f"flash_attn_{kernel}"), *inputs, grads, tile)
        return grads


def compile_some(work: tuple[int, torch.dtype, list[tuple[str, Tile]]]) -> None:
    """Compile some candidates into Triton's cache, in a new process."""
    head_size, dtype, candidates = work
    inputs = Attention(head_size, dtype, 128, 4096, "cuda")
    for kernel, tile in candidates:
        usable(inputs, kernel, tile)


def usable(inputs: Attention, kernel: str, tile: Tile) -> str | None:
    """Why a candidate is rejected; None: it runs, and its output is that of the table's tile."""
    want = [x.float().clone() for x in inputs.run(kernel, getattr(inputs.present, kernel))]
    try:
        got = inputs.run(kernel, tile)
        errors = [((x.float() - y).norm() / y.norm()).item() for x, y in zip(got, want, strict=True)]
    except Exception as reason:  # too much shared memory, or the compiler fails
        return type(reason).__name__
    return None if max(errors) < 1e-2 else f"WRONG by {max(errors):.2g}"


def times(inputs: Attention, kernel: str, tiles: list[Tile], rounds: int) -> dict[Tile, float]:
    """Median milliseconds of each tile over interleaved rounds."""
    runs = {tile: partial(inputs.run, kernel, tile) for tile in tiles}
    taken = timing.interleaved(runs, rounds, timing.device_clock(inputs.q.device.type, flushes=4))
    return {tile: 1e3 * statistics.median(seconds) for tile, seconds in taken.items()}


def tune(head_size: int, dtype: torch.dtype, args: argparse.Namespace) -> list[dict]:
    """For each kernel: the best tile, its gain, and the milliseconds of every candidate by length."""
    device = "cpu" if args.toy else "cuda"
    table = attention_tiles.tiles_for(head_size, dtype, attention_tiles.architecture(torch.device(device)))
    candidates = {
        kernel: [Tile(*values) for values in tiles]
        for kernel, tiles in (TOY_CANDIDATES if args.toy else CANDIDATES).items()
        if kernel != "whole" or (table.whole is not None and min(args.lengths) <= table.whole.rows)
    }
    if not args.toy:
        work = [(kernel, tile) for kernel, tiles in candidates.items() for tile in tiles]
        with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
            pool.map(compile_some, [(head_size, dtype, work[i :: args.processes]) for i in range(args.processes)])
    inputs = {S: Attention(head_size, dtype, S, args.tokens, device) for S in args.lengths}
    found = []
    for kernel, tiles in candidates.items():
        present = getattr(table, kernel)
        lengths = [S for S in args.lengths if kernel != "whole" or S <= present.rows]
        refused = {tile: usable(inputs[lengths[0]], kernel, tile) for tile in tiles}
        for tile, reason in refused.items():
            if reason is not None:
                print(f"{kernel} {tile}: {reason}")
        valid = list(dict.fromkeys([present, *(tile for tile in tiles if refused[tile] is None)]))
        ms = {S: times(inputs[S], kernel, valid, args.rounds) for S in lengths}
        best = min(valid, key=lambda tile: math.prod(ms[S][tile] for S in ms))
        gains = {S: ms[S][present] / ms[S][best] for S in ms}
        shown = ", ".join(f"{ms[S][best]:.3f} ms at {S} ({gains[S]:.2f}x)" for S in ms)
        print(f"{kernel}: {best} {shown}; now {present}", flush=True)
        every = {f"Tile{astuple(tile)}": {str(S): ms[S][tile] for S in ms} for tile in valid}  # as TILES writes it
        row = {"head_size": head_size, "dtype": str(dtype), "kernel": kernel, "gain": min(gains.values()), "ms": every}
        found.append({**row, "best": f"Tile{astuple(best)}", "present": f"Tile{astuple(present)}"})
    return found


def main(argv: list[str]) -> int:
    """Tune and print; returns the exit status."""
    parser = report.parser(__doc__)
    parser.add_argument("--head_sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--tokens", type=int, default=65536, help="padded tokens of a batch")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048], help="longest sequence of a batch")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--toy", action="store_true", help="tiny, on the CPU, through Triton's interpreter")
    parser.add_argument("--out", type=Path, help="folder for tiles.json")
    args = parser.parse_args(argv)
    device = report.device_of(parser, args.toy)
    if args.toy:
        args.head_sizes, args.dtypes, args.tokens, args.lengths, args.rounds = [16], ["float16"], 64, [32], 1
    about = report.machine(device)
    print(f"# {report.described(about)}")
    lines, results = [], []
    for head_size, name in itertools.product(args.head_sizes, args.dtypes):
        dtype = getattr(torch, name)
        found = tune(head_size, dtype, args)
        results += found
        key = (
            attention_tiles.architecture(torch.device(device)),
            attention_tiles.padded_head_size(head_size),
            dtype.itemsize,
        )
        best = [row["best"] for row in found]
        whole = attention_tiles.tiles_for(head_size, dtype, key[0]).whole
        if whole is not None and found[-1]["kernel"] != "whole":
            best.append(f"Tile{astuple(whole)}")  # no length was short enough, so it is kept
        gains = ", ".join(f"{row['kernel']} {row['gain']:.2f}x" for row in found)
        lines.append(f"    {key}: Tiles({', '.join(best)}),  # {about['device']}, {name}, at least: {gains}")
    print("\n".join(lines))
    if args.out is not None:
        report.write_json(args.out / "tiles.json", {**about, "tokens": args.tokens, "rows": results})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
