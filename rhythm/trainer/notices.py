"""What a run should say once about itself: that nothing can be learned from its rewards, or that no response ends."""

from __future__ import annotations

import logging

from rhythm.trainer.metrics import Record

log = logging.getLogger(__name__)

STEPS_IN_A_ROW = 3  # a single step of few prompts may be chance


class Notices:
    """Warns, each at most once, after three steps in a row (or all steps, of a shorter run) in which the rewards of
    every group tie, or no response finishes.
    """

    def __init__(self, steps: int) -> None:
        """`steps`: left in the run."""
        self._needed = max(1, min(STEPS_IN_A_ROW, steps))
        self._in_a_row = {"ties": 0, "unfinished": 0}

    def look(self, record: Record) -> None:
        """A step is done, and these are its numbers."""
        if self._due("ties", record["zero_variance_share"] == 1):
            log.warning(
                "step %d: within every group all rewards tie (mean reward %.3g), %d step(s) in a row: all advantages "
                "are 0 and nothing is learned from them. Too hard, too easy, a format the model doesn't know, or "
                "a faulty judge? zero_variance_share in the metrics counts it; this is said once",
                record["step"],
                record["reward"],
                self._needed,
            )
        if self._due("unfinished", record["finished_share"] == 0):
            log.warning(
                "step %d: no response finished within sampling.max_new_tokens, %d step(s) in a row (mean length %.0f "
                "tokens). finished_share in the metrics counts it; this is said once",
                record["step"],
                self._needed,
                record["response_length"],
            )

    def _due(self, what: str, happened: bool) -> bool:
        """Whether `what` has now happened often enough, for the first time."""
        before = self._in_a_row[what]
        if before < self._needed:
            self._in_a_row[what] = before + 1 if happened else 0
        return before < self._needed == self._in_a_row[what]
