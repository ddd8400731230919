"""Processes that end with their parent process."""

import ctypes
import signal
import sys


def die_with_parent() -> None:
    """Kill this process when its parent ends, even by SIGKILL. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
