"""Ties a process's life to that of the process that started it."""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1


def signal_at_parents_end(number: signal.Signals) -> None:
    """Have this process sent the signal when the thread that started it ends, however that happens; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
