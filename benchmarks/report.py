"""What all benchmarks share: the machine's description, options, tables, files of results."""

import argparse
import json
import multiprocessing
import platform
import string
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from src.common.environment import commit, device_name
from src.common.files import write_text


def machine(device: str) -> dict[str, Any]:
    """Device, versions, commit and date of a measurement."""
    return {
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **({"triton": version("triton")} if device == "cuda" else {}),
        "transformers": transformers.__version__,
        "commit": commit(),
        "date": date.today().isoformat(),
    }


def described(about: dict[str, Any]) -> str:
    """``machine`` in one line."""
    return ", ".join(value if name == "device" else f"{name} {value}" for name, value in about.items())


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the script's docstring, as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_device(options: argparse.ArgumentParser) -> None:
    """The option --device: by default the GPU if there is one."""
    options.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")


def device_of(parser: argparse.ArgumentParser, toy: bool) -> str:
    """The device of a kernel's benchmark: the GPU or, for --toy, the CPU. Without a GPU the parser reports an error."""
    if not toy and not torch.cuda.is_available():
        parser.error("no CUDA device found; on a CPU only --toy runs, with TRITON_INTERPRET=1")
    return "cpu" if toy else "cuda"


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a new Python process and return its result."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def write_json(path: Path, data: Any) -> None:
    """Write the whole file, or leave the one before."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def write_page(path: Path, title: str, module: str, paragraphs: list[str], data: Any) -> None:
    """Write ``path`` + .json and, for people, .md."""
    write_json(path.with_suffix(".json"), data)
    made = f"Made by `python -m {module}`; its docstring says what is measured, and how."
    write_text(path.with_suffix(".md"), "\n\n".join([f"# {title}", made, *paragraphs]) + "\n")


class Printed:
    """Prints lines and keeps them for a file."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, line: str = "") -> None:
        print(line, flush=True)
        self.lines.append(line + "\n")

    def write(self, path: Path | None) -> None:
        """Write the lines to a file; None: to none."""
        if path is not None:
            write_text(path, self.lines)


UNITS = {"Gi": 2**30, "T": 1e12, "G": 1e9, "M": 1e6, "m": 1e-3}


class Template(string.Formatter):
    """str.format; a format that begins with one of UNITS is for a value in that unit: ``{peak_bytes:Gi.1f}``."""

    def format_field(self, value: Any, format_spec: str) -> str:
        unit = next((unit for unit in UNITS if format_spec.startswith(unit)), None)
        return format(value, format_spec) if unit is None else format(value / UNITS[unit], format_spec[len(unit) :])


def table(titles: str, row: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table; the first column is aligned left, the others right.

    Args:
        titles, row: titles and templates of the columns, with " | " between. A cell is empty if a value is missing.
    """

    def cell(template: str, values: Mapping[str, Any]) -> str:
        try:
            return Template().vformat(template, (), values)
        except KeyError:
            return ""

    header = titles.split(" | ")
    cells = [[cell(template, values) for template in row.split(" | ")] for values in rows]
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
