"""What the Triton kernels share: whether they can run, launching and counting, and dropout's mask.

Without triton this imports, and models run plain torch. TRITON_INTERPRET=1, set before triton is first imported, runs
the kernels on the CPU, slowly, for tests.
"""

import collections
import re
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # not released for every platform
    triton = None

CHOICES = ("auto", "triton", "torch")
CAPABILITY = (8, 0)
"""Minimal compute capability: Ampere, the first with bf16. Turing also has too little shared memory for a tile."""
FIRST_TRITON = {
    (10, 0): "3.3.0",
    (10, 3): "3.6.0",
    (10, 7): "3.9.0",
    (11, 0): "3.7.0",
    (12, 0): "3.3.1",
    (12, 1): "3.6.0",
}
"""The first Triton that compiles the kernels, by compute capability from Blackwell on. Older ones may abort the process
instead of raising."""
NEXT_TRITON = "3.10.0"
"""The first Triton not yet tested; required for newer capabilities that are not in FIRST_TRITON."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MASK_BITS = 16
"""Random bits per element: dropout probabilities are rounded down to a multiple of 2^-16."""

launches: collections.Counter[str] = collections.Counter()
"""Launches in this process by kernel name, so that a test can prove which path ran."""

if triton is not None:

    @triton.jit
    def keep_mask(key, row, group, threshold, BLOCK: tl.constexpr):
        """(ROWS, BLOCK), true where dropout keeps. Depends on key and position only, so the backward recomputes it.

        Philox (Salmon et al., 2011, Parallel Random Numbers: As Easy as 1, 2, 3) with the counter (group, row) and 7
        rounds, the fewest that pass BigCrush there. One call gives 128 bits, 16 for each of 8 neighbours in a row.

        Args:
            key: int64 scalar.
            row: (ROWS,) int32.
            group: (BLOCK // 8,) int32, index of eight columns. Forward and backward need int32 counters: Philox on 64
                bits is another stream, and slower.
            threshold: an element is dropped if its 16 bits are below.
        """
        zero = (row[:, None] + group[None, :]) * 0
        a, b, c, d = tl.philox(key, group[None, :] + zero, row[:, None] + zero, zero, zero, 7)  # pyright: ignore
        bits = tl.join(tl.join(a, b), tl.join(c, d))
        bits = tl.join(bits & 0xFFFF, bits >> 16)
        return tl.reshape(bits, (row.shape[0], BLOCK)).to(tl.int32) >= threshold


def unavailable(device_type: str) -> str | None:
    """Why the kernels cannot run on a type of device, or None."""
    if triton is None:
        return "triton is not installed (torch brings it on Linux)"
    if device_type == "cuda":
        return _this_gpu()
    if not interpreted():
        return f"Triton's kernels need a CUDA device, and this is {device_type}"
    return _interpreter_refused()


@torch.compiler.assume_constant_result  # traced, torch.compile would guard on the caches of re
def _interpreter_refused() -> str | None:
    version = getattr(triton, "__version__", "0")
    if _numbers(np.__version__) >= (2, 5) and _numbers(version) < (3, 7):
        # It converts a loop's bound by int() of a one-element array: a TypeError since numpy 2.5.
        return f"Triton {version} interprets no loop with numpy {np.__version__}; it needs numpy < 2.5"
    return None


@torch.compiler.assume_constant_result  # has no effect on a cached function, hence two functions
def _this_gpu() -> str | None:
    return _asked_once()


@cache
def _asked_once() -> str | None:
    return refused(torch.cuda.get_device_capability()) if torch.cuda.is_available() else None  # None: no GPU here


def refused(capability: tuple[int, int]) -> str | None:
    """Why the kernels cannot run on a GPU of this compute capability, or None."""
    name = ".".join(map(str, capability))
    if capability < CAPABILITY:
        least = ".".join(map(str, CAPABILITY))
        return f"Triton's kernels need compute capability {least}, and this GPU has {name}"
    version = getattr(triton, "__version__", "0")
    first = FIRST_TRITON.get(capability, NEXT_TRITON)
    if capability < min(FIRST_TRITON) or _numbers(version) >= _numbers(first):
        return None
    verb = "does" if capability in FIRST_TRITON else "may"
    return f"Triton {version} does not compile for compute capability {name}; {first} {verb}"


def _numbers(version: str) -> tuple[int, ...]:
    """(3, 6, 0) of "3.6.0+git1234"."""
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def resolve(kernels: str) -> str:
    """``kernels`` itself, checked when a model is built. ``auto``: triton for tensors on a supported GPU, else torch.

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
    """Whether the Triton kernels compute ``x``."""
    return kernels == "triton" or (kernels == "auto" and x.is_cuda and unavailable("cuda") is None)


def interpreted() -> bool:
    """Whether triton interprets the kernels."""
    return triton is not None and not isinstance(keep_mask, triton.JITFunction)


def ops_of(module: str) -> str:
    """The namespace of a module's custom ops, unique to it.

    Hugging Face's loader may import copies of the module into one process, and an op replaces an older one of its name.
    """
    return re.sub(r"\W", "_", module)


def rows_of(x: Tensor) -> Tensor:
    """``x`` (..., D) as (T, D) with stride 1 along D; copies only if it has to.

    Raises:
        TypeError: unsupported dtype.
        ValueError: the kernels cannot run on the device of ``x``.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"Triton kernels: expected fp16, bf16 or fp32, got {x.dtype}; set kernels to torch")
    missing = None if x.is_cuda else unavailable(x.device.type)
    if missing is not None:
        raise ValueError(f"{missing}; set kernels to auto or torch")
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def launch(kernel: Any, programs: int, x: Tensor, *args: Any, **options: Any) -> None:
    """Launch ``programs`` programs of a kernel, if any, on the device of ``x``, its first argument."""
    if programs:
        launches[kernel.__name__] += 1
        with torch.cuda.device_of(x):  # triton launches on the current device
            kernel[(programs,)](x, *args, **options)


def dropout_threshold(dropout_p: float) -> int:
    """``dropout_p`` in units of 2^-16, rounded down: an element is kept if its random bits reach it.

    Raises:
        ValueError: not in [0, 1).
    """
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout probability: expected at least 0 and below 1, got {dropout_p}")
    return int(dropout_p * 2**MASK_BITS)


def dropout_scale(threshold: int) -> float:
    """Factor of kept elements: 1 over the share that is kept."""
    return 2**MASK_BITS / (2**MASK_BITS - threshold)


def draw_key(x: Tensor) -> Tensor:
    """A new key for dropout, (1,) int64, from the generator of the device of ``x``, without a copy to the host."""
    return torch.randint(2**62, (1,), device=x.device)
