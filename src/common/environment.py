"""What a run ran on."""

import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch


def environment() -> dict[str, str]:
    """The commit of this code, versions of what it runs on, and the device."""
    commit = ""
    if shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    packages = ("torch", "mosaicml", "mosaicml-streaming", "transformers", "tokenizers", "numpy")
    return {
        "commit": commit or "unknown",
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
