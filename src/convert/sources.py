"""Sources of text: C4 on the hub, C4's own files, or your files (in the forms of ``forms``), one document at a time.

A source is a sequence of files. A unit of work is a list of ``Span``, parts of files.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from src.common.errors import DataError
from src.convert import hub
from src.convert.forms import SUFFIXES, Document, File, Span, read, spans_of
from src.convert.hub import C4_SPLITS
from src.convert.stats import Stats


def is_c4_folder(source: str) -> bool:
    """Whether this folder holds C4's own files."""
    return any(_c4_files(source, name) for name in C4_SPLITS.values())


def _c4_files(source: str, name: str) -> list[Path]:
    folder, pattern = Path(source), f"c4-{name}.*.json.gz"
    return sorted(folder.glob(pattern)) or sorted((folder / "en").glob(pattern))


def files_of(source: str | None, split: str = "train") -> Iterator[File]:
    """The files of a source in a fixed order. Memory holds the names of one folder at a time.

    Args:
        source: a file, or a folder (read with its subfolders, sorted by name), or None for C4 on the hub.
        split: ``train`` or ``val`` of C4; other sources have no splits.

    Raises:
        DataError: the source does not exist, or has no file of a known format.
    """
    if source is None:
        revision = hub.revision()
        for number in range(hub.dataset(split, revision).num_shards):
            yield File(f"{hub.PREFIX}{split}@{revision}#{number}", 1 << 30, 0)
        return
    if is_c4_folder(source):
        paths: Iterable[Path] = _c4_files(source, C4_SPLITS[split])
        if not paths:
            raise DataError(f"{source}: C4's files of this split (c4-{C4_SPLITS[split]}.*) are missing")
    elif not Path(source).exists():
        raise DataError(f"{source}: no such file or folder")
    elif (Path(source) / "index.json").is_file():
        paths = _mds_files(Path(source))
    else:
        paths = [Path(source)] if Path(source).is_file() else _walk(Path(source))
        paths = (path for path in paths if path.name.endswith(SUFFIXES))
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


def _mds_files(folder: Path) -> list[Path]:
    """The shards of a split, in the order of its index; the uncompressed file if it exists."""
    try:
        shards = json.loads((folder / "index.json").read_text())["shards"]
        raw = [folder / shard["raw_data"]["basename"] for shard in shards]
        stored = [folder / (shard["zip_data"] or shard["raw_data"])["basename"] for shard in shards]
        columns = {name for shard in shards for name in shard["column_names"]}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / 'index.json'} is not an index of MDS shards ({error!r})") from None
    if "text" not in columns:
        raise DataError(f"{folder}: the shards have no column 'text' ({', '.join(sorted(columns))})")
    outside = [path for path in (*raw, *stored) if path.parent != folder or path.name in ("", "..")]
    if outside:
        raise DataError(f"{folder / 'index.json'} names {outside[0]}, outside its folder")
    return [a if a.exists() else b for a, b in zip(raw, stored, strict=True)]


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
    source: str | None = None, split: str = "train", skip_bad: bool = False, stats: Stats | None = None
) -> Iterator[Document]:
    """The documents of a source, in a fixed order.

    Args:
        source, split: as for ``files_of``.
        skip_bad: count and skip what cannot be read, instead of raising.
        stats: receives the counts of documents, empty and bad ones.

    Raises:
        BadText: something cannot be read, and ``skip_bad`` is off.
        DataError: the source does not exist, or has no file of a known format.
    """
    stats = Stats() if stats is None else stats
    for file in files_of(source, split):
        for _, document in read(Span(file.path), skip_bad, stats):
            yield document
