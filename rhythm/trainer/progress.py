"""Shows a run's progress: a bar with rate and remaining time on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from time import perf_counter

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rhythm.system.display import ProgressDisplay
from rhythm.system.progress import Rate, duration

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


class RunProgress(ProgressDisplay):
    """Shows the step count, the current phase and the last step's numbers.

    Where stderr is not a terminal: a line after a step, at most one every 10 s, and a line with the current phase
    whenever 30 s have passed without a line.
    """

    def __init__(self, console: Console, *, steps: int, done: int, clock: Callable[[], float] = perf_counter) -> None:
        """`done`: steps finished before this process started. `clock`: returns the time in seconds."""
        super().__init__(
            console,
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[phase]}"),
            description="training",
            total=steps,
            done=done,
            say=log.info,
            clock=clock,
            numbers="",
            phase="",
        )
        self._last_line = -_SECONDS_BETWEEN_LINES
        self._steps, self._first, self._done = steps, done, done
        self._started = self._phase_began = clock()
        self._phase = "starting"
        self._rate, self._seconds = Rate("step"), 0.0

    def phase(self, name: str) -> None:
        """Set the name of the current phase."""
        self._phase, self._phase_began = name, self._clock()
        self._bars.update(self._bar, phase=name)

    def begin_steps(self) -> None:
        """Start measuring the rate: the time before the first step, such as the first evaluation, doesn't count."""
        self._started = self._clock()

    def step(self, step: int, record: Mapping[str, float]) -> None:
        """Show the numbers of a finished step."""
        now = self._clock()
        self._done, self._seconds = step, (now - self._started) / (step - self._first)
        rate = self._rate.text(self._seconds)
        numbers = f"{rate}, {record['tokens_per_second']:,.0f} tokens/s, reward {record['reward']:.3f}"
        if "accuracy" in record:
            numbers += f", accuracy {record['accuracy']:.1%}"
        self._bars.update(self._bar, completed=step, numbers=numbers)
        due = now - self._last_line >= _SECONDS_BETWEEN_LINES or "accuracy" in record or step == self._steps
        if self.lines and due:
            self._last_line = now
            self.heartbeat.said()
            log.info("step %d/%d: %s, %s left", step, self._steps, numbers, self._left())

    def _left(self) -> str:
        return duration((self._steps - self._done) * self._seconds)

    def status(self) -> str:
        """The status line, for example "after step 4/40: rollout for 35 s; 1.2 s/step, 45 s left"."""
        text = f"after step {self._done}/{self._steps}: {self._phase} for {duration(self._clock() - self._phase_began)}"
        if self._done == self._first:
            return f"{text}; no step is finished yet, so the remaining time is unknown"
        return f"{text}; {self._rate.text(self._seconds)}, {self._left()} left"
