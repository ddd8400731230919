"""Repositories of the Hugging Face Hub as local folders. Imports no torch."""

from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from src.common.errors import DataError, first_line


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
