"""The roles of a cluster run's processes."""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    """What a process does. The value is the role's name in metrics, and that of its section in the configuration."""

    TRAIN = "train"
    INFER = "infer"
    ATTN = "attn"

    @property
    def actor(self) -> str:
        """Its name in messages and plans."""
        return f"actor_{self}"
