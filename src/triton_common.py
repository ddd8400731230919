"""What the Triton kernels share: whether they can run, launches and their count, and dropout's mask.

This file imports without triton too; models then run plain torch. For tests, TRITON_INTERPRET=1, set before triton is
first imported, runs the kernels on the CPU, slowly.
"""

# pyright: reportOptionalMemberAccess=false

import collections
import re
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .graphs import in_exported_graph

try:
    import triton
    import triton.language as tl
except ImportError:  # not released for every platform
    triton = None

CHOICES = ("auto", "triton", "torch")
MIN_ARCHITECTURE = 80
"""Ampere, the first with bf16; 10 * major + minor of the compute capability. Turing also lacks shared memory."""
FIRST_TRITON = {100: "3.3.0", 103: "3.6.0", 107: "3.9.0", 110: "3.7.0", 120: "3.3.1", 121: "3.6.0"}
"""The first Triton that compiles the kernels, by architecture from Blackwell on. Older ones may abort the process."""
NEXT_TRITON = "3.10.0"
"""The first Triton not yet tested; required by newer architectures that are not in FIRST_TRITON."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MASK_BITS = 16
"""Random bits per element: dropout probabilities are rounded down to a multiple of 2^-16."""

launches: collections.Counter[str] = collections.Counter()
"""Launches in this process by kernel name: tests prove with it which path ran."""

if triton is not None:

    @triton.jit
    def keep_mask(key, row, group, threshold, BLOCK: tl.constexpr):
        """(ROWS, BLOCK), true where dropout keeps. Depends on key and position only, so the backward recomputes it.

        Philox (Salmon et al., 2011, Parallel Random Numbers: As Easy as 1, 2, 3) with the counter (group, row) and 7
        rounds, the fewest that pass BigCrush there. One call gives 128 bits, 16 for each of 8 adjacent columns.

        Args:
            key: int64 scalar.
            row: (ROWS,) int32.
            group: (BLOCK // 8,) int32, index of eight columns. Must be int32 in forward and backward: with 64-bit
                counters Philox gives another stream, and is slower.
            threshold: an element is dropped if its 16 bits are below.
        """
        zero = (row[:, None] + group[None, :]) * 0
        a, b, c, d = tl.philox(key, group[None, :] + zero, row[:, None] + zero, zero, zero, 7)  # pyright: ignore
        bits = tl.join(tl.join(a, b), tl.join(c, d))
        bits = tl.join(bits & 0xFFFF, bits >> 16)
        return tl.reshape(bits, (row.shape[0], BLOCK)).to(tl.int32) >= threshold


@torch.compiler.assume_constant_result  # otherwise torch.compile guards on the caches of re and functools
def unavailable(device_type: str) -> str | None:
    """Why the kernels cannot run on a type of device, or None."""
    if triton is None:
        return "triton is not installed (torch brings it on Linux)"
    if device_type == "cuda":
        return _this_gpu()
    if not interpreted():
        return f"Triton's kernels need a CUDA device, and this is {device_type}"
    if _numbers(np.__version__) >= (2, 5) and _numbers(triton.__version__) < (3, 7):
        # It converts a loop's bound by int() of a one-element array: a TypeError since numpy 2.5.
        return f"Triton {triton.__version__} interprets no loop with numpy {np.__version__}; it needs numpy < 2.5"
    return None


@cache
def _this_gpu() -> str | None:
    if not torch.cuda.is_available():  # asked for another machine
        return None
    major, minor = torch.cuda.get_device_capability()
    return refused(10 * major + minor)


def refused(architecture: int) -> str | None:
    """Why the kernels cannot run on a GPU of this architecture (80 for compute capability 8.0), or None."""
    if architecture < MIN_ARCHITECTURE:
        need, has = MIN_ARCHITECTURE / 10, architecture / 10
        return f"Triton's kernels need compute capability {need}, and this GPU has {has}"
    first = FIRST_TRITON.get(architecture, NEXT_TRITON)
    if architecture < min(FIRST_TRITON) or _numbers(triton.__version__) >= _numbers(first):
        return None
    verb = "does" if architecture in FIRST_TRITON else "may"
    name = architecture / 10
    return f"Triton {triton.__version__} does not compile for compute capability {name}; {first} {verb}"


def _numbers(version: str) -> tuple[int, ...]:
    """(3, 6, 0) of "3.6.0+git1234"."""
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def resolve(kernels: str) -> str:
    """``kernels`` itself, after a check. Called when a model is built.

    Raises:
        ValueError: unknown name, or triton where no kernel can run.
    """
    if kernels not in CHOICES:
        raise ValueError(f"unknown kernels {kernels!r}; expected one of {', '.join(CHOICES)}")
    missing = unavailable("cuda" if torch.cuda.is_available() else "cpu") if kernels == "triton" else None
    if missing is not None:
        raise ValueError(f"kernels 'triton' cannot run here: {missing}; set kernels to auto or torch")
    return kernels


def use_triton(kernels: str, x: Tensor) -> bool:
    """Whether to use the Triton kernels for ``x``; ``auto``: on a supported GPU. Never in an exported graph."""
    if in_exported_graph():
        return False
    return kernels == "triton" or (kernels == "auto" and x.is_cuda and unavailable("cuda") is None)


def interpreted() -> bool:
    """Whether Triton runs the kernels in its interpreter, on the CPU."""
    return triton is not None and not isinstance(keep_mask, triton.JITFunction)


def ops_of(module: str) -> str:
    """A namespace for a module's custom ops: the module's name, as an identifier.

    Hugging Face's loader imports copies of the module under other names; with one namespace they would replace each
    other's ops.
    """
    return re.sub(r"\W", "_", module)


def rows_of(x: Tensor) -> Tensor:
    """``x`` (..., D) as (T, D) with stride 1 along D; a view where possible.

    Raises:
        TypeError: unsupported dtype.
        ValueError: the kernels cannot run on the device of ``x``.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"Triton kernels: expected fp16, bf16 or fp32, got {x.dtype}; set kernels to torch")
    missing = None if x.is_cuda else unavailable(x.device.type)
    if missing is not None:
        raise ValueError(f"{missing}; set kernels to auto or torch")
    x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def launch(kernel: Any, programs: int, x: Tensor, *args: Any, **options: Any) -> None:
    """Launch ``programs`` programs of a kernel on the device of ``x``, its first argument; none if 0."""
    if programs:
        launches[kernel.__name__] += 1
        with torch.cuda.device_of(x):  # triton launches on the current device
            kernel[(programs,)](x, *args, **options)


def dropout_threshold(dropout_p: float) -> int:
    """``dropout_p`` in units of 2^-16, rounded down. An element is kept if its random bits are at least this.

    Raises:
        ValueError: not in [0, 1).
    """
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout probability: expected at least 0 and below 1, got {dropout_p}")
    return int(dropout_p * 2**MASK_BITS)


def dropout_scale(threshold: int) -> float:
    """Factor of kept elements: 1 / (share of elements kept)."""
    return 2**MASK_BITS / (2**MASK_BITS - threshold)


def draw_key(x: Tensor, n: int = 1) -> Tensor:
    """New keys for dropout, (n,) int64, from the generator of the device of ``x``; never synchronizes.

    A kernel takes one, (1,). One draw for many kernels saves launches.
    """
    return torch.randint(2**62, (n,), device=x.device)
