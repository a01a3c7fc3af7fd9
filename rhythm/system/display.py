"""A command's progress: a bar on a terminal; elsewhere a line whenever 30 s pass without one."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import Progress, ProgressColumn

from rhythm.system.progress import Heartbeat


class ProgressDisplay(ABC):
    """Shows progress within a with block. Without a console nothing is shown."""

    def __init__(
        self,
        console: Console | None,
        *columns: ProgressColumn,
        description: str,
        total: int,
        say: Callable[[str], object],
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
        **fields: Any,
    ) -> None:
        """
        Args:
            columns: of the bar.
            description, total, done, fields: of its task.
            say: writes a line where there is no terminal.
            clock: returns the time in seconds.
        """
        bars = console is not None and shows_bars(console)
        self.lines = console is not None and not bars
        self._bars = Progress(*columns, console=console, disable=not bars)
        self._bar = self._bars.add_task(description, total=total, completed=done, **fields)
        self._clock = clock
        self.heartbeat = Heartbeat(self.status, say, clock=clock)
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self._bars.start()
        if self.lines:
            self._open.enter_context(self.heartbeat)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        self._bars.stop()

    @abstractmethod
    def status(self) -> str:
        """The line that is written where there is no terminal."""


def shows_bars(console: Console) -> bool:
    """Whether a bar can be drawn there."""
    return console.is_terminal or console.is_jupyter


def say_as(command: str, console: Console | None) -> Callable[[str], None]:
    """Writes lines that begin with the command's name; without a console nothing."""

    def say(line: str) -> None:
        if console is not None:
            console.print(f"{command}: {line}", soft_wrap=True, markup=False, highlight=False)

    return say
