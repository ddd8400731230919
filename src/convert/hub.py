"""Datasets of the Hugging Face Hub, streamed by ``datasets``, and files at URLs that fsspec can open."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode

import fsspec
from fsspec.registry import known_implementations

from src.common.errors import DataError, first_line
from src.common.hub import HF, ask
from src.convert.files import File
from src.data.source import without_password

if TYPE_CHECKING:
    from src.convert.sources import TextSource

HINTS = {
    "choice": "choose with --name and --split",
    "form": "download its files and give them as --source",
    "offline": "offline, give a --source of files",
}
"""What to do when a dataset cannot be read."""

C4_SPLITS = {"train": "train", "val": "validation"}
"""Our names of C4's splits, and C4's names."""

CHANGES = ("ETag", "etag", "blob_id", "mtime", "LastModified", "last_modified", "updated", "created")
"""What file systems tell of a file and changes with it."""


def c4_files(split: str) -> Iterator[File]:
    """C4 on the hub; ``split`` is a key of C4_SPLITS."""
    return _parts("allenai/c4", "en", C4_SPLITS[split])


def files(source: TextSource, place: str) -> Iterator[File]:
    """The parts of the dataset ``hf:OWNER/NAME``, of the configuration and split that ``source`` names.

    Raises:
        DataError: there is no such dataset, configuration or split, or it cannot be read, or the hub is unreachable.
    """
    return _parts(place.removeprefix(HF), source.name, source.split)


def _parts(dataset: str, name: str | None, split: str | None) -> Iterator[File]:
    current = revision(dataset)
    if split is None:
        splits = sorted(load(dataset, current, name, None))
        if len(splits) > 1:
            raise DataError(f"{dataset}: --split names one of its splits: {', '.join(splits)}")
        split = splits[0]
    query = urlencode({"name": name or "", "split": split}, safe="/")
    for number in range(load(dataset, current, name, split).num_shards):
        yield File(f"{HF}{dataset}@{current}?{query}#{number}", 1 << 30, 0)


@cache
def revision(dataset: str) -> str:
    """The commit of a dataset at the first call; the whole process reads that one."""
    import huggingface_hub

    return str(ask(dataset, HINTS, huggingface_hub.dataset_info, dataset).sha)


@cache
def load(dataset: str, revision: str, name: str | None, split: str | None) -> Any:
    from datasets import load_dataset  # takes seconds to import

    return ask(dataset, HINTS, load_dataset, dataset, name, split=split, streaming=True, revision=revision)


def rows(path: str) -> Iterator[tuple[str, Any]]:
    """The rows of one part of a dataset."""
    dataset, commit, query, number = re.fullmatch(rf"{HF}(.*)@(.*)\?(.*)#(\d+)", path).groups()  # pyright: ignore
    choice = parse_qs(query)
    streamed = load(dataset, commit, choice.get("name", [None])[0], choice["split"][0])
    iterator = enumerate(streamed.shard(num_shards=streamed.num_shards, index=int(number)), start=1)
    while item := ask(dataset, HINTS, next, iterator, None):
        yield f"{path}:{item[0]}", item[1]


def remote_files(place: str) -> Iterator[File]:
    """The files that a URL names: a file, a folder with its subfolders, or a pattern; sorted. Their paths are URLs.

    Raises:
        DataError: there are none, or a package for this kind of URL is not installed, or it cannot be read.
    """
    try:
        system, path = fsspec.url_to_fs(place)
        if any(character in path for character in "*["):
            found = system.glob(path, detail=True)
        elif system.isdir(path):
            found = system.find(path, detail=True)
        else:
            found = {path: system.info(path)}
        infos = {system.unstrip_protocol(name): info for name, info in found.items() if info["type"] != "directory"}
    except ImportError as error:
        package = str(known_implementations.get(place.split(":")[0], {}).get("class", "")).split(".")[0]
        raise DataError(f"{place}: {first_line(error)} (pip install {package or 'its package'})") from None
    except Exception as error:  # each file system has its own
        raise DataError(without_password(f"{place}: {type(error).__name__}: {first_line(error)}")) from None
    if not infos:
        raise DataError(f"{without_password(place)}: no file")
    for path, info in sorted(infos.items()):
        changed = next((str(info[key]) for key in CHANGES if info.get(key)), 0)
        yield File(path, info.get("size") or 0, changed)
