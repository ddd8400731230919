"""From the places of a source to its files: each one is read, skipped with a reason, or refused.

One pass in a fixed order: places as given, folders sorted by name. Memory holds the names in one folder, and the links.
"""

import glob
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from src.common.errors import DataError
from src.convert import hub, mds, tables
from src.convert.files import SUFFIXES, File, form_of
from src.convert.hub import C4_SPLITS

if TYPE_CHECKING:
    from src.convert.sources import TextSource


class Skipped(NamedTuple):
    """A file, or a folder with all in it, that is not read."""

    path: str
    reason: str
    """One of the constants below."""


HIDDEN = "hidden"
SYSTEM = "of the operating system or of another program"
UNKNOWN = "of no known format"
ARCHIVE = "an archive, unpack it"
METADATA = "describes data or a tokenizer"
NO_TEXT = "a JSON object without the text"
SPECIAL = "no regular file"
LINKED = "a link or second name of what is read"
AROUND = "a link to a folder that contains the source"
OUTPUT = "output of a conversion"
UNINDEXED = "not listed in its folder's index"
NOT_C4 = "not of this split of C4"
NOT_FETCHED = "not fetched"
UNREADABLE = "unreadable"
"""The last two, and NO_TEXT, with ``skip_bad`` only; otherwise they are errors."""

SYSTEM_NAMES = {"__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "lost+found"}
SYSTEM_NAMES |= {"@eadir", "_temporary", "_delta_log", "_spark_metadata"}

ARCHIVES = tuple(".zip .tar .tgz .tbz2 .txz .7z .rar".split()) + tuple(f".tar.{c}" for c in ("gz", "bz2", "xz", "zst"))

DESCRIPTIONS = set(
    "dataset_infos.json dataset_info.json dataset_dict.json state.json stats.json conversion.json files.jsonl "
    "config.json generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json "
    "vocab.json index.json".split()
)
"""Files that describe data, unless they hold a text."""

POINTER = re.compile(rb"version https://git-lfs|(\.\./)*(\.git)?/?annex/objects/")
"""Beginning of a file of git-lfs or git-annex whose content is not there."""

POINTER_BYTES = 1024
DESCRIPTION_BYTES = 16 << 20
"""Largest file that is read whole to see whether it is one JSON object."""


def is_local(path: str) -> bool:
    """Whether a place, or a file of a source, is on this machine's disks."""
    return not hub.is_dataset(path) and "://" not in path


def is_known(path: str) -> bool:
    """Whether the name has the suffix of a form of text."""
    return form_of(path) is not None and not path.lower().endswith(ARCHIVES)


def expanded(place: str) -> list[str]:
    """The paths that match a pattern, sorted, without those inside another; the place itself if it is no pattern."""
    if os.path.lexists(place) or not glob.has_magic(place):
        return [place]
    paths = sorted(os.path.normpath(path) for path in glob.iglob(place, recursive=True))
    if not paths:
        raise DataError(f"{place}: no file matches this pattern")
    folders = {path for path in paths if os.path.isdir(path)}
    return [path for path in dict.fromkeys(paths) if not folders.intersection(map(str, Path(path).parents))]


def is_c4_folder(place: str) -> bool:
    """Whether this folder holds C4's own files."""
    return any(_c4_files(Path(place), name) for name in C4_SPLITS.values())


def _c4_files(folder: Path, name: str) -> list[Path]:
    pattern = f"c4-{name}.*.json.gz"
    return list(folder.glob(pattern)) or list((folder / "en").glob(pattern))


def walk(source: "TextSource", split: str, skip_bad: bool, output: Path | None = None) -> Iterator[File | Skipped]:
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
    local = _Walk([path for _, paths in places for path in paths], source.text_column, skip_bad, output)
    for place, paths in places:
        if hub.is_dataset(place):
            yield from hub.files(source, place)
        elif not is_local(place):
            yield from hub.remote_files(place)
        else:
            yield from local.place(place, paths, split)


class _Walk:
    """State of the walk through local places."""

    def __init__(self, places: list[str], text_column: str, skip_bad: bool, output: Path | None):
        self.text_column, self.skip_bad = text_column, skip_bad
        self.output = None if output is None else os.path.realpath(output)
        self.alone = len(places) == 1
        self.roots: dict[str, str] = {}
        """Real paths of the places and of the folders that links lead to, with the paths that are read."""
        self.seen: set[Any] = set()
        """Targets of links to files outside the roots, and files with several names."""
        for place in places:
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
        self.places = set(self.roots)

    def place(self, place: str, paths: list[str], split: str) -> Iterator[File | Skipped]:
        """The files of a place, which is one path or a pattern with several."""
        skipped, found = [], False
        for path in paths:
            for entry in self._path(str(Path(path)), split, named=path == place):
                found = found or isinstance(entry, File)
                if isinstance(entry, Skipped) and len(skipped) < 3:
                    skipped.append(f"{entry.path}: {entry.reason}")
                yield entry
        if not found and not (self.skip_bad and skipped):
            known = f"{', '.join(SUFFIXES)}, or a folder of MDS shards"
            raise DataError("; skipped ".join([f"{place}: no file of a known format ({known})", *skipped]))

    def _path(self, path: str, split: str, named: bool) -> Iterator[File | Skipped]:
        real = os.path.realpath(path)
        if self.output and Path(self.output).is_relative_to(real):
            yield Skipped(_join(path, os.path.relpath(self.output, real)), OUTPUT)
        if not os.path.isdir(path):
            if os.path.exists(path) and not os.path.isfile(path):
                raise DataError(f"{path}: {SPECIAL}; write the text to a file")
            yield from self._file(path, set(), os.stat(path) if os.path.exists(path) else None, not named, top=True)
        elif is_c4_folder(path):
            yield from self._c4(path, split)
        elif _is_index(path, set(os.listdir(path))):
            yield from self._shards(path)
        else:
            yield from self._folder(path, real, top=True)

    def _folder(self, path: str, real: str, top: bool = False) -> Iterator[File | Skipped]:
        try:
            names = sorted(os.listdir(path))
        except PermissionError:
            yield from self._fault(path, UNREADABLE, "the folder is unreadable (permission denied)")
            return
        beside = set(names)
        if not top:
            self._refuse_shards(path, beside)
        if {"plan.json", "units"} <= beside:
            raise DataError(f"{path}: the unfinished work of a conversion; finish it, and name the split")
        if "dataset_dict.json" in beside and len(splits := tables.splits_of(Path(path))) > 1:
            names = ", ".join(_join(path, name) for name in splits)
            raise DataError(f"{path}: a DatasetDict; name one of its splits ({names})")
        for name in names:
            yield from self._entry(_join(path, name), real, beside)

    def _refuse_shards(self, path: str, beside: set[str]) -> None:
        if _is_index(path, beside):
            parent = os.path.dirname(path)
            folders = [_join(parent, name) for name in sorted(os.listdir(parent))]
            splits = [folder for folder in folders if os.path.isfile(os.path.join(folder, "index.json"))]
            raise DataError(f"{path}: a dataset of shards inside the source; name it itself ({', '.join(splits[:5])})")

    def _entry(self, path: str, folder: str, beside: set[str]) -> Iterator[File | Skipped]:
        """An entry of a folder with the real path ``folder`` and the names ``beside``."""
        name = os.path.basename(path)
        real = os.path.join(folder, name)
        if self._is_ours(real):
            return
        if reason := _reason_of_name(name) or (OUTPUT if self._is_output(real) else None):
            yield Skipped(path, reason)
            return
        try:
            status = os.stat(path)
        except PermissionError:
            yield from self._fault(path, UNREADABLE, "unreadable (permission denied)")
            return
        except OSError:  # a link to nothing, or to itself
            if is_known(name) or "." not in name:
                yield from self._file(path, beside, None)
            else:
                yield Skipped(path, UNKNOWN)
            return
        if stat.S_ISDIR(status.st_mode):
            yield from self._linked_folder(path) if os.path.islink(path) else self._own_folder(path, real)
        elif stat.S_ISREG(status.st_mode):
            yield from self._file(path, beside, status)
        else:
            yield Skipped(path, SPECIAL)

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

    def _own_folder(self, path: str, real: str) -> Iterator[File | Skipped]:
        if real in self.roots:  # a link led to it before
            yield Skipped(path, LINKED)
        else:
            yield from self._folder(path, real)

    def _linked_folder(self, path: str) -> Iterator[File | Skipped]:
        real = os.path.realpath(path)
        if any(Path(place).is_relative_to(real) for place in self.places) and real not in self.places:
            yield Skipped(path, AROUND)
        elif self._reads(real):
            yield Skipped(path, LINKED)
        else:
            self.roots[real] = path
            yield from self._folder(path, real)

    def _reads(self, real: str) -> bool:
        """Whether the walk comes to this file or folder without a link."""
        if real in self.roots:
            return True
        parents = [str(parent) for parent in Path(real).parents]
        root = next((parent for parent in parents if parent in self.roots), None)
        if root is None:
            return False
        between = [real, *parents[: parents.index(root)]]
        if any(_reason_of_name(os.path.basename(path)) or self._is_ours(path) for path in between):
            return False
        return os.path.isdir(real) or is_known(real)

    def _file(
        self, path: str, beside: set[str], status: os.stat_result | None, judged: bool = True, top: bool = False
    ) -> Iterator[File | Skipped]:
        """A file or a link to one; without a ``status``, a link to nothing. ``judged``: not if the user named it."""
        name = os.path.basename(path)
        if status is None:
            target = os.readlink(path)
            how = next((how for part, how in FETCH.items() if part in target), "fetch it, or remove the link")
            yield from self._fault(path, NOT_FETCHED, f"a link to {target}, which does not exist; {how}")
            return
        if not is_known(name):
            if name.endswith(".dvc") and (data := name.removesuffix(".dvc")) not in beside:
                if is_known(data) or "." not in data:
                    yield from self._fault(path, NOT_FETCHED, f"{data} is not fetched; run dvc pull {path}")
                    return
            yield Skipped(path, ARCHIVE if name.lower().endswith(ARCHIVES) else UNKNOWN)
            return
        if not os.access(path, os.R_OK):
            yield from self._fault(path, UNREADABLE, "unreadable (permission denied)")
            return
        if status.st_size < POINTER_BYTES and (pointer := POINTER.match(_head(path))):
            how = "git lfs pull" if pointer[0].startswith(b"version") else f"git annex get {path}"
            yield from self._fault(path, NOT_FETCHED, f"a pointer to content that is not fetched; run {how}")
            return
        if judged and (reason := self._no_text(path, beside, status.st_size)):
            yield Skipped(path, reason)
            return
        if not top and (status.st_nlink > 1 or os.path.islink(path)):
            real = os.path.realpath(path)
            keys = {real, (status.st_dev, status.st_ino, status.st_mtime_ns)}
            if keys & self.seen or (os.path.islink(path) and self._reads(real)):
                yield Skipped(path, LINKED)
                return
            self.seen |= keys
        yield File(path, status.st_size, status.st_mtime_ns)

    def _no_text(self, path: str, beside: set[str], size: int) -> str | None:
        """Why a file of a known suffix holds no text, or None.

        Raises:
            DataError: it is one JSON object without the text, of an unknown purpose.
        """
        folder, name = os.path.dirname(path), os.path.basename(path).lower()
        if name in ("vocab.txt", "merges.txt") and beside & {"tokenizer.json", "tokenizer_config.json"}:
            return METADATA
        if name.endswith(".arrow") and "state.json" in beside:
            state = _json((Path(folder) / "state.json").read_bytes())
            files = state.get("_data_files") if isinstance(state, dict) else None
            listed = {file.get("filename") for file in files or []}
            return UNINDEXED if listed and os.path.basename(path) not in listed else None
        if not name.endswith((".json", ".jsonl")) or not size:
            return None
        first = _head(path, 1 << 16).split(b"\n", 1)[0]
        content = line = _json(first)
        if line is None and name.endswith(".json") and first.startswith(b"{") and size <= DESCRIPTION_BYTES:
            content = _json(Path(path).read_bytes())
        if not isinstance(content, dict):
            return METADATA if name in DESCRIPTIONS else None
        if name == "dropped.jsonl" and {"reason", "place"} <= content.keys():
            return OUTPUT
        column = self.text_column if self.text_column in content else self.text_column.split(".")[0]
        if isinstance(content.get(column), str | dict):
            return None
        if name in DESCRIPTIONS:
            return METADATA
        if line is None and not self.skip_bad:
            raise DataError(
                f"{path}: one JSON object without {self.text_column!r} (it has {', '.join(list(content)[:9])}); "
                f"give the --text_column, or leave it out by a pattern such as '{_join(folder, '*.jsonl')}'"
            )
        return NO_TEXT if line is None else None

    def _fault(self, path: str, reason: str, message: str) -> Iterator[Skipped]:
        if not self.skip_bad:
            raise DataError(f"{path}: {message}")
        yield Skipped(path, reason)

    def _c4(self, place: str, split: str) -> Iterator[File | Skipped]:
        if not self.alone:
            raise DataError(f"{place}: beside other places, name C4's files themselves: '{place}/c4-train.*.json.gz'")
        wanted = set(map(str, _c4_files(Path(place), C4_SPLITS[split])))
        if not wanted:
            raise DataError(f"{place}: C4's files of this split (c4-{C4_SPLITS[split]}.*) are missing")
        folder = str(Path(next(iter(wanted))).parent)
        for path in sorted({_join(parent, name) for parent in (place, folder) for name in os.listdir(parent)}):
            real = os.path.realpath(path)
            if path in wanted:
                yield from self._entry(path, os.path.realpath(folder), set())
            elif path == folder or self._is_ours(real) or (self.output and Path(self.output).is_relative_to(real)):
                continue
            else:
                yield Skipped(path, _reason_of_name(os.path.basename(path)) or NOT_C4)

    def _shards(self, place: str) -> Iterator[File | Skipped]:
        """The shards of a split, in the order of its index; the uncompressed file if it exists."""
        folder = Path(place)
        paths = mds.files(folder, self.text_column)
        for path in paths:
            if not path.exists():
                raise DataError(f"{path} is missing; {folder / 'index.json'} names it")
            status = path.stat()
            yield File(str(path), status.st_size, status.st_mtime_ns)
        read = {path.relative_to(folder).parts[0] for path in paths}
        for name in sorted(set(os.listdir(folder)) - read - {"index.json"}):
            yield Skipped(str(folder / name), UNINDEXED)


FETCH = {
    "annex/objects": "run git annex get",
    "dvc/cache": "run dvc pull",
    "blobs/": "download the dataset again, its blob is not in the cache",
}
"""How to fetch the target of a link, by a part of its path."""


PART = r"\.part-\d+-of-\d+"
"""Suffix of the working folder of one machine of several."""


def _join(folder: str, name: str) -> str:
    return name if folder in ("", ".") else os.path.join(folder, name)


def _reason_of_name(name: str) -> str | None:
    if name.startswith("."):
        return HIDDEN
    return SYSTEM if name.lower() in SYSTEM_NAMES else None


def _is_index(folder: str, beside: set[str]) -> bool:
    """Whether the folder with these names is a dataset of streaming, and not one with some other index.json."""
    if "index.json" not in beside:
        return False
    content = _json((Path(folder) / "index.json").read_bytes())
    return isinstance(content, dict) and "shards" in content or any(name.startswith("shard.") for name in beside)


def _head(path: str, size: int = POINTER_BYTES) -> bytes:
    with open(path, "rb") as file:
        return file.read(size).removeprefix(b"\xef\xbb\xbf").lstrip()


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
