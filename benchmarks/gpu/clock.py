"""Time and memory of calls on a device, and the budget of a whole run."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.measure import Timing

Run = Callable[[], Any]
FLUSH_BYTES = 256 << 20  # more than any second-level cache


class Clock(ABC):
    """How a device is timed."""

    device: str
    backend = "triton"

    @abstractmethod
    def seconds(self, run: Run) -> float:
        """Of one call, with cold caches."""

    @abstractmethod
    def graph_seconds(self, run: Run) -> float:
        """Of one call without what the host needs to launch it."""

    @abstractmethod
    def peak_bytes(self, run: Run) -> int:
        """Largest memory during a call, beyond what stood before it."""

    def race(self, runs: Mapping[str, Run], rounds: int) -> dict[str, Timing]:
        """Every contestant once a round, in turn, after two calls to warm up (and compile)."""
        for run in runs.values():
            run()
            run()
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                seconds[name].append(self.seconds(run))
        return {name: Timing(tuple(times)) for name, times in seconds.items()}


class CudaClock(Clock):
    device = "cuda"

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def seconds(self, run: Run) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def graph_seconds(self, run: Run) -> float:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return sorted(self.seconds(graph.replay) for _ in range(9))[4]

    def peak_bytes(self, run: Run) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)


class InterpreterClock(Clock):
    """The wall clock, for tests on the CPU: no graph, no peak memory."""

    device = "cpu"

    def seconds(self, run: Run) -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    def graph_seconds(self, run: Run) -> float:
        return self.seconds(run)

    def peak_bytes(self, run: Run) -> int:
        run()
        return 0


class Budget:
    """Wall-clock seconds that a run may take."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._end = now, now() + seconds

    @property
    def left(self) -> float:
        return self._end - self._now()
