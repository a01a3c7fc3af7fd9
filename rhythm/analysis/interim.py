"""Shows an analysis while it goes on: report.html and partial.json of the responses that are there."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rhythm.analysis.page import write_page
from rhythm.analysis.results import PARTIAL, Analysis, write_json

PAUSE = 20.0
"""Pause between two pages, as a multiple of the time that the first of them took: pages take at most 1/21 of the time.
"""


class InterimPages:
    """Writes the page of the first response at once, and then one now and then."""

    def __init__(
        self,
        summarize: Callable[[Sequence[str]], Analysis],
        *,
        first: Callable[[Path], None] = lambda path: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            summarize: the analysis of the responses with these names, with `so_far`.
            first: called with the path of the first page.
            clock: returns the time in seconds.
        """
        self._summarize, self._first, self._clock = summarize, first, clock
        self._due = -math.inf

    def saved(self, names: Sequence[str]) -> None:
        """Write partial.json and report.html if it is time. `names`: of all responses that are measured, in order.

        Raises OSError naming the file.
        """
        began = self._clock()
        if began < self._due:
            return
        analysis = self._summarize(names)
        write_json(analysis, analysis.directory / PARTIAL)
        path = write_page(analysis)
        now = self._clock()
        if math.isinf(self._due):
            self._first(path)
        self._due = now + PAUSE * (now - began)
