"""The roles of a cluster run's processes."""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    """The role of a process. The value is its name in metrics and its section in the configuration."""

    TRAIN = "train"
    INFER = "infer"
    ATTN = "attn"

    @property
    def actor(self) -> str:
        """The role's name in messages and plans."""
        return f"actor_{self}"
