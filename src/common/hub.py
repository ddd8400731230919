"""Repositories of the Hugging Face Hub as local folders. Imports no torch."""

from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from src.common.errors import DataError, first_line


def snapshot(name: str, repo_type: str, patterns: Sequence[list[str]], is_complete: Callable[[Path], bool]) -> Path:
    """The folder of a repository: the cached one if it is complete, else a download.

    Args:
        name: of the repository, such as nyu-mll/glue.
        repo_type: ``model`` or ``dataset``.
        patterns: of the files to download; the next list is tried if the folder is not complete with the one before.
        is_complete: whether a folder has every file that is needed.

    Raises:
        DataError: it is not cached, and the hub is unreachable or lacks files.
    """
    reason = ""
    for wanted, cached_only in [(patterns[0], True), *((wanted, False) for wanted in patterns)]:
        options = {"repo_type": repo_type, "allow_patterns": wanted, "local_files_only": cached_only}
        try:
            folder = Path(snapshot_download(name, **options))
        except (OSError, ValueError) as error:
            reason = first_line(error)
            continue
        if is_complete(folder):
            return folder
        reason = "some of its files are missing"  # unreachable, the hub's client returns what is cached
    raise DataError(f"{name}: not cached, and not available from the Hugging Face Hub ({reason})")
