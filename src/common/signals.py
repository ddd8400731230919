"""Processes that end with their parent process, and how a process ended."""

import ctypes
import signal
import sys


def die_with_parent() -> None:
    """Kill this process when its parent ends, even by SIGKILL. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def how_it_ended(code: int) -> str:
    """The end of a process in words, by its exit code, which is negative if a signal killed it."""
    if code >= 0:
        return f"exit code {code}"
    return f"killed by signal {-code}{'; out of memory?' if -code == signal.SIGKILL else ''}"
