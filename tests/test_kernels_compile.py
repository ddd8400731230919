"""Each kernel through the compiler for the cards, in a process that does not interpret; benchmarks/aot.py reports."""

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

ALL = [80, 86, 89, 90, 100]
"""A100; RTX 30; RTX 40, L4, L40S; H100, H200; B200."""


def compiled(*arguments, before="pass"):
    """Exit status and the counts of the last line."""
    code = f"import sys; from benchmarks import aot; {before}; sys.exit(aot.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"})
    last = done.stdout.splitlines()[-1] if done.stdout else ""
    assert re.fullmatch(r"aot kernels=\d+ spilling=\d+ over_limit=\d+", last), done.stdout + done.stderr
    return done.returncode, {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", last)}


def test_the_base_model_on_a100_and_h100():
    """Attention with heads of 64, LayerNorm of 768, gated unit of 3,072; aligned strides and others."""
    status, counts = compiled("--architectures", 80, 90, "--head_sizes", 64, "--widths", 768, "--dtypes", "bf16")
    assert status == 0 and counts == {"kernels": 2 * (4 + 2 * (6 + 4)), "spilling": 0, "over_limit": 0}


def test_a_bad_tile_is_caught():
    """Of the forward's queries more than registers hold, and more stages than shared memory does."""
    before = (
        "F = aot.flash_attn_triton; good = F.Tile(32, 32, 4, 1);"
        "F.TILES = {(0, 64, 2): F.Tiles(F.Tile(128, 128, 4, 4), good, good)}"
    )
    arguments = ("--architectures", 86, "--head_sizes", 64, "--widths", "--dtypes", "bf16")
    status, counts = compiled(*arguments, before=before)
    assert status == 1 and counts == {"kernels": 4, "spilling": 1, "over_limit": 1}


@pytest.mark.slow  # some minutes
@pytest.mark.parametrize("architecture", ALL)
def test_all_kernels(architecture):
    status, counts = compiled("--architectures", architecture)
    assert status == 0 and counts == {"kernels": 3 * (7 * 4 + 4 * 2 * (6 + 4)), "spilling": 0, "over_limit": 0}
