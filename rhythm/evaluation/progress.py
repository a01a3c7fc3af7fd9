"""Shows an evaluation's progress: a bar on a terminal, elsewhere a line at least every 30 s."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rhythm.system.display import ProgressDisplay, say_as
from rhythm.system.progress import Rate, duration


class EvaluationProgress(ProgressDisplay):
    """Shows the number of responses done, of all tasks together, and the task being evaluated."""

    def __init__(
        self, console: Console | None, *, responses: int, kept: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`responses`: of the whole evaluation; `kept`: those that were there before. `clock`: seconds."""
        super().__init__(
            console,
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            description="responses",
            total=responses,
            done=kept,
            say=say_as("rhythm-eval", console),
            clock=clock,
        )
        self._responses, self._kept, self._done, self._task = responses, kept, kept, ""
        self._began, self._rate = clock(), Rate("response")

    def task(self, name: str) -> None:
        """Set the task whose responses come next."""
        self._task = name
        self._bars.update(self._bar, description=name)

    def add(self, responses: int) -> None:
        """Count responses that are scored and on disk."""
        self._done += responses
        self._bars.update(self._bar, completed=self._done)

    def status(self) -> str:
        """For a line: "aime24: 96/480 responses, 1.2 responses/s, 5 min left"."""
        text = f"{self._task}: {self._done}/{self._responses} responses"
        if self._done == self._kept:
            return f"{text}; none is done yet, so the remaining time is not known"
        seconds = (self._clock() - self._began) / (self._done - self._kept)
        return f"{text}, {self._rate.text(seconds)}, {duration((self._responses - self._done) * seconds)} left"
