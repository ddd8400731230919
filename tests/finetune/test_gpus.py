"""Small commands in place of training: order, devices, failures, interruption."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from src.finetune import gpus

NOTE = """
import os, sys, time
name, seconds, code = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
def note(what):
    with open("notes", "a") as notes:
        notes.write(f"{time.monotonic()} {what} {name} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
note("begin")
print(name, "begins", flush=True)
print("half a ", end="", flush=True)
time.sleep(seconds)
note("end")
print("line", flush=True)
if code > 0:
    print("\\nthe reason", end="")
    sys.exit(code)
os.kill(os.getpid(), -code)
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Makes a job that notes when it begins and ends; a negative ``code`` is the signal that it dies of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def job(name, seconds=0.3, code=0, needs=None):
        command = [sys.executable, "-S", "-c", NOTE, name, str(seconds), str(code)]
        return gpus.Job(name, command, tmp_path / name / "log.txt", needs)

    return job


def notes():
    """(what, name, device), in the order in which they came."""
    return [tuple(line.split()[1:]) for line in sorted(Path("notes").read_text().splitlines())]


def test_each_device_runs_one_job_at_a_time(job):
    said = []
    assert gpus.run_jobs([job(name) for name in "abcde"], ["0", "GPU-7"], said.append) == {}
    busy = set()
    for what, _, device in notes():
        assert (device in busy) == (what == "end")
        busy ^= {device}
    started = [line[0] for line in said if "started" in line]
    assert started == list("abcde") and "started on GPU 0" in said[0] and "started on GPU GPU-7" in said[1]
    for name in "abcde":  # each whole line once, before the job's end
        lines = [line.removeprefix(f"{name}: ") for line in said if line.startswith(f"{name}: ")]
        assert lines[1:3] == [f"{name} begins", "half a line"] and lines[3].startswith("done") and len(lines) == 4


def test_lines_of_one_device_have_no_name(job):
    said = []
    gpus.run_jobs([job("a", 0), job("b", 0, code=3)], [None], said.append)
    assert said[1:3] == ["a begins", "half a line"] and said[3].startswith("a: done")
    assert said[5:8] == ["b begins", "half a line", "the reason"] and said[8].startswith("b: failed: the reason (")


def test_a_job_waits_for_the_job_that_it_needs(job):
    said = []
    queue = [job("late", 0, needs="long"), job("long"), job("free", 0, needs="finished before")]
    assert gpus.run_jobs(queue, ["0", "1"], said.append) == {}
    assert said[0].startswith("long: started") and said[1].startswith("free: started")
    order = [(what, name) for what, name, _ in notes()]
    assert order.index(("end", "long")) < order.index(("begin", "late"))


def test_a_failure_skips_only_the_jobs_that_need_it(job):
    said = []
    queue = [job("bad", 0, code=3), job("child", needs="bad"), job("grandchild", needs="child")]
    failed = gpus.run_jobs([*queue, job("killed", 0, code=-9), job("good", 0)], [None], said.append)
    assert list(failed) == ["bad", "child", "grandchild", "killed"]
    assert failed["bad"].startswith("the reason (") and failed["bad"].endswith("log.txt)")
    assert failed["child"] == "skipped: bad, which it starts from, failed"
    assert failed["killed"].startswith("killed by signal 9; out of memory? (")
    assert notes() == [(what, name, "None") for name in ("bad", "killed", "good") for what in ("begin", "end")]
    assert any(line.startswith("bad: failed: the reason") for line in said)
    assert any(line.startswith("good: done") for line in said)


def test_an_interruption_ends_running_jobs(job):
    def interrupt(line):
        if "b: started" in line:
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        gpus.run_jobs([job("a", 30), job("b", 30)], ["0", "1"], interrupt)
    assert time.monotonic() - started < 10
    left = subprocess.run(["ps", "-o", "args=", "--ppid", str(os.getpid())], capture_output=True, text=True).stdout
    assert NOTE.strip().splitlines()[0] not in left


@pytest.mark.parametrize(
    ("visible", "count", "devices"),
    [(None, 2, ["0", "1"]), ("2, 3", 2, ["2", "3"]), ("GPU-ab", 1, ["GPU-ab"]), ("", 0, [None]), (None, 0, [None])],
)
def test_visible_devices(visible, count, devices, monkeypatch):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus.visible_devices(count) == devices
