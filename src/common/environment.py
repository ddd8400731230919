"""Commit, package versions and device of a result."""

import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent


def commit() -> str:
    """Commit of this code: from git, else from the file ``.gpu/commit``, else ``unknown``."""
    if shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty"]
        described = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
        if described:
            return described
    written = ROOT / ".gpu" / "commit"  # for machines that get the code without git
    return written.read_text().strip() if written.exists() else "unknown"


def device_name(kind: str) -> str:
    """Name of the GPU for ``cuda``; for ``cpu``, the processor and the number of torch's threads."""
    if kind == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' * (threads > 1)} of {(models or [platform.machine()])[0]}"


def environment() -> dict[str, str]:
    """Commit, versions of Python and packages, and the device of a run."""
    packages = ("torch", "mosaicml", "mosaicml-streaming", "transformers", "tokenizers", "numpy")
    return {
        "commit": commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "device": device_name("cuda" if torch.cuda.is_available() else "cpu"),
    }
