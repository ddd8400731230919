"""Each kernel compiled for each card, in a process without the interpreter (benchmarks/kernels/aot.py)."""

import os
import re
import subprocess
import sys

import pytest

from src.triton_common import refused

triton = pytest.importorskip("triton")

NO_FAULT = {"spilling": 0, "over_limit": 0, "repeating": 0}
ALL = [80, 89, 90, 100, 103, 120]
"""A100; RTX 40, L4, L40S; H100, H200; B200; B300; RTX 50. RTX 30 (86) has the tiles and limits of 89, and is in the
report only, to save time."""


def compiled(*arguments, before="pass"):
    """Exit status and the counts of the last line."""
    code = f"import sys; from benchmarks.kernels import aot; {before}; sys.exit(aot.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"})
    last = done.stdout.splitlines()[-1] if done.stdout else ""
    assert re.fullmatch(r"aot kernels=\d+ spilling=\d+ over_limit=\d+ repeating=\d+", last), done.stdout + done.stderr
    return done.returncode, {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", last)}


@pytest.mark.slow
def test_the_base_model_on_a100_and_h100(tmp_path):
    """Heads of 64, hidden size 768, GLU width 3,072, vocabulary 30,528; aligned and other strides."""
    table, old = tmp_path / "table.md", f"## Triton {triton.__version__}\n\nold\n"
    table.write_text(f"# Title\n\n## Triton 3.0.9\n\nbefore\n\n{old}\n## Triton 3.10.0\n\nafter\n")
    arguments = ("--architectures", 80, 90, "--head_sizes", 64, "--widths", 768, "--dtypes", "bf16", "--out", table)
    status, counts = compiled(*arguments)
    assert status == 0 and counts == {"kernels": 4 + 5 + 2 * 2 * (6 + 4 + 2), **NO_FAULT}
    _, before, ours, after = table.read_text().split("## Triton ")  # keeps other versions' sections, in order
    assert before == "3.0.9\n\nbefore\n\n" and after == "3.10.0\n\nafter\n"
    assert ours.startswith(f"{triton.__version__}\n") and "old" not in ours and ours.count("\n| sm_90 |") == 29
    # dkdv: a tile of 64 rows for 4 warps, so each score once, in fewer cycles than if two warps did. Forward: of its
    # two loops, that without masks; with them a score takes 0.113 or more.
    for kernel, most in (("dkdv", 0.2), ("forward", 0.11)):
        (cycles,) = re.findall(rf"\| sm_90 \| flash_attn_{kernel} .* \| 1 \| (0\.\d{{3}}) \|\n", ours)
        assert 0.05 < float(cycles) < most
    serialised = 2 if triton.__version__ < "3.4" else 0
    assert f"\n{serialised} of 4 builds with wgmma wait for each product" in ours
    assert ours.endswith("\n\naot kernels=57 spilling=0 over_limit=0 repeating=0\n\n")


def test_a_bad_tile_is_caught():
    """In the forward: too many queries for the registers, too many stages for shared memory. In the backward, some of
    eight warps repeat what others compute of 32 x 32 scores.
    """
    before = (
        "F = aot.attention_tiles; few = F.Tile(32, 32, 8, 1);"
        "F.TILES = {(0, 64, 2): F.Tiles(F.Tile(128, 128, 4, 4), few, few)}"
    )
    arguments = ("--architectures", 86, "--head_sizes", 64, "--widths", "--vocabularies", "--dtypes", "bf16")
    status, counts = compiled(*arguments, before=before)
    assert status == 1 and counts == {"kernels": 4, "spilling": 1, "over_limit": 1, "repeating": 2}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ALL)
def test_all_kernels(architecture):
    """None for a card that this Triton cannot compile for: trying would abort the process."""
    status, counts = compiled("--architectures", architecture)
    whole = 2 * 7 if architecture in (90, 100, 103) else 0  # in fp16 and bf16
    built = 0 if refused(architecture) else 3 * (7 * 4 + 4 * 2 * (6 + 4) + 2 * 2) + whole
    assert status == 0 and counts == {"kernels": built, **NO_FAULT}
