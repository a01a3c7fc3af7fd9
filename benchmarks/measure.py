"""Measures time in interleaved rounds, so that disturbances of the machine affect all implementations alike, and
memory.
"""

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
from benchmarks.implementations import Outputs
from benchmarks.shapes import Shape

PEAK_RESET = Path("/proc/self/clear_refs")  # Linux: writing 5 resets the process's peak memory


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one implementation, one value per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class TimedCall:
    """A call to be timed, and its number of threads."""

    run: Callable[[], Outputs]
    threads: int


def interleaved(implementations: Mapping[str, TimedCall], *, rounds: int, least_seconds: float) -> dict[str, Timing]:
    """Time the implementations in interleaved rounds: each one once per round, as the mean over calls that take at
    least `least_seconds` together.

    Every implementation is warmed up first. torch's number of threads is restored.
    """
    before = torch.get_num_threads()
    calls: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in implementations}
    try:
        for name, implementation in implementations.items():
            torch.set_num_threads(implementation.threads)
            first = _seconds(implementation.run, 1)
            warm = first if first > 1.0 else _seconds(implementation.run, 1)
            calls[name] = max(1, math.ceil(least_seconds / warm))
        for _ in range(rounds):
            for name, implementation in implementations.items():
                torch.set_num_threads(implementation.threads)
                seconds[name].append(_seconds(implementation.run, calls[name]))
    finally:
        torch.set_num_threads(before)
    return {name: Timing(tuple(times)) for name, times in seconds.items()}


def ratio(numerator: Timing, denominator: Timing) -> float:
    """Median over the rounds of numerator / denominator, since both times of a round are under the same conditions."""
    return statistics.median(a / b for a, b in zip(numerator.seconds, denominator.seconds, strict=True))


def peak_extra_bytes(shape: Shape, dtype: torch.dtype, op: str, threads: int) -> int:
    """Peak memory in addition to the inputs of one call of an op, measured in a separate process (Linux).

    Raises:
        subprocess.CalledProcessError: the process failed; its output is on stderr.
    """
    arguments = [op, str(shape.tokens), str(dtype).removeprefix("torch."), str(threads)]
    command = [sys.executable, "-m", "benchmarks.peak_memory", *arguments]
    return int(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout)


def _seconds(run: Callable[[], Outputs], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - started) / calls
