"""Clocks, interleaved rounds, and ratios of times."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Clock = Callable[[Callable[[], Any]], float]
"""Runs a function and returns its seconds."""


def wall_clock(device: str) -> Clock:
    """Host time until the device has finished."""

    def seconds(run: Callable[[], Any]) -> float:
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return seconds


def device_clock(device: str, flushes: int = 0) -> Clock:
    """On a GPU, the time between two events on the stream; on a CPU, that of the host.

    Args:
        flushes: the L2 cache is overwritten so often before each call. It keeps the GPU busy while the host launches
            what is timed, so short kernels are not timed by their launch.
    """
    if device != "cuda":
        return wall_clock(device)
    cache = torch.empty(2**28, dtype=torch.int8, device=device)  # larger than any L2 cache

    def seconds(run: Callable[[], Any]) -> float:
        for _ in range(flushes):
            cache.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(torch.cuda.current_stream())
        run()
        end.record(torch.cuda.current_stream())
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return seconds


def interleaved(
    runs: Mapping[Any, Callable[[], Any]], rounds: int, clock: Clock, warmup: int = 0
) -> dict[Any, list[float]]:
    """Seconds of each function in each round, after ``warmup`` rounds that do not count."""
    times: dict[Any, list[float]] = {name: [] for name in runs}
    for number, (name, run) in itertools.product(range(warmup + rounds), runs.items()):
        seconds = clock(run)
        times[name] += [seconds] if number >= warmup else []
    return times


def ratios(ours: list[float], other: list[float]) -> tuple[float, float, float]:
    """Median, lowest and highest of other / ours over rounds."""
    each = [b / a for a, b in zip(ours, other, strict=True)]
    return statistics.median(each), min(each), max(each)
