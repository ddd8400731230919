"""The processes of a run: connecting them, their cores, and ending loader workers."""

import multiprocessing
import os
import signal

import torch
from composer.utils import dist, get_device

from src.common.errors import ConfigError, first_line
from src.common.signals import die_with_parent

EXIT_INTERRUPTED = 75
"""Exit code of a run that a signal or its time limit stopped after a saved step: EX_TEMPFAIL of sysexits.h."""
EXIT_TIME_LIMIT = 124
"""Exit code of a run that its time limit stopped, and that saves nothing, as of timeout(1)."""


def settle_worker(_: int) -> None:
    """Make a loader worker ignore signals, because its parent may finish a step, and end with its parent."""
    die_with_parent()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """Kill remaining loader workers. Python sends SIGTERM at exit and waits, but they ignore it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error
    for worker in multiprocessing.active_children():
        worker.kill()


def meet(timeout: float) -> None:
    """Connect the processes of a run, before streaming does it with another timeout.

    Raises:
        ConfigError: some do not connect within ``timeout`` seconds, or the port is in use.
    """
    try:
        dist.initialize_dist(get_device(None), timeout=timeout)
    except (RuntimeError, ValueError) as error:  # torch's DistStoreError and DistNetworkError are RuntimeErrors
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConfigError(
            f"process {dist.get_global_rank()} of {dist.get_world_size()} did not connect to the others at {where} "
            f"within {timeout:g} s (dist_timeout): {first_line(error)}\n"
            "Check that node 0 has this MASTER_ADDR and a free MASTER_PORT, WORLD_SIZE is the number of processes on "
            "all nodes, each node has another NODE_RANK, and all were started."
        ) from None


def share_cores() -> None:
    """Divide a node's cores among its processes, unless OMP_NUM_THREADS is set; by default torch uses all in each."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // dist.get_local_world_size()))
