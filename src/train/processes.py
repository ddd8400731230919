"""The processes of a run: they end together, finish their step first, and leave nothing behind. Imports no torch.

Signals of Linux are meant where one is named; elsewhere what Linux alone has is left out.
"""

import multiprocessing
import os
import signal

import torch
from composer.utils import dist, get_device

from src.common.errors import ConfigError
from src.common.signals import die_with_parent

EXIT_INTERRUPTED = 75
"""Exit code of a run that a signal stopped and that can go on: EX_TEMPFAIL of sysexits.h."""


def settle_worker(_: int) -> None:
    """In a loader's worker: live as long as the process that it loads for, which may have a step to finish."""
    die_with_parent()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """Kill the workers that are left. They ignore SIGTERM, with which Python would end them, to wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler makes an error of it
    for worker in multiprocessing.active_children():
        worker.kill()


def meet(timeout: float) -> None:
    """Connect the processes of a run; before streaming does, with a time-out of its own.

    Raises:
        ConfigError: some do not come within ``timeout`` seconds, or the port is taken.
    """
    try:
        dist.initialize_dist(get_device(None), timeout=timeout)
    except (RuntimeError, ValueError) as error:  # torch's DistStoreError and DistNetworkError are RuntimeErrors
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConfigError(
            f"process {dist.get_global_rank()} of {dist.get_world_size()} did not meet the others at {where} within "
            f"{timeout:g} s (dist_timeout): {str(error).splitlines()[0]}\n"
            "Check that node 0 has this MASTER_ADDR and that MASTER_PORT is free there, that WORLD_SIZE is the number "
            "of processes on all nodes, that each node has its own NODE_RANK, and that all of them were started."
        ) from None


def share_cores() -> None:
    """Give each process of a node its share of the cores, unless OMP_NUM_THREADS says how many it takes.

    torch takes all of them in each process, and on a CPU threads that wait keep those that work from their cores.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // dist.get_local_world_size()))
