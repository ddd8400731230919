"""A dataset by its place and its weight. Imports no torch, so that a run's config can hold it."""

import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """A dataset, alone or one of several that training mixes. Weight every one by ``proportion``, or any of them by
    ``repeat`` or ``choose`` (default: each sample once per epoch). Every draw of a sample is masked differently."""

    local: str | None = None
    """Folder of the dataset, or the cache if there is a remote. None: the run's ``data_local``."""
    remote: str | None = None
    """Path or object-store URI to stream from, into a ``local`` of its own. None: the run's ``data_remote`` if
    ``local`` is None too, else no streaming. Nor is there any if it is the same folder as ``local``."""
    split: str | None = None
    """Subfolder of the dataset. None: the loader's ``split``."""
    proportion: float | None = None
    """Share of an epoch's samples, relative to the others'. An epoch has as many samples as all datasets together."""
    repeat: float | None = None
    """Draws of each sample per epoch; 0.5 draws half of them, at random in each epoch."""
    choose: int | None = None
    """Samples drawn per epoch."""

    @property
    def folder(self) -> Path:
        """Folder of the split, with index.json; in the cache if there is one."""
        assert self.local is not None, "filled in by the config"
        return Path(self.local) / (self.split or "")

    @property
    def complete(self) -> bool:
        """Whether all shards are in ``folder``; else it is a cache that fills up. So they are if it is the remote's own
        folder, by whatever path."""
        if self.local is None or self.remote is None:
            return True
        ours, theirs = self.folder, os.path.join(self.remote, self.split or "")
        same = os.path.exists(ours) and os.path.exists(theirs) and os.path.samefile(ours, theirs)
        return same or os.path.realpath(ours) == os.path.realpath(theirs)

    @property
    def origin(self) -> str:
        """Where the split's files come from: its folder if it is complete, else the one in the remote."""
        if self.complete:
            return os.path.realpath(self.folder)
        remote = f"{str(self.remote).rstrip('/')}/{self.split or ''}".rstrip("/")
        return remote if "://" in remote else os.path.realpath(remote)


def real_folder(local: str | None, split: str | None) -> str:
    """The folder of a split, the same for every way to write it."""
    return os.path.realpath(os.path.join(local or "", split or ""))


def without_password(text: str) -> str:
    """A message in which no URI has a password or a query, which may be a signature.

    sftp://user:secret@host/data becomes sftp://user@host/data, and https://host/data?sig=secret https://host/data.
    """
    return re.sub(r"(://[^\s?]*)\?[^\s'\")]*", r"\1", re.sub(r"(://[^/\s:@]*):[^/\s]*@", r"\1@", text))
