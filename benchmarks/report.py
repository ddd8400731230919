"""What every file of results says first, and how it is written."""

import json
import platform
import shutil
import subprocess
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent


def commit() -> str:
    """Of this code: as git says, else as benchmarks/gpu/prepare.sh wrote it down for a machine without git."""
    if shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty"]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
        if said:
            return said
    written = ROOT / ".gpu" / "commit"
    return written.read_text().strip() if written.exists() else "unknown"


def machine(device: str) -> dict[str, Any]:
    """Device, versions, commit and day of a measurement."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        threads = torch.get_num_threads()
        name = f"{threads} thread{'s' * (threads > 1)} of {(models or [platform.machine()])[0]}"
    return {
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **({"triton": version("triton")} if device == "cuda" else {}),
        "transformers": transformers.__version__,
        "commit": commit(),
        "date": date.today().isoformat(),
    }


def described(about: dict[str, Any]) -> str:
    """``machine`` in a line."""
    return ", ".join([about["device"], *(f"{name} {value}" for name, value in about.items() if name != "device")])


def write_json(path: Path, data: Any) -> None:
    """Whole, or not at all, so that what is there can be trusted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    partial.replace(path)


class Printed:
    """Prints lines, and keeps them for a file."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, line: str = "") -> None:
        print(line, flush=True)
        self.lines.append(line + "\n")

    def write(self, path: Path | None) -> None:
        """To the file; None: nowhere."""
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(self.lines))


def table(header: list[str], rows: list[list[str]]) -> str:
    """In Markdown; the first column to the left, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
