"""How far a run is: bars with rate and remaining time on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
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

from rhythm.system.progress import Heartbeat, Rate, duration

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


class RunProgress:
    """The training steps of a run, what the current one is doing, and the numbers of the last.

    Where there is no terminal: a line after a step, no more than one in 10 s; and one of what is being done whenever
    30 s have passed without any.
    """

    def __init__(self, console: Console, *, steps: int, done: int, clock: Callable[[], float] = perf_counter) -> None:
        """`done`: steps of the run that are behind it. `clock`: seconds."""
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
        self._clock = clock
        self._last_line = -_SECONDS_BETWEEN_LINES
        self._steps, self._first, self._done = steps, done, done
        self._started = self._phase_began = clock()
        self._phase = "starting"
        self._rate, self._seconds = Rate("step"), 0.0
        self.heartbeat = Heartbeat(self._status, log.info, clock=clock)
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self._bars.start()
        if self._lines:
            self._open.enter_context(self.heartbeat)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        self._bars.stop()

    def phase(self, name: str) -> None:
        """What is being done now."""
        self._phase, self._phase_began = name, self._clock()
        self._bars.update(self._bar, phase=name)

    def begin_steps(self) -> None:
        """The first step begins: what came before it, such as the evaluation of the start, is no part of the rate."""
        self._started = self._clock()

    def step(self, step: int, record: Mapping[str, float]) -> None:
        """A step is done, and these are its numbers."""
        now = self._clock()
        self._done, self._seconds = step, (now - self._started) / (step - self._first)
        rate = self._rate.text(self._seconds)
        numbers = f"{rate}, {record['tokens_per_second']:,.0f} tokens/s, reward {record['reward']:.3f}"
        if "accuracy" in record:
            numbers += f", accuracy {record['accuracy']:.1%}"
        self._bars.update(self._bar, completed=step, numbers=numbers)
        due = now - self._last_line >= _SECONDS_BETWEEN_LINES or "accuracy" in record or step == self._steps
        if self._lines and due:
            self._last_line = now
            self.heartbeat.said()
            log.info("step %d/%d: %s, %s left", step, self._steps, numbers, self._left())

    def _left(self) -> str:
        return duration((self._steps - self._done) * self._seconds)

    def _status(self) -> str:
        text = f"after step {self._done}/{self._steps}: {self._phase} for {duration(self._clock() - self._phase_began)}"
        if self._done == self._first:
            return f"{text}; no step is done yet, so the remaining time is not known"
        return f"{text}; {self._rate.text(self._seconds)}, {self._left()} left"
