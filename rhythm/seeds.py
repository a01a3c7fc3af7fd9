"""Derives seeds from a run's seed, a purpose and a step.

Nothing random in a run depends on what ran before. So a resumed run draws the same numbers as an uninterrupted one, and
no generator state has to be saved.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *parts: str | int) -> int:
    """A seed in [0, 2^63) that depends on `seed` and all `parts`, for example a purpose and a step."""
    digest = hashlib.sha256("/".join(map(str, (seed, *parts))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def analysis_seed(seed: int, index: int) -> int:
    """A seed in [0, 2^31) per batch of problems, or per row, of an analysis.

    It differs from `derive_seed` so that a continued analysis draws the same responses as the version that began it.
    """
    digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def generator(seed: int, *parts: str | int) -> torch.Generator:
    """A CPU generator seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *parts))
