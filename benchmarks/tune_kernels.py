"""Find the fastest tiles of the attention kernels on the card at hand, for TILES in src/flash_attn_triton.py.

    python -m benchmarks.tune_kernels [--head_sizes 64 128] [--dtypes bfloat16] [--tokens 65536] [--length 512]

For each head size and dtype, each of the three kernels runs with every candidate that compiles and fits, on C4-like
lengths, in interleaved rounds; the smallest median over rounds wins. A candidate whose output is not that of the table
in use is thrown out. Printed at the end are lines to paste into TILES, with the gain over the present ones. Needs a
CUDA device, and no Composer.
"""

import argparse
import itertools
import statistics
import sys

import torch
import torch.nn.functional as F

from benchmarks.arms import c4_like_lengths
from src import flash_attn_triton as kernels
from src.attention import alibi_slopes
from src.bert_padding import tile_tables
from src.flash_attn_triton import Tile, Tiles

CANDIDATES = [Tile(*values) for values in itertools.product((32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4))]


def tune(head_size: int, dtype: torch.dtype, tokens: int, length: int, rounds: int) -> tuple[Tiles, dict[str, float]]:
    """The best tiles, and by kernel the median milliseconds of the present ones over those of the best."""
    num_heads = 768 // head_size
    lengths_B = c4_like_lengths(tokens // length, length)
    cu_seqlens = F.pad(lengths_B.cumsum(0), (1, 0)).to(torch.int32)
    tables = {rows: x.cuda() for rows, x in tile_tables(cu_seqlens, {tile.rows for tile in CANDIDATES}).items()}
    shape = (int(cu_seqlens[-1]), num_heads, head_size)
    q, k, v, do, dq, dk, dv = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(7))
    slopes = alibi_slopes(num_heads).cuda()
    architecture = kernels._architecture(q.device)
    present = kernels.tiles_for(head_size, dtype, architecture)
    out, lse = kernels._forward(q, k, v, slopes, tables[present.forward.rows])

    def forward(tile: Tile) -> torch.Tensor:
        return kernels._forward(q, k, v, slopes, tables[tile.rows], tile)[0]

    def dkdv(tile: Tile) -> torch.Tensor:
        kernels._launch_dkdv(do, q, k, v, lse, delta, slopes, tables[tile.rows], dk, dv, tile)
        return torch.cat((dk, dv))

    def query(tile: Tile) -> torch.Tensor:
        kernels._launch_dq(do, q, k, v, lse, delta, slopes, tables[tile.rows], dq, tile)
        return dq.clone()

    delta = kernels._delta(out, do)
    best, gains = {}, {}
    for name, run in (("forward", forward), ("dkdv", dkdv), ("dq", query)):
        now = getattr(present, name)
        want = run(now)
        valid = [now]
        for tile in CANDIDATES:
            try:
                got = run(tile)
            except Exception as reason:  # too much shared memory, or more than the compiler can do
                print(f"{name} {tile}: {type(reason).__name__}")
                continue
            if torch.allclose(got, want, rtol=1e-2, atol=1e-2 * want.abs().max().item()):
                valid.append(tile)
            else:
                print(f"{name} {tile}: WRONG, thrown out")
        times: dict[Tile, list[float]] = {tile: [] for tile in valid}
        for _ in range(rounds):
            for tile in valid:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record(torch.cuda.current_stream())
                run(tile)
                end.record(torch.cuda.current_stream())
                end.synchronize()
                times[tile].append(start.elapsed_time(end))
        median = {tile: statistics.median(ms) for tile, ms in times.items()}
        best[name] = min(valid, key=lambda tile: median[tile])
        gains[name] = median[now] / median[best[name]]
        print(f"{name}: {best[name]} {median[best[name]]:.3f} ms; now {now} {median[now]:.3f} ms", flush=True)
    return Tiles(**best), gains


def main(argv: list[str]) -> int:
    """Tune and print; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head_sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--tokens", type=int, default=65536, help="padded tokens of a batch")
    parser.add_argument("--length", type=int, default=512, help="where C4-like lengths are cut")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("no CUDA device is found")
    torch.manual_seed(0)
    lines = []
    for head_size, name in itertools.product(args.head_sizes, args.dtypes):
        dtype = getattr(torch, name)
        tiles, gains = tune(head_size, dtype, args.tokens, args.length, args.rounds)
        key = (kernels._architecture(torch.device("cuda")), kernels.padded_head_size(head_size), dtype.itemsize)
        values = ", ".join(str(tile).replace("rows=", "").replace("cols=", "") for tile in vars(tiles).values())
        gained = ", ".join(f"{kernel} {gain:.2f}x" for kernel, gain in gains.items())
        lines.append(f"    {key}: Tiles({values}),  # {torch.cuda.get_device_name()}, {name}: {gained}")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
