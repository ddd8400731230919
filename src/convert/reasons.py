"""Why a file of a source is not read: by its name, its status or its content.

Some of the reasons are errors unless --skip_bad is given, because text would be missing.
"""

import json
import os
import re
from collections.abc import Set
from pathlib import Path
from typing import Any

from src.convert.files import SUFFIXES, form_of, outer

HIDDEN = "hidden"
SYSTEM = "of the operating system or of another program"
UNKNOWN = "of no known format"
ARCHIVE = "an archive, unpack it"
METADATA = "describes data or a tokenizer"
SPECIAL = "no regular file"
LINKED = "a link or second name of what is read"
AROUND = "a link to a folder that contains the source"
OUTPUT = "output of a conversion"
UNINDEXED = "no data of its folder's index"
NOT_C4 = "not of this split of C4"
COPY = "a copy of what is beside it"
NO_TEXT = "a JSON object without the text"
NOT_FETCHED = "not fetched"
UNREADABLE = "unreadable"

DENIED = (UNREADABLE, "unreadable (permission denied)")

SYSTEM_NAMES = {"__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "lost+found"}
SYSTEM_NAMES |= {"@eadir", "_temporary", "_delta_log", "_spark_metadata"}

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tgz", ".tbz2", ".txz", ".7z", ".rar")

DESCRIPTIONS = set(
    "dataset_infos.json dataset_info.json dataset_dict.json state.json stats.json conversion.json files.jsonl "
    "config.json generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json "
    "vocab.json index.json".split()
)
"""Files that describe data, unless they hold a text."""

FETCH = {
    "annex/objects": "run git annex get",
    "dvc/cache": "run dvc pull",
    "blobs/": "download the dataset again, its blob is not in the cache",
}
"""How to fetch the target of a link, by a part of its path."""

POINTER = re.compile(rb"version https://git-lfs|(\.\./)*(\.git)?/?annex/objects/")
"""Beginning of a file of git-lfs or git-annex whose content is not there."""

POINTER_BYTES = 1024
DESCRIPTION_BYTES = 16 << 20
"""Largest file that is read whole to see whether it is one JSON object."""

Reason = tuple[str, str]
"""One of the constants above, and the message of the error; empty if skipping the file is no error."""


def of_name(name: str) -> str | None:
    """Why a file or folder is not looked at, or None."""
    if name.startswith("."):
        return HIDDEN
    return SYSTEM if name.lower() in SYSTEM_NAMES else None


def of_link_to_nothing(path: str) -> Reason:
    """Why a link is not read whose target does not exist. A name without a suffix may be that of a folder of text."""
    if form_of(path) is None and "." in os.path.basename(path):
        return UNKNOWN, ""
    target = os.readlink(path)
    how = next((how for part, how in FETCH.items() if part in target), "fetch it, or remove the link")
    return NOT_FETCHED, f"a link to {target}, which does not exist; {how}"


def of_file(path: str, beside: Set[str], size: int, text_column: str, named: bool) -> Reason | None:
    """Why a file is not read, or None.

    Args:
        beside: names in its folder.
        named: the user named this file, so only what is no text at all is a reason.
    """
    name = os.path.basename(path).lower()
    if form_of(name) is None:
        data = os.path.basename(path).removesuffix(".dvc")
        if name.endswith(".dvc") and data not in beside and (form_of(data) or "." not in data):
            return NOT_FETCHED, f"{data} is not fetched; run dvc pull {path}"
        return of_format(name), ""
    if not os.access(path, os.R_OK):
        return DENIED
    if size < POINTER_BYTES and (pointer := POINTER.match(_head(path, POINTER_BYTES))):
        how = "git lfs pull" if pointer[0].startswith(b"version") else f"git annex get {path}"
        return NOT_FETCHED, f"a pointer to content that is not fetched; run {how}"
    if named:
        return None
    if name in ("vocab.txt", "merges.txt") and beside & {"tokenizer.json", "tokenizer_config.json"}:
        return METADATA, ""
    unpacked, suffix = os.path.splitext(os.path.basename(path))
    if unpacked in beside and suffix.lower() not in SUFFIXES:  # so it names a compression
        return COPY, f"beside it lies {unpacked}, as gunzip -k or a stopped gunzip leaves it; remove one, or name one"
    if name.endswith(".arrow"):
        listed = saved_tables(Path(path).parent) if "state.json" in beside else set()
        if listed and os.path.basename(path) not in listed:
            return UNINDEXED, ""
        if name.startswith("cache-") and "dataset_info.json" in beside:  # of map() and filter(), in datasets' own cache
            return COPY, ""
    return _of_json(path, name, size, text_column) if name.endswith((".json", ".jsonl")) and size else None


def of_format(name: str) -> str:
    """Why a file of no known format is not read."""
    return ARCHIVE if name.lower().endswith(ARCHIVES) else UNKNOWN


def of_url(path: str, found: bool) -> str | None:
    """Why a file at a URL, ``found`` in a folder or by a pattern, is not read, or None."""
    if form_of(path) is None:
        return of_format(path)
    return METADATA if found and path.rsplit("/", 1)[1] in DESCRIPTIONS else None


def saved_tables(folder: Path) -> set[str]:
    """The files that the state.json of ``Dataset.save_to_disk`` lists; none if it is another state.json."""
    state = json_of((folder / "state.json").read_bytes())
    files = state.get("_data_files") if isinstance(state, dict) else None
    if not isinstance(files, list) or not all(isinstance(file, dict) and "filename" in file for file in files):
        return set()
    return {file["filename"] for file in files}


def _of_json(path: str, name: str, size: int, text_column: str) -> Reason | None:
    first = _head(path, 1 << 16).split(b"\n", 1)[0]
    content = line = json_of(first)
    if line is None and name.endswith(".json") and first.startswith(b"{") and size <= DESCRIPTION_BYTES:
        content = json_of(Path(path).read_bytes())
    if isinstance(content, dict):
        if name == "dropped.jsonl" and {"reason", "place"} <= content.keys():
            return OUTPUT, ""
        if isinstance(content.get(outer(text_column, content)), str | dict):
            return None
    if name in DESCRIPTIONS:
        return METADATA, ""
    if line is not None or not isinstance(content, dict):
        return None
    folder = os.path.join(os.path.dirname(path), "")
    return NO_TEXT, (
        f"one JSON object without {text_column!r} (it has {', '.join(list(content)[:9])}); give the --text_column, or "
        f"leave the file out by a pattern such as '{folder}*.jsonl'"
    )


def _head(path: str, size: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(size).removeprefix(b"\xef\xbb\xbf").lstrip()


def json_of(text: bytes) -> Any:
    """The value of a JSON text; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
