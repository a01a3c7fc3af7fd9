"""Seeds by purpose and step.

Everything random in a run is a function of (seed, purpose, step) and of nothing that ran before, so a resumed
run draws what an uninterrupted one would have drawn, and no generator state needs to be kept.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, purpose: str, step: int) -> int:
    """A seed in [0, 2^63), different for every purpose and step."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, purpose: str, step: int) -> torch.Generator:
    """A CPU generator seeded so."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, step))
