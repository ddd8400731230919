"""C4 on the Hugging Face Hub, streamed by ``datasets``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from src.common.errors import DataError, first_line

if TYPE_CHECKING:
    from src.convert.forms import File
    from src.convert.sources import TextSource

HF = "hf:"
"""Prefix of a place that is a dataset of the hub: ``hf:OWNER/NAME``; not of the URLs ``hf://...``."""

C4_SPLITS = {"train": "train", "val": "validation"}
"""Our names of C4's splits, and C4's names."""

PREFIX = "hub:"
"""Prefix of a path on the hub: ``hub:split@revision#number``."""


@cache
def revision() -> str:
    import huggingface_hub

    return str(_ask(huggingface_hub.dataset_info, "allenai/c4").sha)


@cache
def dataset(split: str, revision: str) -> Any:
    from datasets import load_dataset  # takes seconds to import

    return _ask(load_dataset, "allenai/c4", "en", split=C4_SPLITS[split], streaming=True, revision=revision)


def _ask(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except Exception as error:  # OSError, ValueError, httpx.HTTPError and others, depending on the client's version
        message = f"the Hugging Face Hub is unreachable ({first_line(error)}); offline, give a --source of files"
        raise DataError(f"allenai/c4: {message}") from None


def is_dataset(place: str) -> bool:
    """Whether a place is ``hf:OWNER/NAME``, and no URL ``hf://...``."""
    return place.startswith(HF) and not place.startswith(f"{HF}//")


def files(source: TextSource, place: str) -> Iterator[File]:
    """The files of the dataset ``hf:OWNER/NAME``, of the configuration and split of ``source``."""
    raise DataError(f"{place}: datasets of the hub are not supported yet; download the files")


def remote_files(place: str) -> Iterator[File]:
    """The files that a URL names: a file, a folder or a pattern. Their paths are URLs."""
    raise DataError(f"{place}: URLs are not supported yet; download the files")


def rows(path: str) -> Iterator[tuple[str, Any]]:
    name, number = path.removeprefix(PREFIX).split("#")
    streamed = dataset(*name.split("@"))
    for row_number, row in enumerate(streamed.shard(num_shards=streamed.num_shards, index=int(number)), start=1):
        yield f"{path}:{row_number}", row
