"""Whether torch is recording a graph, in which Python's decisions are constants."""

import torch


def in_trace() -> bool:
    """Whether operations go into a graph of torch.jit.trace."""
    return torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def in_graph() -> bool:
    """Whether operations go into a graph: torch.compile, torch.export, torch.onnx.export or torch.jit.trace."""
    return torch.compiler.is_compiling() or in_trace()


def in_exported_graph() -> bool:
    """Whether that graph will run without this code, for any inputs: all of them except torch.compile.

    In torch 2.7, torch.export needs ``strict=False``, today's default: with True this is False, and it fails.
    """
    # torch.compiler.is_exporting() itself is true in torch 2.7's torch.compile, which would then lose the kernels. The
    # flag behind it has no promise to stay.
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return (torch.compiler.is_exporting() if flag is None else flag) or in_trace()
