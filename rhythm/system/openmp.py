"""Leaves cores to other processes that want them: fewer OpenMP threads while the machine is busy, all of them again
when it no longer is.

OpenMP's threads wait for one another at the end of every operation. As soon as there are more threads that want to
run than cores, the slowest of a team is one that waits for a core, and a step beside one busy process can take three
times as long; with one thread in place of two it takes as long as that thread needs. Without spinning at barriers a
team beside others loses less, but still more than half of its speed, and it is slower alone.

Intel's and LLVM's runtimes (libiomp5, libomp) spin for 200 ms unless KMP_BLOCKTIME says otherwise when they are
loaded, or kmp_set_blocktime later, for the teams of the thread that calls it. 1 ms costs little alone, and little
beside others. GNU's (libgomp, which torch's wheels bring) keeps its own, shorter spin.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

log = logging.getLogger(__name__)

VARIABLES = (
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_DYNAMIC", "OMP_THREAD_LIMIT", "GOMP_SPINCOUNT", "KMP_BLOCKTIME",
    "KMP_LIBRARY",
)  # fmt: skip
"""Whoever sets one of these has chosen how threads wait, and nothing here changes it."""

BLOCK_MILLISECONDS = 1

_KMP = re.compile(r"/lib(iomp5|omp)[^/a-z]*\.so[^/]*$")
_TASKS = Path("/proc/self/task")  # per thread schedstat: time on a core, time ready but without one, in ns
_STAT = Path("/proc/stat")
_INTERVAL = 0.25
# Threads that are alone wait 1% of the time, beside one busy process on two cores 40%.
_BUSY, _BUSY_LOOKS = 0.10, 2
# A core is another's if others use more than that part of it; and ours again after so many looks at which it isn't.
_TAKEN, _FREE_LOOKS = 0.25, 4


def choose_waiting(environment: MutableMapping[str, str] | None = None) -> bool:
    """Intel's and LLVM's runtime spin for a millisecond from here on, for the calling thread, and in child processes.

    environment: of this process by default. Returns whether the choice was rhythm's; where it was the user's, nothing
    is changed.
    """
    environment = os.environ if environment is None else environment
    if any(name in environment for name in VARIABLES):
        return False
    environment["KMP_BLOCKTIME"] = str(BLOCK_MILLISECONDS)
    for path in loaded_runtimes():  # they have read their variables already
        ctypes.CDLL(path).kmp_set_blocktime(BLOCK_MILLISECONDS)
    return True


def worker_waiting(environment: MutableMapping[str, str] | None = None) -> dict[str, str]:
    """Variables for worker processes that share their machine's cores with one another: no spinning, unless the
    user has chosen something, which they get then.
    """
    environment = os.environ if environment is None else environment
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
    ours = environment.get("KMP_BLOCKTIME") == str(BLOCK_MILLISECONDS)
    chosen = {name: environment[name] for name in names if name in environment}
    if ours:
        chosen.pop("KMP_BLOCKTIME")
    return chosen or {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}


def waited() -> float | None:
    """Seconds that the threads of this process have been ready to run without a core, taken together; None where the
    system doesn't say. All of them: while another thread of its team waits, the main one may spin on a core of its own.
    """
    total = 0
    try:
        for task in _TASKS.iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                total += int((task / "schedstat").read_bytes().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return total / 1e9 if total else None


def used_by_others() -> float | None:
    """Seconds of processor time that other processes of usual or higher priority have had on the processors of this
    one, since the machine started and but for a constant; None where the system doesn't say.
    """
    try:
        rows = (line.split() for line in _STAT.read_text(encoding="utf-8").splitlines())
        own = time.process_time() if os.getpriority(os.PRIO_PROCESS, 0) <= 0 else 0.0  # a nice process isn't in the sum
        usable = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        total = 0
        for user, _nice, system, _idle, _iowait, interrupts, soft, stolen in (
            map(int, row[1:9]) for row in rows if row[0] in usable
        ):
            total += user + system + interrupts + soft + stolen
    except (OSError, AttributeError, ValueError):
        return None
    return total / os.sysconf("SC_CLK_TCK") - own


class ThreadWatch:
    """Until the block is left, torch's threads of the main thread are as many as there are cores for.

    Four times a second it looks how long threads waited for a core. Where that was more than a tenth of the time twice
    in a row, the threads become so many that each has a core which other processes don't use; at least
    one. They become more again when other processes have used fewer cores for a second.

    The number of threads decides in which order numbers are summed, so results then differ in their last bits.

    Attributes:
        threads: how many there are; None as long as the number has not been changed.

    Where the system doesn't say how long threads wait (it is Linux that does), it does nothing.
    """

    def __init__(
        self,
        waited: Callable[[], float | None] = waited,
        used_by_others: Callable[[], float | None] = used_by_others,
        *,
        interval: float = _INTERVAL,
    ) -> None:
        self.threads: int | None = None
        self._waited, self._used, self._interval = waited, used_by_others, interval
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="thread-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        team = None  # threads without other processes
        busy_looks = free_looks = 0  # in a row
        before, used_before, then = self._waited(), self._used(), time.monotonic()
        while before is not None and used_before is not None and not self._end.wait(self._interval):
            after, used, now = self._waited(), self._used(), time.monotonic()
            if after is None or used is None:
                break
            share, others = (after - before) / (now - then), (used - used_before) / (now - then)
            before, used_before, then = after, used, now
            if "torch" not in sys.modules:
                continue
            team = team or _torch_threads()
            threads = self.threads or team
            room = max(1, min(team, processors() - math.ceil(others - _TAKEN)))
            busy_looks = busy_looks + 1 if share > _BUSY and room < threads else 0
            free_looks = free_looks + 1 if room > threads else 0
            if busy_looks == _BUSY_LOOKS or free_looks == _FREE_LOOKS:
                self._change(room, team)
                busy_looks = free_looks = 0
        if self.threads is not None and team is not None:
            self._change(team, team)

    def _change(self, threads: int, team: int) -> None:
        if self.threads is None:
            log.info(
                "other processes want the cores: %d of %d threads until they end. OMP_NUM_THREADS=%d keeps the "
                "number, and with it results to the last bit.",
                threads, team, team,
            )  # fmt: skip
        self.threads = threads
        set_threads_of_the_main_thread(threads)


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)  # type: ignore[untyped-decorator]
def _set_threads(threads: int) -> int:
    import torch

    torch.set_num_threads(threads)
    return 0


def set_threads_of_the_main_thread(threads: int) -> None:
    """torch.set_num_threads(threads) in the main thread, between two steps of its Python code: the number of OpenMP's
    threads belongs to the thread that sets it.
    """
    ctypes.pythonapi.Py_AddPendingCall(_set_threads, ctypes.c_void_p(threads))


def processors() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loaded_runtimes() -> set[str]:
    """Paths of Intel's and LLVM's OpenMP runtimes in this process; none where the system is not Linux."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    return {path for path in re.findall(r"/\S+", maps) if _KMP.search(path)}
