"""Compile every kernel for all supported cards, on a machine without a GPU.

    python -m benchmarks.kernels.aot [--architectures 80 90] [--head_sizes 64] [--widths 768] [--vocabularies 30528]
        [--dtypes bf16] [--processes 2] [--out table.md]

Prints for each build the registers per thread, bytes spilled to local memory, and shared memory of a program. For
attention also:

warps per score             how many warps compute the same score: 1, or the tile has too few rows for its warps.
issue cycles per score      instructions of the main loop, times warps, divided by scores and by 4 schedulers. A bound
                            of the time, without waits for memory and products; compare tiles of one kernel and card.

Last line: ``aot kernels=… spilling=… over_limit=… repeating=…``; the exit status is 1 if a build spills, needs more
shared memory than the card has, or repeats scores. ``--out`` replaces the section of this Triton version in that file.
Row-wise kernels are compiled for strides that are multiples of 16 elements and for others; attention's heads are
aligned if 16 divides them. Builds that the compiler cannot distinguish are compiled once.
"""

import argparse
import itertools
import math
import multiprocessing
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
from src import attention_tiles, cross_entropy_triton, flash_attn_triton, geglu_triton, layer_norm_triton, triton_common

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

    def types(self) -> dict[str, str]:
        """The type of each argument; ``constexpr``: it is a constant."""

        def type_of(name: str) -> str:
            if name in self.constants:
                return "constexpr"
            if name.endswith("_ptr"):
                return f"*{POINTERS.get(name, self.dtype)}"
            return "fp32" if name.startswith(("scale", "eps")) else "i32"

        return {name: type_of(name) for name in self.kernel.arg_names}

    def divides(self, argument: str) -> bool:
        """Whether the compiler may assume that 16 divides an argument; it divides every pointer."""
        return argument.endswith("_ptr") or (self.aligned and ("stride" in argument or argument in ("D", "I", "V")))

    def source(self) -> ASTSource:
        """What the compiler gets. As in a launch, it assumes nothing about arguments that are not specialised."""
        places = {parameter.name: (parameter.num,) for parameter in self.kernel.params}
        known = [p.name for p in self.kernel.params if not p.do_not_specialize and p.name not in self.constants]
        attributes = {places[name]: [["tt.divisibility", 16]] for name in known if self.divides(name)}
        constants = {places[name]: value for name, value in self.constants.items()}
        return ASTSource(self.kernel, self.types(), constants, attributes)

    def key(self, architecture: int) -> tuple[Any, ...]:
        """Equal for builds that the compiler cannot distinguish."""
        return architecture, self.kernel.__name__, self.num_warps, self.num_stages, self.source().hash()


POINTERS = {
    **dict.fromkeys(("lse_ptr", "delta_ptr", "slopes_ptr", "mean_ptr", "rstd_ptr", "partial_ptr"), "fp32"),
    **dict.fromkeys(("weight_ptr", "bias_ptr", "loss_ptr", "top_ptr", "total_ptr", "dloss_ptr"), "fp32"),
    **dict.fromkeys(("tiles_ptr", "counts_ptr"), "i32"),
    **dict.fromkeys(("key_ptr", "labels_ptr"), "i64"),
}
"""Element types that do not depend on the dtype."""


def flash_attn_builds(architecture: int, head_size: int, dtype: str) -> Iterator[Build]:
    """The attention kernels for one head size."""
    F = flash_attn_triton
    tiles, aligned = attention_tiles.tiles_for(head_size, DTYPES[dtype], architecture), head_size % 16 == 0
    shape = {"H": head_size, "BLOCK_H": attention_tiles.padded_head_size(head_size)}
    for name in ("forward", "dkdv", "dq", "whole"):
        tile = getattr(tiles, name)
        if tile is None:
            continue
        constants = {**shape, "ROWS": tile.rows, "COLS": tile.cols, "UPCAST": False}
        variant = f"H={head_size}, {tile.rows} x {tile.cols}"
        yield Build(getattr(F, f"flash_attn_{name}"), variant, dtype, constants, tile.warps, tile.stages, aligned)
    constants = {**shape, "ROWS": F.delta_rows(head_size)}
    yield Build(F.flash_attn_delta, f"H={head_size}", dtype, constants, aligned=aligned)


def rowwise_builds(width: int, dtype: str) -> Iterator[Build]:
    """LayerNorm of one width, alone, with a residual, and with residual and dropout; GeGLU of 4 widths, and dropout."""
    for residual, dropout in ((False, False), (True, False), (True, True)):
        for kind in ("forward", "backward"):
            constants: dict[str, Any] = {"RESIDUAL": residual, "DROPOUT": dropout}
            constants |= {"WRITE_DRESIDUAL": dropout} if kind == "backward" else {}
            constants |= layer_norm_triton.tile(width, kind)
            variant = f"D={width}{', residual' * residual}{', dropout' * dropout}"
            kernel = getattr(layer_norm_triton, f"layer_norm_{kind}")
            yield Build(kernel, variant, dtype, constants, constants.pop("num_warps"))
    for dropout in (False, True):
        for kernel in (geglu_triton.geglu_forward, geglu_triton.geglu_backward):
            constants = {"DROPOUT": dropout, **geglu_triton.tile(4 * width)}
            yield Build(kernel, f"I={4 * width}{', dropout' * dropout}", dtype, constants, constants.pop("num_warps"))


def cross_entropy_builds(V: int, dtype: str) -> Iterator[Build]:
    """The masked-token head's kernels for one vocabulary. All V above 1,024 share one block size."""
    constants = cross_entropy_triton.tile(V)
    warps = constants.pop("num_warps")
    for kernel in (cross_entropy_triton.cross_entropy_forward, cross_entropy_triton.cross_entropy_backward):
        yield Build(kernel, f"V={V}", dtype, constants, warps)


def builds_for(architecture: int, args: argparse.Namespace) -> Iterator[Build]:
    """All builds for a card."""
    for dtype in args.dtypes:
        for head_size in args.head_sizes:
            yield from flash_attn_builds(architecture, head_size, dtype)
        rowwise = (rowwise_builds(width, dtype) for width in args.widths)
        heads = (cross_entropy_builds(V, dtype) for V in args.vocabularies)
        for build in itertools.chain(*rowwise, *heads):
            yield from (replace(build, aligned=aligned) for aligned in (True, False))


def compile_for(build: Build, architecture: int) -> dict[str, Any]:
    """Registers and spilled bytes per thread, bytes of shared memory per program; whether it has ``wgmma`` (Hopper's
    asynchronous product), and whether ptxas makes it wait for each one (its note C7515, which Triton does not pass on).
    Of attention's kernels with scores also ``warps_per_score`` and ``cycles_per_score``.
    """
    compiled = triton.compile(
        build.source(),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": build.num_warps, "num_stages": build.num_stages},
    )
    cubin, ptx, ttgir = compiled.asm["cubin"], compiled.asm["ptx"], compiled.asm["ttgir"]
    usage = output_of("cuobjdump", cubin, "-res-usage")
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    wgmma = "wgmma" in ptx
    serialised = wgmma and "C7515" in output_of("ptxas", ptx.encode(), "-v", "--gpu-name=sm_90a", "-o", os.devnull)
    about = {"registers": found["REG"], "spilled": found["STACK"], "shared": compiled.metadata.shared}
    about |= {"wgmma": wgmma, "serialised": serialised}
    # The scores are where attention takes exp2 of a matrix.
    matrix = re.search(r"math\.exp2 .*: tensor<(\d+)x(\d+)xf32, (#\w+)>", ttgir)
    if build.kernel.__name__.startswith("flash_attn") and matrix is not None:
        shape = (int(matrix[1]), int(matrix[2]))
        about["warps_per_score"] = warps_per_score(ttgir, matrix[3], shape)
        instructions = main_loop(output_of("cuobjdump", cubin, "-sass"))
        about["cycles_per_score"] = instructions * build.num_warps / SCHEDULERS / math.prod(shape)
    return about


SCHEDULERS = 4
"""Of a multiprocessor, on all cards here; each issues one instruction of a warp per cycle."""


def warps_per_score(ttgir: str, layout: str, shape: tuple[int, int]) -> int:
    """Warps that hold the same element of a matrix of this layout (a name such as ``#mma``) and shape.

    Raises:
        ValueError: a kind of layout that is not known here.
    """
    definition = re.search(rf"^{layout} = (.*)$", ttgir, re.MULTILINE)
    text = definition[1] if definition is not None else ""

    def sizes(name: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", re.search(rf"\b{name} = \[([^\]]*)\]", text)[1])]  # pyright: ignore

    if text.startswith("#ttg.linear"):  # each bit of the warp's number moves it by such an offset
        offsets = re.findall(r"\[(\d+), (\d+)\]", re.search(r"warp = \[(.*?)\](?:, block|\})", text)[1])  # pyright: ignore
        return 2 ** offsets.count(("0", "0"))
    if text.startswith("#ttg.nvidia_mma"):
        one_warp = sizes("instrShape")[-3 if len(sizes("instrShape")) == 3 else -2 :][:2]
    elif text.startswith("#ttg.blocked"):
        one_warp = [a * b for a, b in zip(sizes("sizePerThread"), sizes("threadsPerWarp"), strict=True)]
    else:
        raise ValueError(f"unknown layout of the scores, {layout} = {text}")
    warps = sizes("warpsPerCTA")
    distinct = (min(n, max(1, size // each)) for n, size, each in zip(warps, shape, one_warp, strict=True))
    return math.prod(warps) // math.prod(distinct)


def main_loop(sass: str) -> int:
    """Instructions of the shortest loop with an exp2 (the forward's other one masks keys), or, without one, of all."""
    code = [(int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", sass, re.MULTILINE)]
    code = code[: 1 + max(i for i, (_, text) in enumerate(code) if text.endswith("EXIT"))]  # behind it, waits
    jumps = [(at, re.search(r"\bBRA\b.*\b0x([0-9a-f]+)$", text)) for at, text in code]
    loops = [[text for at, text in code if int(to[1], 16) <= at <= end] for end, to in jumps if to is not None]
    return min((len(loop) for loop in loops if any("MUFU.EX2" in text for text in loop)), default=len(code))


def compiled(work: list[tuple[int, Build]], processes: int) -> Iterator[dict[str, Any]]:
    """``compile_for`` of all, in order; once for equal ones."""
    keys = [build.key(architecture) for architecture, build in work]
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    # Forked processes see the work as it is here: Triton's kernels cannot be pickled, so they get its numbers.
    with multiprocessing.get_context("fork").Pool(processes, _take, [work]) as pool:
        running = {key: pool.apply_async(_compile, [i]) for key, i in sorted(first.items(), key=lambda item: item[1])}
        for key in keys:
            yield running[key].get()


_work: list[tuple[int, Build]] = []


def _take(work: list[tuple[int, Build]]) -> None:
    _work[:] = work


def _compile(number: int) -> dict[str, Any]:
    architecture, build = _work[number]
    return compile_for(build, architecture)


def output_of(tool: str, content: bytes, *arguments: str) -> str:
    """The output of a tool that Triton brings, on a file with this content."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        command = [path, *arguments, file.name]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout


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
    parser.add_argument("--head_sizes", type=int, nargs="*", default=[16, 24, 32, 48, 64, 80, 128])
    parser.add_argument("--widths", type=int, nargs="*", default=[256, 768, 1024, 4096], help="hidden sizes")
    parser.add_argument("--vocabularies", type=int, nargs="*", default=[30528])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--out", type=Path, help="file for the table")
    args = parser.parse_args(argv)

    work: list[tuple[int, Build]] = []
    notes: list[str] = []
    for architecture in dict.fromkeys([75, *args.architectures]):
        reason = triton_common.refused(architecture)
        if reason is None:
            work += [(architecture, build) for build in builds_for(architecture, args)]
        else:
            notes.append(f"sm_{architecture} is refused: {reason}.")
    titles = "card | kernel | dtype | variant | strides | warps | stages | registers | spilled | shared memory"
    titles += " | warps per score | issue cycles per score"
    lines = [
        f"With torch {torch.__version__}; no GPU was used, and no figure here is a time.",
        "",
        f"| {titles} |",
        "|---" * (titles.count("|") + 1) + "|",
    ]
    print("\n".join(lines), flush=True)
    usages: list[dict[str, Any]] = []
    for (architecture, build), usage in zip(work, compiled(work, args.processes), strict=True):
        over_limit, repeating = usage["shared"] > SHARED_MEMORY[architecture], usage.get("warps_per_score", 1) > 1
        usages.append(usage | {"over_limit": over_limit, "repeating": repeating})
        cells = [f"sm_{architecture}", build.kernel.__name__, build.dtype, build.variant]
        cells += ["aligned" if build.aligned else "any", build.num_warps, build.num_stages]
        cells += [usage["registers"], usage["spilled"], usage["shared"]]
        scores = "cycles_per_score" in usage
        cells += [usage["warps_per_score"], f"{usage['cycles_per_score']:.3f}"] if scores else ["", ""]
        lines.append(f"| {' | '.join(map(str, cells))} |")
        print(lines[-1], flush=True)
    names = ("wgmma", "serialised", "spilled", "over_limit", "repeating")
    counts = {name: sum(usage[name] > 0 for usage in usages) for name in names}
    if counts["wgmma"]:
        notes.append(
            f"{counts['serialised']} of {counts['wgmma']} builds with wgmma wait for each product (ptxas's note C7515)."
        )
    faults = {"spilling": counts["spilled"], "over_limit": counts["over_limit"], "repeating": counts["repeating"]}
    last = " ".join([f"aot kernels={len(usages)}", *(f"{name}={count}" for name, count in faults.items())])
    tail = ["", *notes, "", last]
    print("\n".join(tail))
    if args.out is not None:
        write_section(args.out, lines + tail)
    return int(any(faults.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
