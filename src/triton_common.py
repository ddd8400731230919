"""What the Triton kernels share: whether they can run, how they are started and counted, and dropout's mask.

A machine without triton can import this, and runs the plain torch path. TRITON_INTERPRET=1, set before triton is first
imported, runs the kernels on the CPU, slowly, to test them.
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
except ImportError:  # triton is not made for every platform
    triton = None

CHOICES = ("auto", "triton", "torch")
CAPABILITY = (8, 0)
"""Of a GPU, at least: Ampere, the first that has bf16. Turing also has too little shared memory for a tile."""
FIRST_TRITON = {
    (10, 0): "3.3.0",
    (10, 3): "3.6.0",
    (10, 7): "3.9.0",
    (11, 0): "3.7.0",
    (12, 0): "3.3.1",
    (12, 1): "3.6.0",
}
"""The first Triton that compiles the kernels, by compute capability from Blackwell on. An older one may abort the
process instead of raising."""
NEXT_TRITON = "3.10.0"
"""The first that was not tried: it is needed for a newer capability that is not in FIRST_TRITON."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MASK_BITS = 16
"""Random bits that decide over an element: a probability of dropout is rounded down to a multiple of 2^-16."""

launches: collections.Counter[str] = collections.Counter()
"""Launches in this process by the kernel's name, so that a test can prove which path ran."""

if triton is not None:

    @triton.jit
    def keep_mask(key, row, group, threshold, BLOCK: tl.constexpr):
        """(ROWS, BLOCK), true where dropout keeps, from the key and the place alone: a backward draws it again.

        Philox (Salmon et al., 2011, Parallel Random Numbers: As Easy as 1, 2, 3) with the counter (group, row), 7
        rounds, the fewest that pass BigCrush there. One call gives 128 bits, 16 for each of 8 neighbours in a row.

        Args:
            key: int64 scalar.
            row: (ROWS,) int32.
            group: (BLOCK // 8,) int32, which eight columns. int32 counters in forward and backward alike: Philox on 64
                bits is another stream, and slower.
            threshold: an element goes if its 16 bits are below.
        """
        zero = (row[:, None] + group[None, :]) * 0
        a, b, c, d = tl.philox(key, group[None, :] + zero, row[:, None] + zero, zero, zero, 7)  # pyright: ignore
        bits = tl.join(tl.join(a, b), tl.join(c, d))
        bits = tl.join(bits & 0xFFFF, bits >> 16)
        return tl.reshape(bits, (row.shape[0], BLOCK)).to(tl.int32) >= threshold


def unavailable(device_type: str) -> str | None:
    """Why the kernels cannot run on such a device, or None if they can."""
    if triton is None:
        return "triton is not installed (torch brings it on Linux)"
    if device_type == "cuda":
        return _this_gpu()
    if not interpreted():
        return f"Triton's kernels need a CUDA device, and this is {device_type}"
    return _interpreter_refused()


@torch.compiler.assume_constant_result  # traced, a compiled model would depend on what is in the caches of re
def _interpreter_refused() -> str | None:
    version = getattr(triton, "__version__", "0")
    if _numbers(np.__version__) >= (2, 5) and _numbers(version) < (3, 7):
        # It takes int() of an array of one element for a loop's bound: a TypeError from numpy 2.5 on.
        return f"Triton {version} interprets no loop with numpy {np.__version__}; it needs numpy < 2.5"
    return None


@torch.compiler.assume_constant_result  # has no effect on a cached function: hence two
def _this_gpu() -> str | None:
    return _asked_once()


@cache
def _asked_once() -> str | None:
    return refused(torch.cuda.get_device_capability()) if torch.cuda.is_available() else None  # None: another machine's


def refused(capability: tuple[int, int]) -> str | None:
    """Why the kernels cannot run on a GPU of this compute capability, or None if they can."""
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
    """``kernels``, checked when a model is built. ``auto`` means triton for tensors on a GPU that can, torch elsewhere.

    Raises:
        ValueError: there is no such choice, or it is triton and no kernel can run here.
    """
    if kernels not in CHOICES:
        raise ValueError(f"kernels {kernels!r} is not there; choose one of {', '.join(CHOICES)}")
    missing = unavailable("cuda" if torch.cuda.is_available() else "cpu") if kernels == "triton" else None
    if missing is not None:
        raise ValueError(f"kernels 'triton' cannot run here: {missing}; choose auto or torch")
    return kernels


def use_triton(kernels: str, x: Tensor) -> bool:
    """Whether a tensor goes to the Triton kernels."""
    return kernels == "triton" or (kernels == "auto" and x.is_cuda and unavailable("cuda") is None)


def interpreted() -> bool:
    """Whether triton interprets the kernels, on any device."""
    return triton is not None and not isinstance(keep_mask, triton.JITFunction)


def ops_of(module: str) -> str:
    """The namespace of a module's custom ops: its own, as Hugging Face's loader may import a second copy of the module
    into the same process, and of two ops of one name the later one takes the place of the first."""
    return re.sub(r"\W", "_", module)


def rows_of(x: Tensor) -> Tensor:
    """``x`` (..., D) as (T, D) with neighbours in memory along D; a copy only if it must be.

    Raises:
        TypeError: the dtype is none that the kernels know.
        ValueError: the tensor is on a device where they cannot run.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"the Triton kernels take fp16, bf16 and fp32, not {x.dtype}; set kernels to torch")
    missing = None if x.is_cuda else unavailable(x.device.type)
    if missing is not None:
        raise ValueError(f"{missing}; set kernels to auto or torch")
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def launch(kernel: Any, programs: int, x: Tensor, *args: Any, **options: Any) -> None:
    """Start ``programs`` of a kernel on the device of ``x``, its first argument; with none there is nothing to do."""
    if programs:
        launches[kernel.__name__] += 1
        with torch.cuda.device_of(x):  # triton takes the current device, not the tensor's
            kernel[(programs,)](x, *args, **options)


def dropout_threshold(dropout_p: float) -> int:
    """``dropout_p`` in units of 2^-16, rounded down: what an element's random bits must reach to be kept.

    Raises:
        ValueError: not in [0, 1).
    """
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout probability {dropout_p}: it must be at least 0 and below 1")
    return int(dropout_p * 2**MASK_BITS)


def dropout_scale(threshold: int) -> float:
    """What kept elements are multiplied by: 1 over the true share that is kept."""
    return 2**MASK_BITS / (2**MASK_BITS - threshold)


def draw_key(x: Tensor) -> Tensor:
    """A fresh key for dropout, (1,) int64, from the generator of the device of ``x``, which it never leaves."""
    return torch.randint(2**62, (1,), device=x.device)
