import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import count

import pytest

from src.convert import workers


def touch(folder, task, counted):
    (folder / f"{task}").touch(exist_ok=False)
    counted(task)


def fail(task, counted):
    raise ValueError("no good")


def fail_strangely(task, counted):
    class Local(Exception):
        """Cannot be sent to another process."""

    raise Local("no good")


def wait(folder, task, counted):
    (folder / f"{os.getpid()}").touch()
    counted(1)
    time.sleep(60)


def kill(number, task, counted):
    os.kill(os.getpid(), number)


def leave(task, counted):
    os._exit(3)


def interrupt_itself(task, counted):
    os.kill(os.getpid(), signal.SIGINT)
    counted(1)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_each_task_runs_once_when_a_worker_is_free(num_workers, tmp_path):
    counts, most = [], 0

    def tasks():
        nonlocal most
        for task in range(40):
            most = max(most, task - len(list(tmp_path.iterdir())))
            yield task

    workers.run(partial(touch, tmp_path), tasks(), num_workers, counts.append)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == list(range(40))
    assert sum(counts) == sum(range(40))
    assert most < 2 * num_workers  # tasks ahead of the work, however many tasks there are


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        (fail, ValueError, "^no good"),
        (fail_strangely, RuntimeError, "Local: no good"),
        (
            partial(kill, signal.SIGKILL),
            OSError,
            r"killed by signal 9; out of memory\?\)\. Try fewer --num_workers\. Completed",
        ),
        (partial(kill, signal.SIGSEGV), OSError, r"killed by signal 11\)\. Completed"),
        (partial(kill, signal.SIGTERM), OSError, r"killed by signal 15\)\. Completed"),
        (leave, OSError, r"exit code 3\)\. Completed work"),
    ],
)
def test_the_first_error_of_a_worker_is_raised(task, error, message):
    with pytest.raises(error, match=message):
        workers.run(task, count(), 2, print)


def test_an_interrupt_ends_all_workers(tmp_path):
    def interrupt(documents):
        if documents:
            processes.extend(multiprocessing.active_children())
            raise KeyboardInterrupt

    processes, started = [], time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        workers.run(partial(wait, tmp_path), range(2), 5, interrupt)
    assert len(processes) == 2  # no more than tasks
    assert not multiprocessing.active_children()
    assert time.monotonic() - started < 40


def test_workers_ignore_ctrl_c():
    counts = []
    workers.run(interrupt_itself, range(4), 2, counts.append)
    assert sum(counts) == 4


PARENT = """
import sys
from functools import partial
from pathlib import Path
from src.convert import workers
from tests.convert.test_workers import wait
workers.run(partial(wait, Path(sys.argv[1])), range(2), 2, print)
"""


def test_workers_end_when_their_parent_is_killed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", PARENT, tmp_path], stdout=subprocess.PIPE)
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.05)
        assert process.poll() is None
    process.kill()
    process.communicate(timeout=20)  # workers hold the pipe open until they end
