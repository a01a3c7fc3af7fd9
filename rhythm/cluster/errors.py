"""What can happen to a process that was asked to do something."""

from __future__ import annotations


class LostError(RuntimeError):
    """Processes died, or missed their deadline and were killed. `lost`: each by name, and why."""

    def __init__(self, task: str, lost: dict[str, str]) -> None:
        super().__init__(f"{task}: " + "; ".join(f"{name} {why}" for name, why in lost.items()))
        self.lost = lost


class TrainLostError(LostError):
    """A rank of actor_train is gone, and with it the state of the whole group since the last checkpoint."""


class RemoteError(RuntimeError):
    """An exception inside a process; the message holds the traceback from there."""
