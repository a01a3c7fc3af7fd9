"""Time and memory: interleaved rounds, so that whatever disturbs the machine disturbs all contestants alike."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import ROOT
from benchmarks.contestants import Outputs
from benchmarks.shapes import Shape

PEAK_RESET = Path("/proc/self/clear_refs")  # Linux: writing 5 starts the process's peak memory anew


@dataclass(frozen=True)
class Timing:
    """Seconds a call of every round, of one contestant."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Contestant:
    """A callable to time on that many threads."""

    run: Callable[[], Outputs]
    threads: int


def race(contestants: Mapping[str, Contestant], *, rounds: int, least_seconds: float) -> dict[str, Timing]:
    """Times every contestant once a round, in turn; each time is the mean of calls that take `least_seconds` together.

    Every contestant is warmed up first. The number of threads is as before when this returns.
    """
    before = torch.get_num_threads()
    calls: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    try:
        for name, contestant in contestants.items():
            torch.set_num_threads(contestant.threads)
            first = _seconds(contestant.run, 1)
            warm = first if first > 1.0 else _seconds(contestant.run, 1)
            calls[name] = max(1, math.ceil(least_seconds / warm))
        for _ in range(rounds):
            for name, contestant in contestants.items():
                torch.set_num_threads(contestant.threads)
                seconds[name].append(_seconds(contestant.run, calls[name]))
    finally:
        torch.set_num_threads(before)
    return {name: Timing(tuple(times)) for name, times in seconds.items()}


def ratio(numerator: Timing, denominator: Timing) -> float:
    """Median over the rounds of numerator / denominator: both of a round met the same machine."""
    return statistics.median(a / b for a, b in zip(numerator.seconds, denominator.seconds, strict=True))


def peak_extra_bytes(shape: Shape, dtype: torch.dtype, op: str, threads: int) -> int:
    """Peak memory beyond the inputs of one call of an op, in a process of its own (Linux).

    Raises:
        subprocess.CalledProcessError: the process failed; its words are on stderr.
    """
    arguments = [op, str(shape.tokens), str(dtype).removeprefix("torch."), str(threads)]
    command = [sys.executable, "-m", "benchmarks.peak_memory", *arguments]
    return int(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout)


def _seconds(run: Callable[[], Outputs], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - started) / calls
