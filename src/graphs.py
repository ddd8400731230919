"""Whether torch is recording a graph, in which Python's decisions are constants."""

import torch
from torch.jit import is_tracing  # pyright: ignore[reportPrivateImportUsage]


def in_graph() -> bool:
    """Whether operations go into a graph: torch.compile, torch.export, torch.onnx.export or torch.jit.trace."""
    return torch.compiler.is_compiling() or is_tracing()


def in_exported_graph() -> bool:
    """Whether that graph will run without this code, for any inputs: all of them except torch.compile.

    torch 2.7 cannot tell torch.compile from torch.export: there it also keeps the padding, with the same outputs.
    """
    return torch.compiler.is_exporting() or is_tracing()
