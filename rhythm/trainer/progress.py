"""How far a run is: bars with rate and remaining time on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from time import perf_counter
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


class RunProgress:
    """The training steps of a run, what the current one is doing, and the numbers of the last."""

    def __init__(self, console: Console, *, steps: int, done: int) -> None:
        self._bars = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[phase]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._bar = self._bars.add_task("training", total=steps, completed=done, numbers="", phase="")
        self._lines = not console.is_terminal
        self._last_line = -_SECONDS_BETWEEN_LINES
        self._steps = steps
        self._first = done
        self._started = perf_counter()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def phase(self, name: str) -> None:
        """What is being done now."""
        self._bars.update(self._bar, phase=name)

    def step(self, step: int, record: Mapping[str, float]) -> None:
        """A step is done, and these are its numbers."""
        seconds = (perf_counter() - self._started) / (step - self._first)
        numbers = f"{_rate(seconds)}, {record['tokens_per_second']:,.0f} tokens/s, reward {record['reward']:.3f}"
        if "accuracy" in record:
            numbers += f", accuracy {record['accuracy']:.1%}"
        self._bars.update(self._bar, completed=step, numbers=numbers)
        now = perf_counter()
        due = now - self._last_line >= _SECONDS_BETWEEN_LINES or "accuracy" in record or step == self._steps
        if self._lines and due:
            self._last_line = now
            left = (self._steps - step) * seconds
            log.info("step %d/%d: %s, %.0f s left", step, self._steps, numbers, left)


def _rate(seconds: float) -> str:
    return f"{1 / seconds:.1f} steps/s" if seconds < 1 else f"{seconds:.1f} s/step"
