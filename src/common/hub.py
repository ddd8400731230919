"""Repositories of the Hugging Face Hub as local folders, and its datasets as local files. Imports no torch."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from src.common.errors import DataError, first_line

HF = "hf:"
"""Prefix of a place that is a dataset of the hub: ``hf:OWNER/NAME``; not of the URLs ``hf://...``."""


def snapshot(name: str, repo_type: str, patterns: Sequence[list[str]], is_complete: Callable[[Path], bool]) -> Path:
    """Folder of a repository: from the cache if it is complete there, else downloaded.

    Args:
        name: of the repository, such as nyu-mll/glue.
        repo_type: ``model`` or ``dataset``.
        patterns: lists of file patterns to download; the next list is tried if files are missing after the one before.
        is_complete: whether a folder has all files.

    Raises:
        DataError: it is not cached, and the hub is unreachable or lacks files.
    """
    reason = ""
    for files, cached_only in [(patterns[0], True), *((files, False) for files in patterns)]:
        options = {"repo_type": repo_type, "allow_patterns": files, "local_files_only": cached_only}
        try:
            folder = Path(snapshot_download(name, **options))
        except Exception as error:  # OSError, ValueError, httpx.HTTPError and others, depending on the client's version
            reason = first_line(error)
            continue
        if is_complete(folder):
            return folder
        reason = "some of its files are missing"  # if the hub is unreachable, its client returns what is cached
    raise DataError(f"{name}: not cached, and not available from the Hugging Face Hub ({reason})")


def is_dataset(place: str) -> bool:
    """Whether a place or path is ``hf:OWNER/NAME``, and no URL ``hf://...``."""
    return place.startswith(HF) and not place.startswith(f"{HF}//")


def ask(dataset: str, hints: Mapping[str, str], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function of the hub's libraries; whatever it raises becomes a DataError about the dataset.

    Args:
        hints: what to do if the configuration or the split has to be named (``choice``), if it cannot be read
            (``form``), and if the hub is unreachable (``offline``).
    """
    try:
        return function(*args, **kwargs)
    except Exception as error:  # OSError, ValueError, httpx.HTTPError and others, depending on the client's version
        # datasets lists the configurations or splits on lines of their own, before an example in Python.
        message = " ".join(str(error).split("Example of usage")[0].split()) or first_line(error)
        about = f"{type(error).__name__} {message}"
        if re.search(r"(?i)config.*(missing|not found)|\bsplit", message):
            hint = hints["choice"]
        elif re.search(r"(?i)gated|\b40[134]\b|private|doesn't exist|not ?found", about):
            hint = "it does not exist, or needs `hf auth login` and its terms accepted on the hub"
        elif isinstance(error, ValueError | RuntimeError):  # such as a dataset with a loading script
            hint = hints["form"]
        else:
            message = f"the Hugging Face Hub is unreachable ({first_line(error)})"
            hint = hints["offline"]
        raise DataError(f"{dataset}: {message}; {hint}") from None


FORM = f"{HF}OWNER/NAME:SPLIT, or {HF}OWNER/NAME:CONFIGURATION:SPLIT"
HINTS = {
    "choice": f"choose with {FORM}",
    "form": "download its files and name them",
    "offline": "offline, name files of this machine",
}


FOUND: dict[str, list[str]] = {}
"""Files that ``dataset_files`` returned, by place. A run of finetune.py gets those of the plan, which made its key."""


def dataset_files(place: str) -> list[str]:
    """The local Arrow files of a split of a dataset of the hub, as ``FORM`` names it.

    They are those of FOUND; else those of the hub now, or if it is unreachable those that ``datasets`` cached before.

    Raises:
        DataError: there is no such dataset, configuration or split, or it can neither be read nor found in the cache.
    """
    if place in FOUND:
        return FOUND[place]
    match = re.fullmatch(rf"{HF}([^:]+)(?::([^:]+))?:([\w.-]+)", place)
    if match is None:
        raise DataError(f"{place}: expected {FORM}")
    from datasets import load_dataset  # takes seconds to import

    name, configuration, split = match.groups()
    dataset = ask(name, HINTS, load_dataset, name, configuration, split=split)
    FOUND[place] = [file["filename"] for file in dataset.cache_files]
    return FOUND[place]
