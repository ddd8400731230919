"""Processes over the devices of this machine: one on each at a time, each with its own log. Imports no torch."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import STDOUT, Popen
from tempfile import TemporaryFile
from typing import BinaryIO

from src.common.signals import how_it_ended

POLL_S = 0.1
"""Seconds between two looks at the processes."""


@dataclass(frozen=True)
class Job:
    """A command to run."""

    name: str
    command: list[str]
    log: Path
    """File for what it prints."""
    needs: str | None = None
    """Name of a job that must succeed first; a name that is not among the jobs has succeeded before."""
    stdin: bytes = b""
    """What it reads as its standard input."""


@dataclass
class Running:
    """A job's process, and what is read of its log."""

    job: Job
    process: "Popen[bytes]"
    started: float
    log: BinaryIO
    begun: bytes = b""
    """A line whose end is not written yet."""

    def new_lines(self, ended: bool) -> list[str]:
        """The lines that the log got since the last call, without empty ones; of a job that has ended, all of them."""
        lines = (self.begun + self.log.read()).split(b"\n")
        self.begun = b"" if ended else lines.pop()
        return [text for line in lines if (text := line.decode(errors="replace").rstrip())]


def run_jobs(jobs: Sequence[Job], devices: Sequence[str | None], report: Callable[[str], None]) -> dict[str, str]:
    """Run all jobs, in their order as devices become free, and wait for them. An error or a signal kills them all.

    Args:
        devices: values of CUDA_VISIBLE_DEVICES, each for one job at a time; None is the CPU.
        report: called with a line about each job that starts or ends, and with each line that a job prints, which
            begins with its name if there are several devices.

    Returns:
        The reason for each job that failed, or was skipped because the job that it needs failed; by name.
    """
    waiting = list(jobs)
    running: dict[str | None, Running] = {}  # by device
    failed: dict[str, str] = {}
    try:
        while waiting or running:
            for job in waiting.copy():
                free = [device for device in devices if device not in running]
                unfinished = {other.name for other in [*waiting, *(active.job for active in running.values())]}
                if job.needs in failed:
                    waiting.remove(job)
                    failed[job.name] = f"skipped: {job.needs}, which it starts from, failed"
                    report(f"{job.name}: {failed[job.name]}")
                elif free and job.needs not in unfinished:
                    waiting.remove(job)
                    running[free[0]] = _start(job, free[0])
                    report(f"{job.name}: started on {'the CPU' if free[0] is None else f'GPU {free[0]}'}, {job.log}")
            time.sleep(POLL_S)
            for device, active in list(running.items()):
                job, code = active.job, active.process.poll()  # before its last lines are read
                for line in active.new_lines(code is not None):
                    report(f"{job.name}: {line}" if len(devices) > 1 else line)
                if code is not None:
                    running.pop(device).log.close()
                    result = "done"
                    if code != 0:
                        reason = _last_line(job.log) if code > 0 else how_it_ended(code)
                        failed[job.name] = f"{reason} ({job.log})"
                        result = f"failed: {failed[job.name]}"
                    report(f"{job.name}: {result} ({time.monotonic() - active.started:.0f} s)")
    finally:
        for active in running.values():
            active.process.kill()
        for active in running.values():
            active.process.wait()
            active.log.close()
    return failed


def _start(job: Job, device: str | None) -> Running:
    environment = None if device is None else {**os.environ, "CUDA_VISIBLE_DEVICES": device}
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("wb") as log, TemporaryFile() as stdin:  # a pipe could be full before the job reads
        stdin.write(job.stdin)
        stdin.seek(0)
        process = Popen(job.command, stdin=stdin, stdout=log, stderr=STDOUT, env=environment)
    return Running(job, process, time.monotonic(), job.log.open("rb"))


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output yet"


def visible_devices(count: int) -> list[str | None]:
    """A value of CUDA_VISIBLE_DEVICES for each of ``count`` visible GPUs; without a GPU, one None for the CPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(count)] if visible is None else [name.strip() for name in visible.split(",")]
    return list(names[:count]) or [None]
