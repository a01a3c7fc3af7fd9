"""Shows an analysis's progress: a bar on a terminal, elsewhere a line at least every 30 s, also while generating."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rhythm.system.progress import Heartbeat, Rate, duration


class AnalysisProgress:
    """Shows the number of finished problems and the current phase. Without a console nothing is shown."""

    def __init__(self, console: Console | None, *, problems: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`problems`: their number in the whole analysis. `clock`: returns the time in seconds."""
        shows_bars = console is not None and _shows_bars(console)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[phase]}"),
            console=console,
            disable=not shows_bars,
        )
        self._bar = self._bars.add_task("analyzing", total=problems, phase="")
        self._lines = None if shows_bars else console
        self._problems, self._clock = problems, clock
        self._started = self._phase_began = clock()
        self._phase: Callable[[], str] = lambda: "starting"
        self._done, self._share, self._batch = 0, 0.0, 0
        self._rate = Rate("problem")
        self.heartbeat = Heartbeat(self.status, self._say, clock=clock)
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self._bars.start()
        if self._lines is not None:
            self._open.enter_context(self.heartbeat)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        self._bars.stop()

    def batch(self, problems: int) -> None:
        """Begin a batch of so many problems."""
        self._batch, self._share = problems, 0.0

    def phase(self, name: str | Callable[[], str], share: float) -> None:
        """Set the current phase, or a function that returns it, and the finished fraction of the batch's responses."""
        told: Callable[[], str] = (lambda: name) if isinstance(name, str) else name
        self._phase, self._phase_began, self._share = told, self._clock(), share
        self._bars.update(self._bar, phase=told())

    def end_batch(self) -> None:
        """Count the batch's problems as finished."""
        self._done += self._batch
        self._bars.advance(self._bar, self._batch)
        self._batch, self._share = 0, 0.0

    def status(self) -> str:
        """The status line, for example "4/40 problems, 15.0 s/problem, 9 min left; generating responses for 35 s"."""
        now = self._clock()
        done, doing = self._done + self._share * self._batch, f"{self._phase()} for {duration(now - self._phase_began)}"
        if not done:
            return f"0/{self._problems} problems; {doing}; none is finished yet, so the remaining time is unknown"
        seconds = (now - self._started) / done
        left = duration((self._problems - done) * seconds)
        return f"{done:.3g}/{self._problems} problems, {self._rate.text(seconds)}, {left} left; {doing}"

    def _say(self, line: str) -> None:
        if self._lines is not None:
            _print(self._lines, line)


def finishing(console: Console | None, clock: Callable[[], float] = time.monotonic) -> Heartbeat | nullcontext[None]:
    """Progress lines while tables, figures and the page are written, after the last problem."""
    if console is None or _shows_bars(console):
        return nullcontext()
    began = clock()
    return Heartbeat(
        lambda: f"all problems done; writing tables, figures and the page for {duration(clock() - began)}",
        lambda line: _print(console, line),
        clock=clock,
    )


def _shows_bars(console: Console) -> bool:
    return console.is_terminal or console.is_jupyter


def _print(console: Console, line: str) -> None:
    console.print(f"rhythm-analyze: {line}", soft_wrap=True, markup=False, highlight=False)
