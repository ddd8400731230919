"""Records in /dev/shm, where everybody may write: one that is not this user's, or broken, changes and stops nothing.

Killed and live owners are in test_resume.py. ``SHARED`` is a folder of the test.
"""

import contextlib
import json
import os
from pathlib import Path
from tempfile import gettempdir

import pytest

from src.common.errors import DataError
from src.data import shared_memory, streaming
from src.data.streaming import alone_on_node


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """Segments of the prefixes 7 and 9, and lock files; the record of 9 is sound, and its run is dead."""
    monkeypatch.setattr(shared_memory, "SHARED", tmp_path / "shm")
    for folder in ("shm", "locks"):
        (tmp_path / folder).mkdir()
    for prefix in (7, 9):
        for name in ("shm/{}_locals", "shm/{}_epoch_data", "locks/{}_barrier_filelock", "locks/{}_cache_filelock"):
            (tmp_path / name.format(f"{prefix:06}")).touch()
    (tmp_path / "shm" / "000009_owner").write_text(json.dumps(record(tmp_path, 9)))
    return tmp_path / "shm"


def record(tmp_path, prefix):
    return {"locks": str(tmp_path / "locks"), "locals": (tmp_path / "shm" / f"{prefix:06}_locals").stat().st_ino}


def left(tmp_path):
    return {path.name for path in tmp_path.rglob("*") if path.name[:6].isdigit()}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "\0" * 20,
        "\udcff",
        "null",
        "5",
        "[]",
        "[" * 100_000,
        "{}",
        '{"locks": "."}',
        '{"locks": null, "locals": 1}',
        '{"locks": ["."], "locals": 1}',
        '{"locks": ".", "locals": "1"}',
        '{"locks": ".", "locals": true}',
        '{"locks": "\\u0000", "locals": 1}',
    ],
)
def test_broken_record_is_skipped_with_a_warning(content, shared, tmp_path, caplog):
    (shared / "000007_owner").write_text(content, errors="surrogateescape")
    before = left(tmp_path)
    assert shared_memory.remove_stale_shared_memory() == [9]
    assert left(tmp_path) == {name for name in before if not name.startswith("000009")}
    assert f"{shared}/000007_owner is no record of a run's shared memory; delete it" in caplog.text


def link(path, tmp_path):
    (tmp_path / "elsewhere").write_text(json.dumps(record(tmp_path, 7)))
    path.symlink_to(tmp_path / "elsewhere")


OTHERS = [
    link,
    lambda path, _: path.symlink_to("/nowhere"),
    lambda path, _: os.mkfifo(path),
    lambda path, _: path.mkdir(),
]


@pytest.mark.parametrize("make", OTHERS)
def test_what_is_no_file_is_not_read(make, shared, tmp_path, caplog):
    make(shared / "000007_owner", tmp_path)
    before = left(tmp_path)
    assert shared_memory.remove_stale_shared_memory() == [9]
    assert left(tmp_path) == {name for name in before if not name.startswith("000009")}
    assert not caplog.text


def test_record_of_another_user_removes_nothing(shared, tmp_path, monkeypatch, caplog):
    before = left(tmp_path)
    user = os.getuid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: user + 1)
        assert shared_memory.remove_stale_shared_memory() == []
    assert left(tmp_path) == before and not caplog.text
    assert shared_memory.remove_stale_shared_memory() == [9]


def test_record_of_another_user_in_its_place_is_a_warning(shared, tmp_path, monkeypatch, caplog):
    """In a folder with the sticky bit, nobody can replace another user's file."""

    def rename(path, target):
        raise PermissionError(1, "Operation not permitted", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        shared_memory.own_shared_memory(7, str(tmp_path / "locks"))
    assert "000007_owner cannot be replaced (Operation not permitted)" in caplog.text
    assert not list(shared.glob(".*"))
    shared_memory._owned.pop()[2].close()


def test_folder_in_the_place_of_the_record_is_a_warning(shared, tmp_path, caplog):
    (shared / "000007_owner").mkdir()
    shared_memory.own_shared_memory(7, str(tmp_path / "locks"))
    assert "000007_owner cannot be replaced (Is a directory), so the shared memory of this run stays" in caplog.text
    assert not list(shared.glob(".*"))
    shared_memory._owned.pop()[2].close()


def test_folder_among_the_segments_of_a_dead_run_stays(shared, tmp_path):
    (shared / "000009_barrier").mkdir()
    assert shared_memory.remove_stale_shared_memory() == [9]
    assert {name for name in left(tmp_path) if name.startswith("000009")} == {"000009_barrier"}


@pytest.mark.parametrize(
    "make",
    [
        Path.mkdir,
        Path.touch,
        os.mkfifo,
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.write_bytes(b"\xff" * 9),
    ],
)
@pytest.mark.parametrize("name", ["locals", "barrier", "owner"])
def test_prefix_with_files_that_are_not_streamings_is_skipped(name, make, token_shards, opened, monkeypatch):
    with alone_on_node():  # nobody else meets the file
        monkeypatch.setattr(streaming, "alone_on_node", contextlib.nullcontext)
        prefix = opened(token_shards, "val").shared_memory_prefix + 1
        while [*shared_memory.SHARED.glob(f"{prefix:06}_*"), *Path(gettempdir()).glob(f"{prefix:06}_*")]:
            prefix += 1  # of another run
        file = shared_memory.SHARED / f"{prefix:06}_{name}"
        make(file)
        try:
            assert opened(token_shards, "val").shared_memory_prefix > prefix
        finally:
            file.rmdir() if file.is_dir() else file.unlink()


def test_record_is_written_to_a_new_file(shared, tmp_path):
    """Not through a link that is there."""
    (tmp_path / "mine").write_text("mine")
    (shared / f".000007_owner-{os.getpid()}").symlink_to(tmp_path / "mine")
    shared_memory.own_shared_memory(7, str(tmp_path / "locks"))
    assert (tmp_path / "mine").read_text() == "mine"
    assert json.loads((shared / "000007_owner").read_text()) == {**record(tmp_path, 7), "pid": os.getpid()}
    shared_memory._owned.pop()[2].close()


def test_lock_of_another_user_is_named(shared, monkeypatch):
    with alone_on_node():
        pass
    assert (shared / f"streaming-{os.getuid()}.lock").exists()
    user = os.getuid()
    (shared / f"streaming-{user + 1}.lock").touch()
    message = rf"streaming-{user + 1}.lock is the lock of .* belongs to user {user}; ask"
    with monkeypatch.context() as patch, pytest.raises(DataError, match=message):
        patch.setattr(os, "getuid", lambda: user + 1)
        alone_on_node()
