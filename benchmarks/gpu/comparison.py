"""Implementations timed against each other: what ran, what failed, and the rows of the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.gpu.clock import Clock, Run, one_line
from benchmarks.measure import Timing, ratio

OURS = ("statistics", "with_output", "bands")


@dataclass(frozen=True)
class Row:
    """One op at one shape.

    Attributes:
        seconds, seconds_min, seconds_max: median, fastest and slowest of the time named in `by`.
        by: "replayed", or "eager" if the op could not be captured in a CUDA graph (benchmarks/gpu/clock.py).
        eager_seconds, host_seconds: median time of eager calls, and time in which the host issues one.
        flops: the counted FLOPs.
        peak_bytes: peak memory beyond the inputs.
        to_best_forward: ratio to the best plain forward, both by the same kind of time.
    """

    op: str
    tokens: int
    seconds: float
    seconds_min: float
    seconds_max: float
    by: str
    eager_seconds: float
    host_seconds: float
    flops: int
    peak_bytes: int
    to_best_forward: float | None

    @property
    def tflops(self) -> float:
        return self.flops / self.seconds / 1e12

    def json(self) -> dict[str, Any]:
        return asdict(self) | {"tflops": self.tflops}

    def cells(self) -> dict[str, str]:
        """The row of the printed table."""
        return {
            "op": self.op,
            "T": str(self.tokens),
            "ms": f"{1e3 * self.seconds:,.3f}",
            "fastest": f"{1e3 * self.seconds_min:,.3f}",
            "slowest": f"{1e3 * self.seconds_max:,.3f}",
            "by": self.by,
            "eager ms": f"{1e3 * self.eager_seconds:,.3f}",
            "host ms": f"{1e3 * self.host_seconds:,.3f}",
            "TFLOP/s": f"{self.tflops:.1f}",
            "MB beyond inputs": f"{self.peak_bytes / 1e6:,.1f}",
            "over the best forward": "" if self.to_best_forward is None else f"{self.to_best_forward:.3f}",
        }


@dataclass
class Comparison:
    """Implementations to be compared, and their times.

    Attributes:
        runs: the calls to time, by name; only implementations that ran once without an error.
        absent: what can't run on this machine or at this length, and why.
        failed: why an implementation that should have run failed, by name.
        peaks, host: peak memory in bytes, and the host's seconds per call, by name.
        eager, replayed: times by name; a call that could not be captured is in `failed` instead of `replayed`.
    """

    runs: dict[str, Run] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)
    eager: dict[str, Timing] = field(default_factory=dict)
    replayed: dict[str, Timing] = field(default_factory=dict)

    def enter(self, name: str, make: Callable[[], Run], clock: Clock) -> None:
        """Build and run an implementation. If it raises, the error is kept and the others still run."""
        try:
            run = make()
            run()
            self.peaks[name] = clock.peak_bytes(run)
        except Exception as error:  # another library's error, or out of memory
            self.failed[name] = one_line(error)
        else:
            self.runs[name] = run

    def measure(self, clock: Clock, rounds: int) -> None:
        self.host = {name: clock.host_seconds(run) for name, run in self.runs.items()}
        self.eager = clock.interleaved(self.runs, rounds)
        self.replayed, reasons = clock.interleaved_replays(self.runs, rounds)
        self.failed |= {name: f"not captured in a graph, {reason}" for name, reason in reasons.items()}

    def best(self, plain: list[str]) -> str | None:
        """The fastest plain forward, by replays if there are any."""
        timings = self.replayed if any(name in self.replayed for name in plain) else self.eager
        present = [name for name in plain if name in timings]
        return min(present, key=lambda name: timings[name].median) if present else None

    def rows(self, tokens: int, flops: Mapping[str, int], best: str | None) -> tuple[Row, ...]:
        return tuple(self._row(name, tokens, flops[name], best) for name in self.runs)

    def ours_failed(self) -> bool:
        return any(name in OURS for name in self.failed)

    def not_measured(self) -> tuple[str, ...]:
        return tuple(f"{name}: {reason}" for name, reason in self.failed.items())

    def _row(self, name: str, tokens: int, flops: int, best: str | None) -> Row:
        by, timings = ("replayed", self.replayed) if name in self.replayed else ("eager", self.eager)
        timing = timings[name]
        share = ratio(timing, timings[best]) if best is not None and best in timings else None
        seconds = timing.median, min(timing.seconds), max(timing.seconds)
        eager, host = self.eager[name].median, self.host[name]
        return Row(name, tokens, *seconds, by, eager, host, flops, self.peaks[name], share)
