"""Shows an analysis's progress: a bar on a terminal, elsewhere a line at least every 30 s, also while generating."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rhythm.system.display import ProgressDisplay, say_as, shows_bars
from rhythm.system.progress import Heartbeat, Rate, duration

COMMAND = "rhythm-analyze"


class AnalysisProgress(ProgressDisplay):
    """Shows the number of finished problems and the current phase."""

    def __init__(self, console: Console | None, *, problems: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`problems`: their number in the whole analysis. `clock`: returns the time in seconds."""
        super().__init__(
            console,
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[phase]}"),
            description="analyzing",
            total=problems,
            say=say_as(COMMAND, console),
            clock=clock,
            phase="",
        )
        self._problems, self._say = problems, say_as(COMMAND, console)
        self._started = self._phase_began = clock()
        self._phase: Callable[[], str] = lambda: "starting"
        self._done, self._share, self._batch = 0, 0.0, 0
        self._measured, self._responses = 0, 0
        self._rate = Rate("problem")

    def batch(self, problems: int, share: float) -> None:
        """Begin a batch of so many problems, of which a fraction is finished already."""
        self._batch, self._share = problems, share

    def reached(self, share: float) -> None:
        """Set the finished fraction of the batch."""
        self._share = share

    def phase(self, name: str | Callable[[], str]) -> None:
        """Set the current phase, or a function that returns it."""
        told: Callable[[], str] = (lambda: name) if isinstance(name, str) else name
        self._phase, self._phase_began = told, self._clock()
        self._bars.update(self._bar, phase=told())

    @contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """Context of a phase within the current one, which then goes on."""
        outer = self._phase, self._phase_began
        self.phase(name)
        try:
            yield
        finally:
            self._phase, self._phase_began = outer
            self._bars.update(self._bar, phase=self._phase())

    def measured(self, responses: int, of: int) -> None:
        """How many responses of the analysis have been measured."""
        self._measured, self._responses = responses, of

    def first_page(self, path: Path) -> None:
        """Say where the first results are."""
        self._say(f"{path} shows {self._of_responses()}, and more as they come")

    def _of_responses(self) -> str:
        return f"{self._measured} of {self._responses} response{'' if self._responses == 1 else 's'}"

    def end_batch(self) -> None:
        """Count the batch's problems as finished."""
        self._done += self._batch
        self._bars.advance(self._bar, self._batch)
        self._batch, self._share = 0, 0.0

    def status(self) -> str:
        """The status line, for example "4/40 problems, 15.0 s/problem, 9 min left; generating responses for 35 s; 6 of
        40 responses measured".
        """
        now = self._clock()
        done, doing = self._done + self._share * self._batch, f"{self._phase()} for {duration(now - self._phase_began)}"
        if not done:
            return f"0/{self._problems} problems; {doing}; none is finished yet, so the remaining time is unknown"
        doing += f"; {self._of_responses()} measured" if self._measured else ""
        seconds = (now - self._started) / done
        left = duration((self._problems - done) * seconds)
        return f"{done:.3g}/{self._problems} problems, {self._rate.text(seconds)}, {left} left; {doing}"


def finishing(console: Console | None, clock: Callable[[], float] = time.monotonic) -> Heartbeat | nullcontext[None]:
    """Progress lines while tables, figures and the page are written, after the last problem."""
    if console is None or shows_bars(console):
        return nullcontext()
    began = clock()
    return Heartbeat(
        lambda: f"all problems done; writing tables, figures and the page for {duration(clock() - began)}",
        say_as(COMMAND, console),
        clock=clock,
    )


@contextmanager
def working(console: Console | None, clock: Callable[[], float] = time.monotonic) -> Iterator[Callable[[str], object]]:
    """Shows what a with block says it is doing: on a terminal at once, elsewhere in a line at least every 30 s."""
    if console is None:
        yield lambda doing: None
    elif shows_bars(console):
        with console.status("…") as status:
            yield status.update
    else:
        said, began = ["starting"], clock()
        with Heartbeat(lambda: f"{said[-1]}, after {duration(clock() - began)}", say_as(COMMAND, console), clock=clock):
            yield said.append
