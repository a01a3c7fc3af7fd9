"""Measures time and memory of calls on a device, and keeps the time budget of a whole run.

A call has three times:

- replayed: a replay of a CUDA graph of the call, thus device time without Python and single launches. Ratios to
  targets use it.
- eager: the call as it is written, launched behind work that keeps the device busy until the host is done: device time
  with the gaps between launches, as in a program whose host runs ahead.
- host: the time in which the host issues the call. If the device would be idle, a call takes at least this long.
"""

from __future__ import annotations

import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Timing

Run = Callable[[], Any]
FLUSH_BYTES = 256 << 20  # more than any second-level cache
POISON = 12345.0
# A sleep keeps the device busy while the host launches. Cycles: least, most (0.1 s), and per second of host time.
SLEEP, LONGEST_SLEEP, CYCLES_A_SECOND = 2_000_000, 200_000_000, 2e9


class Clock(ABC):
    """Times calls on one device."""

    device: str
    backend = "triton"
    name: str

    @abstractmethod
    def seconds(self, run: Run) -> float:
        """Device time of one call with cold caches; launches are hidden behind work queued before it."""

    @abstractmethod
    def captured(self, run: Run) -> Run:
        """Capture the call in a CUDA graph. Returns a callable that replays it and returns always the same tensors."""

    @abstractmethod
    def peak_bytes(self, run: Run) -> int:
        """Peak memory of a call minus the memory in use before it. Waits for the call, so its errors are raised."""

    def host_seconds(self, run: Run) -> float:
        """Time in which the host issues a call; median of three."""
        return sorted(self._issued(run) for _ in range(3))[1]

    def free(self) -> None:
        """Free what the previous part left: graphs hold memory until they are garbage collected."""
        gc.collect()

    def poisoned_replay(self, run: Run) -> Any:
        """Results of a replay whose result tensors were overwritten before, so a correct result was computed by it."""
        replay = self.captured(run)
        for result in _tensors(replay()):
            result.fill_(POISON)
        return replay()

    def interleaved(self, runs: Mapping[str, Run], rounds: int) -> dict[str, Timing]:
        """Time the implementations in interleaved rounds: each one once per round, after two calls to warm up."""
        for run in runs.values():
            run()
            run()
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                seconds[name].append(self.seconds(run))
        return {name: Timing(tuple(times)) for name, times in seconds.items()}

    def interleaved_replays(self, runs: Mapping[str, Run], rounds: int) -> tuple[dict[str, Timing], dict[str, str]]:
        """`interleaved` with CUDA graphs. Also returns, by name, why an implementation could not be captured."""
        replays, reasons = {}, {}
        for name, run in runs.items():
            try:
                replays[name] = self.captured(run)
            except Exception as error:  # another library's error affects only its own row
                reasons[name] = one_line(error)
        return self.interleaved(replays, rounds), reasons

    def _issued(self, run: Run) -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started


class CudaClock(Clock):
    device, name = "cuda", "cuda"

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self._cycles: dict[Run, int] = {}

    def seconds(self, run: Run) -> float:
        if run not in self._cycles:
            torch.cuda.synchronize()
            wanted = int(2 * CYCLES_A_SECOND * self._issued(run))
            self._cycles[run] = min(max(wanted, SLEEP), LONGEST_SLEEP)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(self._cycles[run])
        self._flush.zero_()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def captured(self, run: Run) -> Run:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
            run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run()

        def replay() -> Any:
            graph.replay()
            return results

        return replay

    def host_seconds(self, run: Run) -> float:
        def issued() -> float:
            torch.cuda.synchronize()
            return self._issued(run)

        seconds = sorted(issued() for _ in range(3))[1]
        torch.cuda.synchronize()
        return seconds

    def peak_bytes(self, run: Run) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)

    def free(self) -> None:
        self._cycles.clear()
        super().free()
        torch.cuda.empty_cache()


class InterpreterClock(Clock):
    """Wall-clock times, for tests on the CPU: no graphs, no peak memory."""

    device, name = "cpu", "interpreter"

    def seconds(self, run: Run) -> float:
        return self._issued(run)

    def captured(self, run: Run) -> Run:
        return run

    def peak_bytes(self, run: Run) -> int:
        run()
        return 0

    def poisoned_replay(self, run: Run) -> Any:
        """Nothing is replayed here, so there is nothing to overwrite."""
        return run()


class MadeUpClock(InterpreterClock):
    """Made-up times, computed from an implementation's name, for rehearsals: everything runs once, unmeasured."""

    name = "rehearsal"

    @staticmethod
    def made_up(name: str) -> float:
        """Between 1 and 2 ms."""
        return (1 + sum(name.encode()) % 97 / 97) / 1e3

    def seconds(self, run: Run) -> float:
        run()
        return 1e-3

    def host_seconds(self, run: Run) -> float:
        return 2e-4

    def peak_bytes(self, run: Run) -> int:
        return 0

    def interleaved(self, runs: Mapping[str, Run], rounds: int) -> dict[str, Timing]:
        """1.5 times the made-up times of replays. Nothing runs, since all implementations ran before."""
        return {name: Timing(tuple(1.5 * x for x in self._times(name, rounds))) for name in runs}

    def interleaved_replays(self, runs: Mapping[str, Run], rounds: int) -> tuple[dict[str, Timing], dict[str, str]]:
        timings, reasons = {}, {}
        for name, run in runs.items():
            try:
                self.captured(run)()
                timings[name] = Timing(self._times(name, rounds))
            except Exception as error:  # as on a GPU: affects only its own row
                reasons[name] = one_line(error)
        return timings, reasons

    def _times(self, name: str, rounds: int) -> tuple[float, ...]:
        return tuple(self.made_up(name) * (1 + turn / 100) for turn in range(rounds))


class Budget:
    """The wall-clock seconds left to a run."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._end = now, now() + seconds

    @property
    def left(self) -> float:
        return self._end - self._now()


def clock_of(device: str) -> Clock | None:
    """The clock for cuda, interpreter or rehearsal; None for cuda without a GPU."""
    if device == "cuda":
        return CudaClock() if torch.cuda.is_available() else None
    return MadeUpClock() if device == "rehearsal" else InterpreterClock()


def one_line(error: BaseException) -> str:
    """The error's type and first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _tensors(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    values = results.values() if isinstance(results, Mapping) else results if isinstance(results, tuple | list) else ()
    return [tensor for value in values for tensor in _tensors(value)]
