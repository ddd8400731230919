"""Processes over the devices of this machine: one on each at a time, each with its own log. Imports no torch."""

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

REPORT_S = 60.0
"""Seconds between two reports of a running job."""
END_S = 10.0
"""Seconds that a job has to end after SIGTERM."""

Report = Callable[[str], None]
"""Called with a line about a job that starts, runs or ends; from several threads."""


@dataclass(frozen=True)
class Job:
    """A command to run."""

    name: str
    command: list[str]
    log: Path
    """File for what it prints."""
    needs: str | None = None
    """Name of a job that must succeed first; a name that is not among the jobs has succeeded before."""


def run_jobs(jobs: Sequence[Job], devices: Sequence[str | None], report: Report) -> dict[str, str]:
    """Run all jobs, in their order as devices become free, and wait for them. An error or a signal ends them all.

    Args:
        devices: values of CUDA_VISIBLE_DEVICES, each for one job at a time; None is the CPU.

    Returns:
        The reason for each job that failed, or was skipped because the job that it needs failed; by name.
    """
    waiting, free, failed = list(jobs), list(devices), {}
    unfinished = {job.name for job in jobs}
    running: dict[Future[str | None], tuple[Job, str | None, subprocess.Popen[bytes], float]] = {}
    with ThreadPoolExecutor(len(devices)) as pool:
        try:
            while waiting or running:
                for job in [job for job in waiting if job.needs in failed]:
                    waiting.remove(job)
                    failed[job.name] = f"skipped: {job.needs}, which it starts from, failed"
                    report(f"{job.name}: {failed[job.name]}")
                for job in [job for job in waiting if job.needs not in unfinished][: len(free)]:
                    waiting.remove(job)
                    device = free.pop(0)
                    process = _start(job, device)
                    running[pool.submit(_follow, job, process, report)] = job, device, process, time.monotonic()
                    report(f"{job.name}: started on {'the CPU' if device is None else f'GPU {device}'}, {job.log}")
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job, device, _, started = running.pop(future)
                    free.append(device)
                    reason = future.result()
                    if reason is None:
                        unfinished.remove(job.name)
                    else:
                        failed[job.name] = reason
                    result = "done" if reason is None else f"failed: {reason}"
                    report(f"{job.name}: {result} ({time.monotonic() - started:.0f} s)")
        except BaseException:
            for _, _, process, _ in running.values():
                process.terminate()
            for future in wait(running, timeout=END_S).not_done:
                running[future][2].kill()
            raise
    return failed


def _start(job: Job, device: str | None) -> "subprocess.Popen[bytes]":
    environment = dict(os.environ)
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("wb") as log:
        return subprocess.Popen(job.command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _follow(job: Job, process: "subprocess.Popen[bytes]", report: Report) -> str | None:
    """Wait for a process; the reason if it failed."""
    while True:
        try:
            code = process.wait(REPORT_S)
        except subprocess.TimeoutExpired:
            report(f"{job.name}: {_last_line(job.log)}")
            continue
        if code < 0:
            memory = "; out of memory?" if code == -9 else ""
            return f"killed by signal {-code}{memory} ({job.log})"
        return f"{_last_line(job.log)} ({job.log})" if code else None


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output yet"


def visible_devices(count: int) -> list[str | None]:
    """A value of CUDA_VISIBLE_DEVICES for each of ``count`` visible GPUs; without a GPU, one None for the CPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(count)] if visible is None else [name.strip() for name in visible.split(",")]
    return list(names[:count]) or [None]
