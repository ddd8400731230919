"""Sources of text: C4 on the hub, C4's own files, or your files (in the forms of ``forms``), one document at a time.

A source is a sequence of files. A unit of work is a list of ``Span``, parts of files.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.common.errors import DataError
from src.common.files import atomic
from src.common.hub import HF, is_dataset
from src.convert.files import COLUMNS, File, Form, Span, form_of
from src.convert.forms import Document, columns_of, read, spans_of
from src.convert.stats import FilesReport, Stats, printable
from src.convert.walk import Skipped, expanded, is_c4_folder, is_local, walk


@dataclass(frozen=True)
class TextSource:
    """What to read: the options of ``add_source_options``."""

    places: tuple[str, ...] = ()
    """Files, folders, glob patterns, ``hf:OWNER/NAME``, URLs such as ``s3://...``; without any, C4 from the hub."""
    name: str | None = None
    """Configuration of the ``hf:`` dataset."""
    split: str | None = None
    """Split of the ``hf:`` dataset."""
    text_column: str = "text"
    """Column or field that holds the text."""

    def __str__(self) -> str:
        more = [f"and {len(self.places) - 3} more"] if len(self.places) > 3 else []
        return ", ".join([*self.places[:3], *more]) or "C4"


def add_source_options(parser: argparse.ArgumentParser, places: str, nargs: str) -> None:
    """Add the argument ``places``, and the options that say how to read them, for ``text_source``."""
    what = (
        "files, folders, patterns such as 'texts/**/*.jsonl', hf:OWNER/NAME (a dataset of the Hugging Face Hub), or "
        "URLs such as s3://...; a folder of C4's own files gives their split (default: C4 from the hub)"
    )
    parser.add_argument(places, nargs=nargs, metavar="PLACE", default=[], help=what)
    parser.add_argument("--name", help="with hf:OWNER/NAME: configuration of the dataset, for example sample-10BT")
    parser.add_argument("--split", help="with hf:OWNER/NAME: split of the dataset, for example train")
    parser.add_argument("--text_column", default="text", help="column or field that holds the text (default: text)")
    parser.add_argument("--skip_bad", action="store_true", help="count and skip what cannot be read")


def text_source(args: argparse.Namespace) -> TextSource:
    """The source that the options name.

    Raises:
        ValueError: ``--name`` or ``--split`` without a dataset of the hub.
    """
    if (args.name or args.split) and not any(is_dataset(place) for place in args.source):
        raise ValueError(f"--name and --split have no effect without a source {HF}OWNER/NAME")
    # Local files under another name: all that holds for them holds for these.
    places = tuple(place.removeprefix("file://") for place in args.source)
    return TextSource(places, args.name, args.split, args.text_column)


def is_c4(source: TextSource) -> bool:
    """Whether this is C4 from the hub, or a folder of C4's own files."""
    paths = [path for place in source.places if is_local(place) for path in expanded(place)]
    return not source.places or (len(paths) == 1 and is_c4_folder(paths[0]))


class Inventory:
    """The files of a source, from one walk: a list on disk, so memory does not grow with their number.

    Arguments and errors as for ``walk``; also a DataError for a ``text_column`` of files that have no columns.
    """

    def __init__(self, source: TextSource, split: str = "train", skip_bad: bool = False, output: Path | None = None):
        self.source = source
        self.report = FilesReport()
        self._list = tempfile.NamedTemporaryFile("w", prefix="files-", suffix=".jsonl")  # noqa: SIM115
        kinds = set[str]()
        for entry in walk(source, split, skip_bad, output):
            self.report.add(entry.path, entry.reason if isinstance(entry, Skipped) else None)
            self._list.write(json.dumps(_record(entry)) + "\n")
            if isinstance(entry, File):
                kinds.add((form_of(entry.path) or Form("hub")).kind)
        self._list.flush()
        if kinds == {"txt"} and source.text_column != "text":
            raise DataError(f"{source}: --text_column has no effect on .txt files, whose lines are the texts; omit it")

    def __iter__(self) -> Iterator[File]:
        """The files to read, in their order."""
        with open(self._list.name, encoding="utf-8") as lines:
            for line in lines:
                if "skipped" not in (record := json.loads(line)):
                    path = os.fsdecode(bytes.fromhex(record["hex"])) if "hex" in record else record["path"]
                    yield File(path, record["bytes"], record["changed"])

    def save(self, path: Path) -> None:
        """Write the list, skipped files included: one JSON object per line."""
        with atomic(path) as partial:
            shutil.copyfile(self._list.name, partial)

    def print_skipped(self) -> None:
        """Say on stderr what is not read."""
        for line in self.report.lines():
            print(f"{self.source}: {line}", file=sys.stderr)

    def check_unchanged(self) -> None:
        """Raise a DataError if a file has another size or time than in the list."""
        for file in filter(lambda file: is_local(file.path), self):
            status = os.stat(file.path)
            if (status.st_size, status.st_mtime_ns) != (file.size, file.changed):
                raise DataError(
                    f"{printable(file.path)} changed while it was read, so part of its text may be missing; once it no "
                    "longer changes, give --overwrite to start again"
                )


def _record(entry: File | Skipped) -> dict[str, Any]:
    path = printable(entry.path)
    name: dict[str, Any] = {"path": path}
    if path != entry.path:
        name["hex"] = os.fsencode(entry.path).hex()
    if isinstance(entry, Skipped):
        return {**name, "skipped": entry.reason}
    return {**name, "bytes": entry.size, "changed": entry.changed}


def columns_of_files(files: Inventory, limit: int | None) -> list[str]:
    """COLUMNS[0], and the others that the first document of some file has; of the first ``limit`` files with one."""
    found, looked, read = {COLUMNS[0]}, None, 0
    for file in files:
        # Files of the hub, of a server, and shards of one folder are alike, and slow to open.
        alike = not is_local(file.path) or ".mds" in os.path.basename(file.path)
        group = os.path.dirname(file.path) if alike else file.path
        if group != looked and (columns := columns_of(file.path, files.source.text_column)):
            found.update(columns)
            looked, read = group, read + 1
            if read == limit:
                break
    return [name for name in COLUMNS if name in found]


def units_of(files: Iterable[File], size: int) -> Iterator[list[Span]]:
    """Divide files into units of about ``size`` bytes of text: small files together, large ones in parts.

    The division depends on the files and ``size`` only. A gzip cannot be read from its middle, so it is one part.
    """
    unit: list[Span] = []
    weight = 0
    for file in files:
        for span, text_bytes in spans_of(file, size):
            if unit and weight + text_bytes > size:
                yield unit
                unit, weight = [], 0
            unit.append(span)
            weight += max(text_bytes, 4096)  # bounds the number of tiny files per unit
    if unit:
        yield unit


def documents(files: Inventory, skip_bad: bool = False, stats: Stats | None = None) -> Iterator[Document]:
    """The documents of the files, in their order.

    Args:
        skip_bad: count and skip what cannot be read, instead of raising.
        stats: receives the counts of documents, empty and bad ones.

    Raises:
        BadText: something cannot be read, and ``skip_bad`` is off.
    """
    stats = Stats() if stats is None else stats
    for file in files:
        for _, document in read(Span(file.path), files.source.text_column, skip_bad, stats):
            yield document


def iter_documents(
    source: TextSource, split: str = "train", skip_bad: bool = False, stats: Stats | None = None
) -> Iterator[Document]:
    """The documents of a source, in a fixed order; arguments and errors as for ``walk`` and ``documents``."""
    yield from documents(Inventory(source, split, skip_bad), skip_bad, stats)
