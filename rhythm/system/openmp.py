"""Sets how long OpenMP's threads spin at a barrier: as usual while the process has its cores to itself, hardly at all
while other processes need them.

A thread that spins while it waits keeps a core from the very thread it waits for as soon as there are more threads
that want to run than cores; a step beside one busy process can then take three times as long. Without any spinning
a step that is alone takes longer, and fewer threads would change the order of sums and with it a run's bits. So the
number of threads stays, and only the wait changes:

- GNU's runtime (libgomp, which torch's wheels bring) spins a thousandth as long while there are more OpenMP threads
  than processors (GOMP_SPINCOUNT in its manual). `SpinWatch` adds such threads, which sleep, while the main thread
  has to wait for a core.
- Intel's and LLVM's (libiomp5, libomp) spin for 200 ms unless KMP_BLOCKTIME says otherwise when they are loaded, or
  kmp_set_blocktime later, for the teams of the thread that calls it. 1 ms costs little alone, and little beside others.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, MutableMapping
from pathlib import Path
from types import TracebackType
from typing import Self

VARIABLES = (
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_DYNAMIC", "OMP_THREAD_LIMIT", "GOMP_SPINCOUNT", "KMP_BLOCKTIME",
    "KMP_LIBRARY",
)  # fmt: skip
"""Whoever sets one of these has chosen how threads wait, and nothing here changes it."""

BLOCK_MILLISECONDS = 1

_GNU, _KMP = re.compile(r"/libgomp[^/]*\.so[^/]*$"), re.compile(r"/lib(iomp5|omp)[^/a-z]*\.so[^/]*$")
_SCHEDSTAT = Path("/proc/self/schedstat")  # of the main thread: seconds on a core, seconds ready but without one, in ns
_INTERVAL = 0.25
# A main thread that is alone waits 1% of the time, beside one busy process on two cores 40%. While threads don't spin
# it tells less: then a thread that is woken waits a little for its core, tens of thousands of times a second.
_BUSY, _BUSY_LOOKS = 0.10, 2
# So a crowd stays that many looks and then leaves, to see; twice as many each time it is called back at once.
_STAY, _LONGEST_STAY = 8, 40
_MOST_CROWDS = 4


def choose_waiting(environment: MutableMapping[str, str] | None = None) -> bool:
    """Intel's and LLVM's runtime spin for a millisecond from here on, for the calling thread, and in child processes.

    environment: of this process by default. Returns whether the choice was rhythm's; where it was the user's, nothing
    is changed.
    """
    environment = os.environ if environment is None else environment
    if any(name in environment for name in VARIABLES):
        return False
    environment["KMP_BLOCKTIME"] = str(BLOCK_MILLISECONDS)
    for path in loaded_runtimes():
        if _KMP.search(path):  # it has read its variables already
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
    """Seconds that the main thread has been ready to run without a core; None where the system doesn't say."""
    try:
        return int(_SCHEDSTAT.read_bytes().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return None


class SpinWatch:
    """Until the block is left, looks four times a second how long the main thread waited for a core. Where that was
    more than a tenth of the time twice in a row, libgomp's threads spin next to nothing for the next 2 seconds; up to
    10 where it is so again and again.

    `crowded` says whether they do now. Where the system doesn't say how long threads wait (it is Linux that does),
    and with another OpenMP runtime than libgomp, it does nothing.
    """

    def __init__(self, waited: Callable[[], float | None] = waited, *, interval: float = _INTERVAL) -> None:
        self._waited, self._interval = waited, interval
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="spin-watch", daemon=True)
        self._crowd: Crowd | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    @property
    def crowded(self) -> bool:
        """Whether threads spin next to nothing now."""
        return self._crowd is not None

    def _watch(self) -> None:
        before, then = self._waited(), time.monotonic()
        looks, stay = 0, 0  # in a row that were busy, or of this crowd; of the last crowd
        alone = math.inf  # looks since the last crowd
        while before is not None and not self._end.wait(self._interval):
            after, now = self._waited(), time.monotonic()
            if after is None:
                break
            share = (after - before) / (now - then)
            before, then = after, now
            if self.crowded:
                looks += 1
                if looks == stay:
                    self._change()
                    looks = alone = 0
                continue
            alone += 1
            looks = looks + 1 if share > _BUSY else 0
            if looks == _BUSY_LOOKS:
                stay = min(2 * stay, _LONGEST_STAY) if alone <= 2 * _BUSY_LOOKS else _STAY
                self._change()
                looks = 0
        if self._crowd is not None:
            self._change()

    def _change(self) -> None:
        if self._crowd is not None:
            self._crowd.leave()
            self._crowd = None
        elif "torch" in sys.modules and uses_libgomp():
            self._crowd = Crowd()


class Crowd:
    """OpenMP threads that sleep: so many that libgomp counts more threads than processors and hardly spins."""

    def __init__(self) -> None:
        """Returns when they are there: none where torch uses one thread, and none where it uses so few of the
        processors that a handful of teams would not be enough.
        """
        import torch

        team = torch.get_num_threads()
        teams = crowds(team, processors())
        self._leave = threading.Event()
        there = threading.Barrier(teams + 1)
        self._threads = [
            threading.Thread(target=self._stay, args=(there,), name="crowd", daemon=True) for _ in range(teams)
        ]
        for thread in self._threads:
            thread.start()
        there.wait()

    def _stay(self, there: threading.Barrier) -> None:
        import torch

        torch.ones(1 << 20).mul_(2)  # a team belongs to the thread that first had work for it, until that one ends
        there.wait()
        self._leave.wait()

    def leave(self) -> None:
        """From here on libgomp spins as before."""
        self._leave.set()
        for thread in self._threads:
            thread.join()


def crowds(team: int, processors: int) -> int:
    """Teams that make the threads of all teams more than there are processors: team − 1 each, beside a first one of
    `team`; 0 where no more than a few can do that.
    """
    if team < 2:
        return 0
    needed = max(0, processors - team) // (team - 1) + 1
    return needed if needed <= _MOST_CROWDS else 0


def processors() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loaded_runtimes() -> set[str]:
    """Paths of the OpenMP runtimes in this process; none where the system doesn't say (it is Linux that does)."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    return {path for path in re.findall(r"/\S+", maps) if _GNU.search(path) or _KMP.search(path)}


def uses_libgomp() -> bool:
    """Whether torch's threads are libgomp's: Intel's and LLVM's take its place where they are loaded beside it."""
    loaded = loaded_runtimes()
    return any(map(_GNU.search, loaded)) and not any(map(_KMP.search, loaded))
