"""Warns once per run when all rewards tie, so that nothing is learned, or when no response finishes."""

from __future__ import annotations

import logging

from rhythm.trainer.metrics import Record

log = logging.getLogger(__name__)

STEPS_IN_A_ROW = 3  # in a single step with few prompts it may be chance


class Notices:
    """Warns after three steps in a row (or all steps of a shorter run) in which the rewards of every group tie, or no
    response finishes. Each of the two warnings is logged at most once.
    """

    def __init__(self, steps: int) -> None:
        """`steps`: how many are left in the run."""
        self._needed = max(1, min(STEPS_IN_A_ROW, steps))
        self._in_a_row = {"ties": 0, "unfinished": 0}

    def look(self, record: Record) -> None:
        """Check the numbers of a finished step, and warn if a warning is due."""
        if self._due("ties", record["zero_variance_share"] == 1):
            log.warning(
                "step %d: within every group all rewards tie (mean reward %.3g), %d step(s) in a row: all advantages "
                "are 0 and nothing is learned from them. Is the task too hard or too easy, its format unknown to the "
                "model, or its reward function faulty? See zero_variance_share in the metrics; this warning is shown "
                "once",
                record["step"],
                record["reward"],
                self._needed,
            )
        if self._due("unfinished", record["finished_share"] == 0):
            log.warning(
                "step %d: no response finished within sampling.max_new_tokens, %d step(s) in a row (mean length %.0f "
                "tokens). See finished_share in the metrics; this warning is shown once",
                record["step"],
                self._needed,
                record["response_length"],
            )

    def _due(self, what: str, happened: bool) -> bool:
        """Whether `what` has now happened often enough in a row, for the first time."""
        before = self._in_a_row[what]
        if before < self._needed:
            self._in_a_row[what] = before + 1 if happened else 0
        return before < self._needed == self._in_a_row[what]
