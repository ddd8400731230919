"""From the places of a source to its files: each one is read, skipped with a reason (``reasons``), or refused.

One pass in a fixed order: places as given, folders sorted by name. Memory holds the names in one folder, and the links.
"""

import glob
import os
import re
import stat
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from src.common.errors import DataError
from src.common.hub import is_dataset
from src.convert import hub, mds, reasons, tables
from src.convert.files import SUFFIXES, File, form_of
from src.convert.hub import C4_SPLITS
from src.data.source import without_password

if TYPE_CHECKING:
    from src.convert.sources import TextSource

PART = r"\.part-\d+-of-\d+"
"""Suffix of the working folder of one machine of several."""


class Skipped(NamedTuple):
    """A file, or a folder with all in it, that is not read."""

    path: str
    reason: str
    """A constant of ``reasons``."""


Entries = Iterator[File | Skipped]


def is_local(path: str) -> bool:
    """Whether a place, or a file of a source, is on this machine's disks."""
    return not is_dataset(path) and "://" not in path


def fixed_part(place: str) -> str:
    """The existing folder at the beginning of a pattern, with any brackets in its name; or the place if it exists."""
    while not os.path.lexists(place) and glob.has_magic(place):
        place = os.path.dirname(place)
    return place


def expanded(place: str) -> list[str]:
    """The paths that match a pattern, sorted, without those inside another; the place itself if it is no pattern."""
    if os.path.lexists(place) or not glob.has_magic(place):
        return [place]
    folder = fixed_part(place)
    pattern = glob.escape(folder) + place[len(folder) :]
    paths = sorted({os.path.normpath(path) for path in glob.iglob(pattern, recursive=True)})
    if not paths:
        raise DataError(f"{place}: no file matches this pattern")
    folders = {path for path in paths if os.path.isdir(path)}
    return [path for path in paths if not folders.intersection(map(str, Path(path).parents))]


def is_c4_folder(place: str) -> bool:
    """Whether this folder holds C4's own files."""
    return any(_c4_files(Path(place), name) for name in C4_SPLITS.values())


def _c4_files(folder: Path, name: str) -> list[Path]:
    pattern = f"c4-{name}.*.json.gz"
    return list(folder.glob(pattern)) or list((folder / "en").glob(pattern))


def walk(source: "TextSource", split: str, skip_bad: bool, output: Path | None = None) -> Entries:
    """All files of a source.

    Args:
        split: ``train`` or ``val`` of C4; other sources have no splits.
        skip_bad: skip what is not fetched or unreadable, instead of raising.
        output: folder of the split that is written, which may lie inside a place.

    Raises:
        DataError: a place does not exist, has no file of a known format, or is named twice; a file is not fetched; a
            folder inside a place holds shards, or work of another conversion.
    """
    if not source.places:
        yield from hub.c4_files(split)
    places = [(place, expanded(place) if is_local(place) else []) for place in source.places]
    local, remote = _Walk(places, source, skip_bad, output), set[int]()
    for place, paths in places:
        if is_dataset(place):
            yield from _once(remote, hub.files(source, place))
        elif not is_local(place):
            files = _once(remote, hub.remote_files(place))
            yield from _checked(place, map(_remote_entry(place), files), skip_bad)
        else:
            yield from local.place(place, paths, split)


class _Walk:
    """State of the walk through local places."""

    def __init__(self, places: list[tuple[str, list[str]]], source: "TextSource", skip_bad: bool, output: Path | None):
        self.source, self.skip_bad = source, skip_bad
        self.output = None if output is None else os.path.realpath(output)
        self.roots: dict[str, str] = {}
        """Real paths of the places and of the folders that links lead to, with the paths that are read."""
        self.seen: set[int] = set()
        """Hashes that tell files with links or several names apart."""
        for place in (
            path for place, paths in places for path in paths if not any(map(self._is_ours, _way(place, path)))
        ):
            if not os.path.lexists(place):
                raise DataError(f"{place}: no such file or folder")
            if (real := os.path.realpath(place)) in self.roots:
                raise DataError(f"{self.roots[real]} and {place} are the same; name it once")
            self.roots[real] = place
        for real, place in self.roots.items():
            for parent in map(str, Path(real).parents):
                if parent in self.roots:
                    raise DataError(f"{place} lies in {self.roots[parent]}; name one of them")
            if self.output and Path(real).is_relative_to(self.output):
                raise DataError(f"{place} lies in {output}, which is written; choose another --out_root or split name")
        self.places = [Path(real) for real in self.roots]

    def place(self, place: str, paths: list[str], split: str) -> Entries:
        """The files of a place, which is one path or a pattern with several."""
        matched = set(paths)

        @cache
        def beside(folder: str) -> set[str]:
            names = set(os.listdir(folder or "."))
            return {name for name in names if _join(folder, name) in matched or name in reasons.DESCRIPTIONS}

        entries = (entry for path in paths for entry in self._match(place, path, split, beside))
        yield from _checked(place, entries, self.skip_bad)

    def _match(self, place: str, path: str, split: str, beside: Callable[[str], set[str]]) -> Entries:
        """A place, or one of the paths that match it, of which some are no source, as some entries of a folder."""
        way = _way(place, path)
        if any(map(self._is_ours, way)):
            return
        # Only a pattern that begins with a dot matches hidden names.
        looked = (name for name in way if not os.path.basename(name).startswith("."))
        if reason := next(filter(None, map(self._reason_of_name, looked)), None):
            yield Skipped(path, reason)
        else:
            yield from self._path(str(Path(path)), split, None if path == place else beside(os.path.dirname(path)))

    def _path(self, path: str, split: str, beside: set[str] | None) -> Entries:
        """A place; ``beside`` are the names in the folder of what a pattern matched, None for what is named itself."""
        real = os.path.realpath(path)
        if self.output and Path(self.output).is_relative_to(real):
            yield Skipped(_join(path, os.path.relpath(self.output, real)), reasons.OUTPUT)
        if not os.path.isdir(path):
            if os.path.exists(path) and not os.path.isfile(path):
                raise DataError(f"{path}: {reasons.SPECIAL}; write the text to a file")
            status = os.stat(path) if os.path.exists(path) else None
            yield from self._file(path, beside or set(), status, named=beside is None, top=True)
        elif is_c4_folder(path):
            yield from self._c4(path, split)
        elif _is_index(path, set(os.listdir(path))):
            yield from self._shards(path)
        else:
            yield from self._folder(path, real, top=True)

    def _folder(self, path: str, real: str, top: bool = False) -> Entries:
        try:
            beside = set(os.listdir(path))
        except PermissionError:
            yield self._skipped(path, reasons.DENIED)
            return
        if not top and _is_index(path, beside):
            parent = Path(path).parent
            splits = sorted(str(index.parent) for index in parent.glob("*/index.json"))[:5]
            raise DataError(f"{path}: a dataset of shards inside the source; name it itself ({', '.join(splits)})")
        if {"plan.json", "units"} <= beside:
            raise DataError(f"{path}: the unfinished work of a conversion; finish it, and name the split")
        if "dataset_dict.json" in beside and len(splits := tables.splits_of(Path(path))) > 1:
            names = ", ".join(_join(path, name) for name in splits)
            raise DataError(f"{path}: a DatasetDict; name one of its splits ({names})")
        if {"blobs", "refs", "snapshots"} <= beside and len(os.listdir(_join(path, "snapshots"))) > 1:
            raise DataError(f"{path}: several revisions of a dataset of the hub; name one of the folders in snapshots")
        if "state.json" in beside and (missing := sorted(reasons.saved_tables(Path(path)) - beside)):
            raise DataError(f"{_join(path, missing[0])} is missing; {_join(path, 'state.json')} names it")
        for name in sorted(beside):
            yield from self._entry(_join(path, name), os.path.join(real, name), beside)

    def _entry(self, path: str, real: str, beside: set[str]) -> Entries:
        """An entry of a folder with the names ``beside``; ``real`` is its path without links in its folders."""
        if self._is_ours(real):
            return
        if reason := self._reason_of_name(real):
            yield Skipped(path, reason)
            return
        try:
            status = os.stat(path)
        except PermissionError:
            yield self._skipped(path, reasons.DENIED)
            return
        except OSError:  # a link to nothing, or to itself
            status = None
        if status is None or stat.S_ISREG(status.st_mode):
            yield from self._file(path, beside, status)
        elif not stat.S_ISDIR(status.st_mode):
            yield Skipped(path, reasons.SPECIAL)
        elif os.path.islink(path):
            yield from self._linked_folder(path)
        elif real in self.roots:  # a link led to it before
            yield Skipped(path, reasons.LINKED)
        else:
            yield from self._folder(path, real)

    def _file(
        self, path: str, beside: set[str], status: os.stat_result | None, named: bool = False, top: bool = False
    ) -> Entries:
        """A file or a link to one; without a ``status``, a link to nothing. ``top``: a place, so not read before."""
        if status is None:
            yield self._skipped(path, reasons.of_link_to_nothing(path))
            return
        if reason := reasons.of_file(path, beside, status.st_size, self.source.text_column, named):
            yield self._skipped(path, reason)
            return
        link = os.path.islink(path)
        if link or status.st_nlink > 1:
            key = hash((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
            if key in self.seen or (link and not top and self._reads(os.path.realpath(path))):
                yield Skipped(path, reasons.LINKED)
                return
            self.seen.add(key)
        yield File(path, status.st_size, status.st_mtime_ns)

    def _linked_folder(self, path: str) -> Entries:
        real = os.path.realpath(path)
        if self._reads(real):
            yield Skipped(path, reasons.LINKED)
        elif any(place.is_relative_to(real) for place in self.places):
            yield Skipped(path, reasons.AROUND)
        else:
            self.roots[real] = path
            yield from self._folder(path, real)

    def _reads(self, real: str) -> bool:
        """Whether the walk comes to this file or folder without a link."""
        way = [real, *map(str, Path(real).parents)]
        root = next((number for number, path in enumerate(way) if path in self.roots), None)
        if root is None:
            return False
        skipped = (reasons.of_name(os.path.basename(path)) or self._is_ours(path) for path in way[:root])
        return root == 0 or (not any(skipped) and (os.path.isdir(real) or form_of(real) is not None))

    def _reason_of_name(self, real: str) -> str | None:
        return reasons.of_name(os.path.basename(real)) or (reasons.OUTPUT if self._is_output(real) else None)

    def _is_ours(self, real: str) -> bool:
        """Whether this is the split that is written, or a file or folder that helps to write it."""
        if self.output is None or not real.startswith(os.path.dirname(self.output)):
            return False
        parent, name = map(re.escape, os.path.split(self.output))
        return re.fullmatch(rf"{parent}/\.?{name}(\.partial|{PART})?(\.lock|\.replaced)?", real) is not None

    def _is_output(self, real: str) -> bool:
        """Whether this is another split in the folder that is written to."""
        if self.output is None or os.path.dirname(real) != os.path.dirname(self.output) or not os.path.isdir(real):
            return False
        return re.search(rf"(\.partial|{PART})$", real) is not None or _is_index(real, set(os.listdir(real)))

    def _skipped(self, path: str, reason: reasons.Reason) -> Skipped:
        """Raises a DataError if the reason is an error and ``skip_bad`` is off."""
        if reason[1] and not self.skip_bad:
            raise DataError(f"{path}: {reason[1]}")
        return Skipped(path, reason[0])

    def _c4(self, place: str, split: str) -> Entries:
        if len(self.places) > 1 or len(self.source.places) > 1:
            raise DataError(f"{place}: beside other places, name C4's files themselves: '{place}/c4-train.*.json.gz'")
        wanted = set(map(str, _c4_files(Path(place), C4_SPLITS[split])))
        if not wanted:
            raise DataError(f"{place}: C4's files of this split (c4-{C4_SPLITS[split]}.*) are missing")
        folder = str(Path(next(iter(wanted))).parent)
        for path in sorted({_join(parent, name) for parent in (place, folder) for name in os.listdir(parent)}):
            real = os.path.realpath(path)
            if path in wanted:
                yield from self._entry(path, real, set())
            elif path != folder and not (self.output and Path(self.output).is_relative_to(real)):
                if not self._is_ours(real):
                    yield Skipped(path, reasons.of_name(os.path.basename(path)) or reasons.NOT_C4)

    def _shards(self, place: str) -> Entries:
        """The shards of a split, in the order of its index; the uncompressed file if it exists."""
        folder = Path(place)
        paths = mds.files(folder, self.source.text_column)
        for path in paths:
            if not path.exists():
                raise DataError(f"{path} is missing; {folder / 'index.json'} names it")
            status = path.stat()
            yield File(str(path), status.st_size, status.st_mtime_ns)
        read = {path.relative_to(folder).parts[0] for path in paths}
        for name in sorted(set(os.listdir(folder)) - read - {"index.json"}):
            yield Skipped(str(folder / name), reasons.UNINDEXED)


def _checked(place: str, entries: Entries, skip_bad: bool) -> Entries:
    """The entries of a place; raises a DataError if all of them are skipped."""
    skipped, found = [], False
    for entry in entries:
        found = found or isinstance(entry, File)
        if isinstance(entry, Skipped) and len(skipped) < 3:
            skipped.append(f"{entry.path}: {entry.reason}")
        yield entry
    if not found and not (skip_bad and skipped):
        known = f"{', '.join(SUFFIXES)}, or a folder of MDS shards"
        message = "; skipped ".join([f"{place}: no file of a known format ({known})", *skipped])
        raise DataError(without_password(message))


def _once(seen: set[int], files: Iterator[File]) -> Iterator[File]:
    """The files; raises a DataError at one whose path has its hash in ``seen``, to which all are added."""
    for file in files:
        if hash(file.path) in seen:
            raise DataError(f"{without_password(file.path)} is in two of the places; name it once")
        seen.add(hash(file.path))
        yield file


def _remote_entry(place: str) -> Callable[[File], File | Skipped]:
    """What becomes of the files at a URL. Their content is not looked at."""
    given = set(place.split("/"))

    def entry(file: File) -> File | Skipped:
        found = [name for name in file.path.split("/") if name not in given]
        reason = next(filter(None, map(reasons.of_name, found)), None) or reasons.of_url(file.path, bool(found))
        return file if reason is None else Skipped(file.path, reason)

    return entry


def _way(place: str, path: str) -> list[str]:
    """What a pattern matches on the way to one of its paths, without links in the folders; empty for no pattern."""
    if path == place:
        return []
    folder = fixed_part(place)
    names = Path(os.path.relpath(path, folder)).parts
    return [os.path.join(os.path.realpath(folder), *names[:end]) for end in range(1, len(names) + 1)]


def _join(folder: str, name: str) -> str:
    return name if folder in ("", ".") else os.path.join(folder, name)


def _is_index(folder: str, beside: set[str]) -> bool:
    """Whether the folder with these names is a dataset of streaming, and not one with some other index.json."""
    if "index.json" not in beside:
        return False
    content = reasons.json_of((Path(folder) / "index.json").read_bytes())
    return isinstance(content, dict) and "shards" in content or any(name.startswith("shard.") for name in beside)
