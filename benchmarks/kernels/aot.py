"""Compile every kernel for all supported cards, on a machine without a GPU.

    python -m benchmarks.kernels.aot [--architectures 80 90] [--head_sizes 64] [--widths 768] [--dtypes bf16]
        [--out table.md]

Prints for each build the registers per thread, bytes spilled to local memory, and shared memory of a program. Last
line: ``aot kernels=… spilling=… over_limit=…``; the exit status is 1 if a build spills or needs more shared memory than
the card has. With ``--out`` the section of this Triton version in that file is replaced. Triton compiles separately for
strides that are multiples of 16 elements and for others, and so does this, except for attention: heads of a multiple of
16 are always aligned, others never. ``tune.py`` finds the fastest tiles, on the card.
"""

import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # the interpreter compiles nothing

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import report
from src import flash_attn_triton, geglu_triton, layer_norm_triton, triton_common

SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376}
"""Bytes of shared memory that a program may use, by architecture (CUDA C++ Programming Guide, compute capabilities)."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Build:
    """One kernel and its compile-time arguments."""

    kernel: Any
    variant: str
    dtype: str
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: bool = True
    """Strides and widths are multiples of 16."""

    def type_of(self, argument: str) -> str:
        """The type of an argument that is no constant."""
        if argument.endswith("_ptr"):
            return f"*{POINTERS.get(argument, self.dtype)}"
        return "fp32" if argument.startswith(("scale", "eps")) else "i32"

    def divides(self, argument: str) -> bool:
        """Whether the compiler may assume that 16 divides an argument; it divides every pointer."""
        return argument.endswith("_ptr") or (self.aligned and ("stride" in argument or argument in ("D", "I")))


POINTERS = {
    **dict.fromkeys(("lse_ptr", "delta_ptr", "slopes_ptr", "mean_ptr", "rstd_ptr", "partial_ptr"), "fp32"),
    **dict.fromkeys(("weight_ptr", "bias_ptr"), "fp32"),
    "tiles_ptr": "i32",
    "key_ptr": "i64",
}
"""Element types that do not depend on the dtype."""


def flash_attn_builds(architecture: int, head_size: int, dtype: str) -> Iterator[Build]:
    """The attention kernels for one head size."""
    F = flash_attn_triton
    tiles = F.tiles_for(head_size, DTYPES[dtype], architecture)
    shape = {"H": head_size, "BLOCK_H": F.padded_head_size(head_size)}
    for kernel, tile in (
        (F.flash_attn_forward, tiles.forward),
        (F.flash_attn_dkdv, tiles.dkdv),
        (F.flash_attn_dq, tiles.dq),
    ):
        constants = {**shape, "ROWS": tile.rows, "COLS": tile.cols, "UPCAST": False}
        variant = f"H={head_size}, {tile.rows} x {tile.cols}"
        yield Build(kernel, variant, dtype, constants, tile.warps, tile.stages, aligned=head_size % 16 == 0)
    constants = {**shape, "ROWS": F.delta_rows(head_size)}
    yield Build(F.flash_attn_delta, f"H={head_size}", dtype, constants, aligned=head_size % 16 == 0)


def layer_norm_builds(width: int, dtype: str) -> Iterator[Build]:
    """LayerNorm of one width: alone, with a residual, and with a residual and dropout."""
    for residual, dropout in ((False, False), (True, False), (True, True)):
        for kind in ("forward", "backward"):
            constants: dict[str, Any] = {"RESIDUAL": residual, "DROPOUT": dropout}
            if kind == "backward":
                constants["WRITE_DRESIDUAL"] = dropout
            constants |= layer_norm_triton.tile(width, kind)
            variant = f"D={width}{', residual' * residual}{', dropout' * dropout}"
            kernel = getattr(layer_norm_triton, f"layer_norm_{kind}")
            yield Build(kernel, variant, dtype, constants, constants.pop("num_warps"))


def geglu_builds(width: int, dtype: str) -> Iterator[Build]:
    """GeGLU with and without dropout."""
    for dropout in (False, True):
        for kernel in (geglu_triton.geglu_forward, geglu_triton.geglu_backward):
            constants: dict[str, Any] = {"DROPOUT": dropout, **geglu_triton.tile(width)}
            yield Build(kernel, f"I={width}{', dropout' * dropout}", dtype, constants, constants.pop("num_warps"))


def compile_for(build: Build, architecture: int) -> dict[str, int]:
    """Registers and spilled bytes per thread, bytes of shared memory per program; whether it has ``wgmma`` (Hopper's
    asynchronous product), and whether ptxas makes it wait for each one (its note C7515).
    """
    names = build.kernel.arg_names
    signature = {name: "constexpr" if name in build.constants else build.type_of(name) for name in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if build.divides(name)}
    constants = {(names.index(name),): value for name, value in build.constants.items()}
    compiled = triton.compile(
        ASTSource(build.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": build.num_warps, "num_stages": build.num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output("cuobjdump", "-res-usage", file.name)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    wgmma = "wgmma" in compiled.asm["ptx"]
    return {
        "registers": found["REG"],
        "spilled": found["STACK"],
        "shared": compiled.metadata.shared,
        "wgmma": wgmma,
        "serialised": wgmma and _serialised(compiled.asm["ptx"]),
    }


def _serialised(ptx: str) -> bool:
    """Whether ptxas prints C7515, "wgmma.mma_async instructions are serialized". Triton does not pass its notes on."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        return "C7515" in _output("ptxas", "-v", "--gpu-name=sm_90a", file.name, "-o", os.devnull)


def _output(tool: str, *arguments: str) -> str:
    """The output of a tool that Triton brings."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    run = subprocess.run([path, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return run.stdout


def write_section(path: Path, lines: list[str]) -> None:
    """Replace or add this Triton version's section; sections are sorted by version."""
    sections = re.split(r"^(?=## Triton )", path.read_text() if path.exists() else "", flags=re.MULTILINE)[1:]
    title = f"## Triton {triton.__version__}\n"
    sections = [text.rstrip() for text in sections if not text.startswith(title)] + [title + "\n" + "\n".join(lines)]
    sections.sort(key=lambda text: [int(number) for number in re.findall(r"\d+", text.partition("\n")[0])])
    path.write_text(
        "\n\n".join(["# Every kernel, compiled ahead of time by `python -m benchmarks.kernels.aot`", *sections]) + "\n"
    )


def main(argv: list[str]) -> int:
    """Build and print; returns the exit status."""
    parser = report.parser(__doc__)
    known = list(SHARED_MEMORY)
    parser.add_argument("--architectures", type=int, nargs="+", default=known, choices=known)
    parser.add_argument("--head_sizes", type=int, nargs="+", default=[16, 24, 32, 48, 64, 80, 128])
    parser.add_argument("--widths", type=int, nargs="*", default=[256, 768, 1024, 4096], help="hidden sizes")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--out", type=Path, help="file for the table")
    args = parser.parse_args(argv)

    lines = [
        f"With torch {torch.__version__}; no GPU was used, and no figure here is a time.",
        "",
        "| card | kernel | dtype | variant | strides | warps | stages | registers | spilled | shared memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    notes: list[str] = []
    built = spilling = over_limit = wgmma = serialised = 0
    for architecture in dict.fromkeys([75, *args.architectures]):
        reason = triton_common.refused(architecture)
        if architecture not in args.architectures or reason is not None:
            notes += [] if reason is None else [f"sm_{architecture} is refused: {reason}."]
            continue
        for dtype in args.dtypes:
            rowwise = itertools.chain(
                *(layer_norm_builds(width, dtype) for width in args.widths),
                *(geglu_builds(4 * width, dtype) for width in args.widths),
            )
            builds = itertools.chain(
                *(flash_attn_builds(architecture, head_size, dtype) for head_size in args.head_sizes),
                (replace(build, aligned=aligned) for build in rowwise for aligned in (True, False)),
            )
            for build in builds:
                usage = compile_for(build, architecture)
                built += 1
                spilling += usage["spilled"] > 0
                over_limit += usage["shared"] > SHARED_MEMORY[architecture]
                wgmma += usage["wgmma"]
                serialised += usage["serialised"]
                cells: list[Any] = [f"sm_{architecture}", build.kernel.__name__, dtype, build.variant]
                cells += ["aligned" if build.aligned else "any", build.num_warps, build.num_stages]
                cells += [usage["registers"], usage["spilled"], usage["shared"]]
                lines.append(f"| {' | '.join(map(str, cells))} |")
                print(lines[-1], flush=True)
    if wgmma:
        notes.append(f"{serialised} of {wgmma} builds with wgmma wait for each product (ptxas's note C7515).")
    tail = ["", *notes, "", f"aot kernels={built} spilling={spilling} over_limit={over_limit}"]
    print("\n".join(tail))
    if args.out is not None:
        write_section(args.out, lines + tail)
    return int(spilling + over_limit > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
