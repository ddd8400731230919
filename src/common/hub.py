"""Folders of the Hugging Face hub, from its local cache or from there. Imports no torch."""

import fnmatch
from collections.abc import Callable
from pathlib import Path

import huggingface_hub


def folder(name: str, repo_type: str, patterns: list[str], complete: Callable[[Path], bool]) -> Path:
    """A local folder with those files of a repository that match ``patterns``.

    Args:
        name: of the repository, such as nyu-mll/glue.
        repo_type: ``model`` or ``dataset``.
        patterns: of files; ``a|b`` takes the first of the two that the repository has.
        complete: whether a cached folder has all that is needed, so that the hub need not be asked.

    Raises:
        ValueError: it is neither cached nor to be had from the hub.
    """
    try:
        cached = Path(huggingface_hub.snapshot_download(name, repo_type=repo_type, local_files_only=True))
        if complete(cached):
            return cached
    except (OSError, ValueError):
        pass  # nothing is cached
    try:
        info = huggingface_hub.repo_info(name, repo_type=repo_type, timeout=10)  # offline this fails at once
        there = [file.rfilename for file in info.siblings or []]  # pyright: ignore[reportAttributeAccessIssue]
        wanted = []
        for pattern in patterns:
            choices = [choice for choice in pattern.split("|") if fnmatch.filter(there, choice)]
            wanted += choices[:1]
        return Path(huggingface_hub.snapshot_download(name, repo_type=repo_type, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: neither cached nor to be had from the hub ({str(error).splitlines()[0]})") from None
