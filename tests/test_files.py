"""Atomic writes of files and folders, and locks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from src.common import files
from src.common.files import atomic, locked, replace_folder, settle_folder, write_text


def test_atomic_write_is_complete_or_changes_nothing(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write_text(path, "ä")
    with pytest.raises(OSError, match="disk full"), atomic(path) as partial:
        partial.write_text("half")
        raise OSError("disk full")
    assert path.read_bytes() == "ä".encode() and [p.name for p in path.parent.iterdir()] == ["file.txt"]
    write_text(path, (part for part in ("a", "b")))
    assert path.read_text() == "ab"


@pytest.fixture
def disk(monkeypatch):
    """Records what is flushed to the disk and what is renamed, in order, by name."""
    done, fsync = [], os.fsync

    def recorded(descriptor):
        done.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def renaming(name):
        act = getattr(Path, name)
        return lambda path, target: done.append((name, path.name, Path(target).name)) or act(path, target)

    monkeypatch.setattr(os, "fsync", recorded)
    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, renaming(name))
    return done


def test_file_is_on_the_disk_before_its_name_and_then_the_name(tmp_path, disk):
    write_text(tmp_path / "new" / "x.txt", "a")
    assert disk == [("fsync", "x.txt.partial"), ("replace", "x.txt.partial", "x.txt"), ("fsync", "new")]


def test_name_of_a_replaced_folder_is_flushed_to_the_disk(tmp_path, disk):
    replace_folder(folder(tmp_path / "new", "new"), folder(tmp_path / "out", "old"))
    assert disk == [("rename", "out", ".out.replaced"), ("rename", "new", "out"), ("fsync", tmp_path.name)]


def test_lock_is_held_by_one_process(tmp_path):
    code = "from pathlib import Path\nfrom src.common.files import locked\n"
    code += f"with locked(Path({str(tmp_path / 'x')!r})): pass"
    with locked(tmp_path / "x"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode and "another process is writing" in done.stderr
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def folder(path, content):
    path.mkdir()
    (path / "file").write_text(content)
    return path


def test_folder_is_replaced_after_an_error_too(tmp_path, monkeypatch):
    old, new = folder(tmp_path / "out", "old"), folder(tmp_path / "new", "new")
    monkeypatch.setattr(files, "sync", lambda path: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        replace_folder(new, old)
    monkeypatch.undo()
    assert (old / "file").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["out"]
    replace_folder(folder(tmp_path / "newer", "newer"), old)
    assert (old / "file").read_text() == "newer" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_killed_replacement_is_settled(tmp_path):
    out = folder(tmp_path / "out", "old")
    out.rename(tmp_path / ".out.replaced")  # killed between the two renames
    settle_folder(out)
    assert (out / "file").read_text() == "old"
    folder(tmp_path / ".out.replaced", "older")  # killed after the second
    settle_folder(out)
    assert (out / "file").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_link_is_not_replaced(tmp_path):
    real, new = folder(tmp_path / "real", "old"), folder(tmp_path / "new", "new")
    (tmp_path / "out").symlink_to(real)
    with pytest.raises(ValueError, match=r"out is a link to .*real, so it is not replaced"):
        replace_folder(new, tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 3
