"""Errors of remote calls: the process died, timed out or raised."""

from __future__ import annotations


class LostError(RuntimeError):
    """Processes died, or missed their deadline and were killed. `lost`: process name → reason."""

    def __init__(self, task: str, lost: dict[str, str]) -> None:
        super().__init__(f"{task}: " + "; ".join(f"{name} {why}" for name, why in lost.items()))
        self.lost = lost


class TrainLostError(LostError):
    """A rank of actor_train was lost; the whole group must restart from the last checkpoint."""


class RemoteError(RuntimeError):
    """A process raised an exception; the message contains its traceback, or the file that does."""
