"""Errors of remote calls: the process died, timed out or raised."""

from __future__ import annotations


class LostError(RuntimeError):
    """Processes died, or missed their deadline and were killed. `lost`: process name → reason."""

    def __init__(self, task: str, lost: dict[str, str]) -> None:
        super().__init__(f"{task}: " + "; ".join(f"{name} {why}" for name, why in lost.items()))
        self.lost = lost


class TrainLostError(LostError):
    """The run must go back to its last checkpoint: a rank of actor_train was lost, or a replica that generated ahead,
    whose weights the trainer has no more.
    """


class RemoteError(RuntimeError):
    """A process raised an exception; the message contains its traceback, or the file that does."""
