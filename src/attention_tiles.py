"""How the attention kernels cut sequences into tiles: sizes for each card, and the tables of a batch's tiles.

Letters: B sequences, T tokens, N heads, H head size. The kernels are in flash_attn_triton.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .bert_padding import Layout

MAX_HEAD_SIZE = 128


@dataclass(frozen=True)
class Tile:
    """Sizes of one kernel."""

    rows: int
    """ROWS of one program: queries in the forward and for dq, keys for dk and dv."""
    cols: int
    """COLS per step of the program's loop: keys, or queries for dk and dv."""
    warps: int
    stages: int
    """Steps of the loop whose loads are in flight (software pipelining)."""


@dataclass(frozen=True)
class Tiles:
    """Tiles of the kernels that use a tile table."""

    forward: Tile
    dkdv: Tile
    dq: Tile
    whole: Tile | None = None
    """None: dkdv and dq compute sequences of any length, because no tile of a whole one fits."""

    def backward(self, max_seqlen: int) -> tuple[Tile, ...]:
        """Tiles of the backward of a batch: whole, or dkdv and dq."""
        return (self.dkdv, self.dq) if self.whole is None or max_seqlen > self.whole.rows else (self.whole,)


# By (architecture or 0 for any, largest padded head size, bytes per element); the first match is used. None spills
# registers, exceeds the card's shared memory or makes two warps compute the same scores with Triton 3.3.0 or 3.8.0
# (benchmarks/results/kernels_aot.md). For speed, see benchmarks/kernels/tune.py.
TILES: dict[tuple[int, int, int], Tiles] = {
    # H100: 227 KiB per program
    (90, 64, 2): Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 4, 1), Tile(64, 64, 4, 2), Tile(128, 64, 8, 1)),
    (90, 128, 2): Tiles(Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(64, 64, 4, 2), Tile(128, 16, 8, 1)),
    # A100: 163 KiB
    (80, 32, 2): Tiles(Tile(128, 64, 8, 3), Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
    (80, 64, 2): Tiles(Tile(128, 64, 8, 3), Tile(64, 32, 4, 2), Tile(64, 64, 4, 2)),
    (80, 128, 2): Tiles(Tile(128, 16, 8, 3), Tile(128, 16, 8, 1), Tile(64, 32, 4, 2)),
    # B200
    (100, 64, 2): Tiles(Tile(64, 64, 8, 2), Tile(64, 64, 8, 1), Tile(64, 64, 4, 2), Tile(128, 64, 8, 1)),
    (100, 128, 2): Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 8, 1), Tile(64, 32, 4, 1), Tile(128, 32, 8, 1)),
    # B300
    (103, 64, 2): Tiles(Tile(64, 64, 8, 2), Tile(64, 64, 8, 1), Tile(64, 64, 4, 2), Tile(128, 64, 8, 1)),
    (103, 128, 2): Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 8, 1), Tile(64, 32, 4, 1), Tile(128, 32, 8, 1)),
    # any other: 99 KiB
    (0, 32, 2): Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 1), Tile(64, 64, 4, 2)),
    (0, 64, 2): Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 64, 4, 2)),
    (0, 128, 2): Tiles(Tile(64, 32, 4, 2), Tile(128, 16, 8, 1), Tile(64, 32, 4, 2)),
    (0, 16, 4): Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
    (0, 32, 4): Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 2)),
    (0, 64, 4): Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 4, 2)),
    (0, 128, 4): Tiles(Tile(32, 16, 8, 1), Tile(32, 16, 8, 1), Tile(32, 16, 8, 1)),
}
TILE_ROWS = tuple(sorted({tile.rows for t in TILES.values() for tile in (t.forward, t.dkdv, t.dq, t.whole) if tile}))
"""All ``rows`` in TILES."""


@torch.compiler.assume_constant_result  # otherwise torch.compile traces the cache
def architecture(device: torch.device) -> int:
    """80 for compute capability 8.0; 0 for a CPU."""
    return _architecture(device)


@cache
def _architecture(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tiles_for(head_size: int, dtype: torch.dtype, architecture: int) -> Tiles:
    """The tiles for a head size, dtype and architecture (80 for compute capability 8.0).

    Raises:
        ValueError: the heads are too large.
    """
    for (arch, largest, itemsize), tiles in TILES.items():
        if arch in (architecture, 0) and padded_head_size(head_size) <= largest and itemsize == dtype.itemsize:
            return tiles
    raise ValueError(f"attention 'triton': expected heads of at most {MAX_HEAD_SIZE}, got {head_size} in {dtype}")


def tile_table(cu_seqlens: Tensor, rows: int) -> Tensor:
    """Cut each sequence into tiles of ``rows`` tokens, one per program and head. Synchronizes a GPU.

    Returns:
        (n, 3) int32: first token of the tile's sequence, the sequence's length, the tile's first row in it. Longest
        sequences first: their programs run longest, so they start first.
    """
    lengths = cu_seqlens.diff()  # (B,)
    tiles = (lengths + rows - 1) // rows  # (B,), tiles per sequence
    order = lengths.argsort(descending=True, stable=True)
    sequence = order.repeat_interleave(tiles[order])  # (n,)
    before = (tiles[order].cumsum(0) - tiles[order]).repeat_interleave(tiles[order])
    first_row = (torch.arange(len(sequence), device=cu_seqlens.device) - before) * rows
    return torch.stack([cu_seqlens[sequence], lengths[sequence], first_row], dim=1).to(torch.int32)


def tile_tables(layout: Layout, sizes: Iterable[int] = TILE_ROWS) -> dict[int, Tensor]:
    """The layout's tile tables, by rows of a tile; by default all that any kernel needs."""
    return {rows: tile_table(layout.cu_seqlens, rows) for rows in sizes}


def padded_head_size(head_size: int) -> int:
    """Width of a head in a tile: a power of two, at least 16, zero beyond H."""
    return max(16, 1 << (head_size - 1).bit_length())
