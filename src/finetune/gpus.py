"""Processes over the devices that there are: one on each at a time, each with a log of its own. Imports no torch."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

REPORT_S = 60.0
"""Seconds between two looks at what the running jobs say."""


@dataclass(frozen=True)
class Job:
    """A command to run."""

    name: str
    command: list[str]
    log: Path
    """What it prints goes there."""
    needs: str | None = None
    """Name of the job that must have succeeded before; one that is not among the jobs has."""


def run(jobs: Sequence[Job], devices: Sequence[str | None], say: Callable[[str], None]) -> dict[str, str]:
    """Run all jobs, in their order as devices become free, and wait for them.

    A job that fails takes no other down, but for those that need it.

    Args:
        devices: values of CUDA_VISIBLE_DEVICES, each for one job at a time; None is the CPU.
        say: called with lines about what starts, runs and ends.

    Returns:
        Names of the jobs that failed, or did not run because another failed, each with the reason.
    """
    waiting, names = list(jobs), {job.name for job in jobs}
    running: dict[str | None, tuple[Job, subprocess.Popen[bytes], float]] = {}
    done: set[str] = set()
    failed: dict[str, str] = {}
    reported = time.monotonic()
    with ExitStack() as at_exit:
        at_exit.callback(lambda: _end([process for _, process, _ in running.values()]))
        while waiting or running:
            for job in [job for job in waiting if job.needs in failed]:
                waiting.remove(job)
                failed[job.name] = f"not run, because {job.needs}, which it starts from, failed"
                say(f"{job.name}: {failed[job.name]}")
            for device in [device for device in devices if device not in running]:
                ready = [job for job in waiting if job.needs not in names or job.needs in done]
                if not ready:
                    break
                waiting.remove(ready[0])
                running[device] = ready[0], _start(ready[0], device), time.monotonic()
                say(f"{ready[0].name}: started on {'the CPU' if device is None else f'GPU {device}'}, {ready[0].log}")
            for device, (job, process, started) in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[device]
                if code == 0:
                    done.add(job.name)
                else:
                    failed[job.name] = _reason(job, code)
                result = f"failed: {failed[job.name]}" if code else "done"
                say(f"{job.name}: {result} ({time.monotonic() - started:.0f} s)")
            if time.monotonic() - reported > REPORT_S:
                reported = time.monotonic()
                for job, _, _ in running.values():
                    say(f"{job.name}: {_last_line(job.log)}")
            time.sleep(0.1)
    return failed


def _start(job: Job, device: str | None) -> "subprocess.Popen[bytes]":
    environment = dict(os.environ)
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("wb") as log:
        return subprocess.Popen(job.command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _end(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _reason(job: Job, code: int) -> str:
    if code < 0:
        memory = "; out of memory?" if code == -9 else ""
        return f"killed by signal {-code}{memory} ({job.log})"
    return f"{_last_line(job.log)} ({job.log})"


def _last_line(log: Path) -> str:
    """What it said last."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "nothing said yet"


def devices_of(count: int) -> list[str | None]:
    """A value of CUDA_VISIBLE_DEVICES for each of ``count`` visible GPUs; without any, one place on the CPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(count)] if visible is None else [name.strip() for name in visible.split(",")]
    return list(names[:count]) or [None]


def say(line: str) -> None:
    """To standard error, at once."""
    print(line, file=sys.stderr, flush=True)
