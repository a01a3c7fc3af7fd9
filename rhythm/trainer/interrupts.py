"""Handles SIGTERM and Ctrl-C: the first makes the run save and stop, the second ends it at once."""

from __future__ import annotations

import logging
import os
import signal
from types import FrameType, TracebackType
from typing import Any, Self

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Context that records the first SIGINT or SIGTERM; a second one has its usual effect.

    Works only in the main thread, because Python allows signal handlers only there.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether the run should save and stop."""
        return self.received is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = signal.Signals(number)
        log.warning("%s: will save and stop as soon as possible (send it again to stop at once)", self.received.name)
