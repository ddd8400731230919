"""Compile every kernel for the cards that it is meant for, on a machine that has none.

    python -m benchmarks.aot [--architectures 80 90] [--head_sizes 64 128] [--dtypes bf16] [--out table.md]

Says for each build the registers of a thread, bytes spilled to local memory, and shared memory of a program, and ends
in ``aot kernels=… spilling=… over_limit=…``; exits with 1 if a build spills or asks for more shared memory than the
card has. What runs faster is for ``tune_kernels.py`` to say, on the card.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # what is compiled is not interpreted

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from src import flash_attn_triton

SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that a program may have, by architecture (CUDA C++ Programming Guide, appendix on them)."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Build:
    """One kernel with everything that the compiler is told."""

    kernel: Any
    variant: str
    dtypes: dict[str, str]
    """Element types of pointers that are not of the variant's dtype."""
    default_dtype: str
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3


def flash_attn_builds(architecture: int, head_size: int, dtype: str) -> Iterator[Build]:
    """The attention kernels for heads of one size."""
    F = flash_attn_triton
    tiles = F.tiles_for(head_size, DTYPES[dtype], architecture)
    others = {"lse_ptr": "fp32", "delta_ptr": "fp32", "slopes_ptr": "fp32", "tiles_ptr": "i32"}
    shape = {"H": head_size, "BLOCK_H": F.padded_head_size(head_size)}
    for kernel, tile in (
        (F.flash_attn_forward, tiles.forward),
        (F.flash_attn_dkdv, tiles.dkdv),
        (F.flash_attn_dq, tiles.dq),
    ):
        constants = {**shape, "ROWS": tile.rows, "COLS": tile.cols, "UPCAST": False}
        variant = f"H={head_size}, {tile.rows} x {tile.cols}"
        yield Build(kernel, variant, others, dtype, constants, tile.warps, tile.stages)
    yield Build(F.flash_attn_delta, f"H={head_size}", others, dtype, {**shape, "ROWS": F.DELTA_ROWS})


def compile_for(build: Build, architecture: int) -> dict[str, int]:
    """Registers a thread, bytes spilled a thread, bytes of shared memory a program.

    Raises:
        Exception: what the compiler raises.
    """
    signature, attributes = {}, {}
    for i, name in enumerate(build.kernel.arg_names):
        if name in build.constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = f"*{build.dtypes.get(name, build.default_dtype)}"
        else:
            signature[name] = "fp32" if name.startswith(("scale", "eps", "keep")) else "i32"
        # As at run time: allocations begin at multiples of 16, strides of rows are multiples of 16.
        if name.endswith("_ptr") or name.startswith("stride"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    constants = {(build.kernel.arg_names.index(name),): value for name, value in build.constants.items()}
    compiled = triton.compile(
        ASTSource(build.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": build.num_warps, "num_stages": build.num_stages},
    )
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return {"registers": found["REG"], "spilled": found["STACK"], "shared": compiled.metadata.shared}


def main(argv: list[str]) -> int:
    """Build and print; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, nargs="+", default=[80, 86, 89, 90], choices=list(SHARED_MEMORY))
    parser.add_argument("--head_sizes", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--out", type=Path, help="write the table there too")
    args = parser.parse_args(argv)

    lines = [
        f"Triton {triton.__version__}, torch {torch.__version__}; no GPU was used, and no figure here is a time.",
        "",
        "| card | kernel | dtype | variant | warps | stages | registers | spilled | shared memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    kernels = spilling = over_limit = 0
    for architecture in args.architectures:
        for dtype in args.dtypes:
            for head_size in args.head_sizes:
                for build in flash_attn_builds(architecture, head_size, dtype):
                    usage = compile_for(build, architecture)
                    kernels += 1
                    spilling += usage["spilled"] > 0
                    over_limit += usage["shared"] > SHARED_MEMORY[architecture]
                    cells = (
                        f"sm_{architecture}",
                        build.kernel.__name__,
                        dtype,
                        build.variant,
                        build.num_warps,
                        build.num_stages,
                    )
                    lines.append(f"| {' | '.join(map(str, (*cells, *usage.values())))} |")
                    print(lines[-1], flush=True)
    lines += ["", f"aot kernels={kernels} spilling={spilling} over_limit={over_limit}"]
    print("\n".join(lines[-2:]))
    if args.out is not None:
        args.out.write_text("\n".join(lines) + "\n")
    return int(spilling + over_limit > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
