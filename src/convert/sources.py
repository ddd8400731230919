"""Sources of text: C4 on the hub, C4's own files, or your files (in the forms of ``forms``), one document at a time.

A source is a sequence of files. A unit of work is a list of ``Span``, parts of files.
"""

import argparse
import glob
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from src.common.errors import DataError
from src.convert import hub, mds, tables
from src.convert.files import SUFFIXES
from src.convert.forms import Document, File, Span, form_of, read, spans_of
from src.convert.hub import C4_SPLITS
from src.convert.stats import Stats


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
        return ", ".join(self.places) or "C4"


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
    if (args.name or args.split) and not any(hub.is_dataset(place) for place in args.source):
        raise ValueError(f"--name and --split have no effect without a source {hub.HF}OWNER/NAME")
    return TextSource(tuple(args.source), args.name, args.split, args.text_column)


def is_c4(source: TextSource) -> bool:
    """Whether this is C4 from the hub, or a folder of C4's own files."""
    return not source.places or (len(source.places) == 1 and _is_c4_folder(source.places[0]))


def _is_c4_folder(place: str) -> bool:
    return any(_c4_files(place, name) for name in C4_SPLITS.values())


def _c4_files(source: str, name: str) -> list[Path]:
    folder, pattern = Path(source), f"c4-{name}.*.json.gz"
    return sorted(folder.glob(pattern)) or sorted((folder / "en").glob(pattern))


def files_of(source: TextSource, split: str = "train") -> Iterator[File]:
    """The files of a source in a fixed order. Memory holds the names of one folder at a time.

    Args:
        source: its folders are read with their subfolders, sorted by name.
        split: ``train`` or ``val`` of C4; other sources have no splits.

    Raises:
        DataError: a place does not exist, or has no file of a known format.
    """
    if not source.places:
        yield from hub.c4_files(split)
    for place in source.places:
        if hub.is_dataset(place):
            yield from hub.files(source, place)
        elif "://" in place:
            yield from hub.remote_files(place)
        else:
            for path in expanded(place):
                yield from _local_files(path, split, source.text_column)


def expanded(place: str) -> list[str]:
    """The paths that match a pattern, sorted; the place itself if it is none."""
    if Path(place).exists() or not glob.has_magic(place):
        return [place]
    paths = sorted(glob.glob(place, recursive=True))
    if not paths:
        raise DataError(f"{place}: no file matches this pattern")
    return paths


def _local_files(source: str, split: str, column: str) -> Iterator[File]:
    if _is_c4_folder(source):
        paths: Iterable[Path] = _c4_files(source, C4_SPLITS[split])
        if not paths:
            raise DataError(f"{source}: C4's files of this split (c4-{C4_SPLITS[split]}.*) are missing")
    elif not Path(source).exists():
        raise DataError(f"{source}: no such file or folder")
    elif len(splits := tables.splits_of(Path(source))) > 1:
        names = ", ".join(str(Path(source) / name) for name in splits)
        raise DataError(f"{source}: a DatasetDict; name one of its splits ({names})")
    elif (Path(source) / "index.json").is_file():
        paths = mds.files(Path(source), column)
    else:
        paths = [Path(source)] if Path(source).is_file() else _walk(Path(source))
        paths = (path for path in paths if form_of(path.name))
    path = None
    for path in paths:
        stat = path.stat()
        yield File(str(path), stat.st_size, stat.st_mtime_ns)
    if path is None:
        raise DataError(f"{source}: no file of a known format ({', '.join(SUFFIXES)}, or a folder of MDS shards)")


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)
        elif path.is_file():
            yield path


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


def iter_documents(
    source: TextSource, split: str = "train", skip_bad: bool = False, stats: Stats | None = None
) -> Iterator[Document]:
    """The documents of a source, in a fixed order.

    Args:
        source, split: as for ``files_of``.
        skip_bad: count and skip what cannot be read, instead of raising.
        stats: receives the counts of documents, empty and bad ones.

    Raises:
        BadText: something cannot be read, and ``skip_bad`` is off.
        DataError: a place does not exist, or has no file of a known format.
    """
    stats = Stats() if stats is None else stats
    for file in files_of(source, split):
        for _, document in read(Span(file.path), source.text_column, skip_bad, stats):
            yield document
