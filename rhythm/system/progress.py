"""Progress as log lines, for output that is not a terminal: rates, remaining time, and a line every 30 seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

SECONDS_BETWEEN_SIGNS = 30.0


class Rate:
    """Formats a rate as seconds per piece of work or pieces per second: whichever is at least 1 at first, then always
    that unit.
    """

    def __init__(self, piece: str) -> None:
        """`piece`: "step" gives "14.2 s/step" or "3.1 steps/s"."""
        self._piece = piece
        self._inverted: bool | None = None

    def text(self, seconds: float) -> str:
        """`seconds`: time per piece."""
        seconds = max(seconds, 1e-9)
        if self._inverted is None:
            self._inverted = seconds < 1
        value = 1 / seconds if self._inverted else seconds
        number = f"{value:,.1f}" if value >= 1 else f"{value:.2g}"
        return f"{number} {self._piece}s/s" if self._inverted else f"{number} s/{self._piece}"


def duration(seconds: float) -> str:
    """Format seconds as "45 s", "12 min" or "3 h 05 min"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


class Heartbeat:
    """Writes a status line, from its own thread, whenever no line was written for 30 seconds within the block.

    with Heartbeat(lambda: "step 3 of 8", log.info) as heartbeat:
        ...  # call heartbeat.said() after writing a line
    """

    def __init__(
        self,
        status: Callable[[], str],
        say: Callable[[str], object],
        *,
        every: float = SECONDS_BETWEEN_SIGNS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`status`: returns the line; `say`: writes it; `every`: seconds; `clock`: returns the time in seconds."""
        self._status, self._say, self._every, self._clock = status, say, every, clock
        self._last = clock()
        self._left = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.said()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        if self._thread is not None:
            self._thread.join()

    def said(self) -> None:
        """Tell the heartbeat that a line was written, so that the next one is due `every` seconds from now."""
        self._last = self._clock()

    def beat(self) -> None:
        """Write the status line if it is due."""
        if self._clock() - self._last >= self._every:
            self.said()
            self._say(self._status())

    def _run(self) -> None:
        while not self._left.wait(min(1.0, self._every / 4)):
            self.beat()
