"""How far an evaluation is: a bar on a terminal; elsewhere a line at least every 30 s."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rhythm.system.progress import Heartbeat, Rate, duration


class EvaluationProgress:
    """Responses done, of all tasks together, and the task being evaluated. Without a console nothing is shown."""

    def __init__(
        self, console: Console | None, *, responses: int, kept: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`responses`: of the whole evaluation; `kept`: those that were there before. `clock`: seconds."""
        terminal = console is not None and console.is_terminal
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not terminal,
        )
        self._bar = self._bars.add_task("responses", total=responses, completed=kept)
        self._console = None if terminal else console
        self._responses, self._kept, self._done, self._task = responses, kept, kept, ""
        self._clock, self._began, self._rate = clock, clock(), Rate("response")
        self._heartbeat = Heartbeat(self.status, self._say, clock=clock)
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self._bars.start()
        if self._console is not None:
            self._open.enter_context(self._heartbeat)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        self._bars.stop()

    def task(self, name: str) -> None:
        """Responses of this task come next."""
        self._task = name
        self._bars.update(self._bar, description=name)

    def add(self, responses: int) -> None:
        """So many more are judged and on the disk."""
        self._done += responses
        self._bars.update(self._bar, completed=self._done)

    def status(self) -> str:
        """For a line: "aime24: 96/480 responses, 1.2 responses/s, 5 min left"."""
        text = f"{self._task}: {self._done}/{self._responses} responses"
        if self._done == self._kept:
            return f"{text}; none is done yet, so the remaining time is not known"
        seconds = (self._clock() - self._began) / (self._done - self._kept)
        return f"{text}, {self._rate.text(seconds)}, {duration((self._responses - self._done) * seconds)} left"

    def _say(self, line: str) -> None:
        if self._console is not None:
            self._console.print(f"rhythm-eval: {line}", soft_wrap=True, markup=False, highlight=False)
