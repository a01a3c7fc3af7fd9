"""Measures the seconds spent in blocks of work on a device."""

from __future__ import annotations

from time import perf_counter

import torch


class DeviceWatch:
    """Sums the seconds of the blocks it is used on. On a GPU it records events, and waits only when `seconds` is
    read.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self._cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            self._events.append((start, end))
            start.record()
        self._started = perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            self._events[-1][1].record()
        else:
            self._seconds += perf_counter() - self._started

    @property
    def seconds(self) -> float:
        """Seconds of all blocks so far. On a GPU this waits for the last one to finish."""
        for _, end in self._events:
            end.synchronize()
        return self._seconds + sum(float(start.elapsed_time(end)) for start, end in self._events) / 1000
