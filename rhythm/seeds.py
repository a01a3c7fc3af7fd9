"""Seeds by what they are for.

Everything random in a run is a function of its seed, a purpose and a step, and of nothing that ran before. So a resumed
run draws what an uninterrupted one would have drawn, and no generator state is saved.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *parts: str | int) -> int:
    """A seed in [0, 2^63), different for every `parts`: a purpose and a step, a prompt and a sample, …"""
    digest = hashlib.sha256("/".join(map(str, (seed, *parts))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def analysis_seed(seed: int, index: int) -> int:
    """A seed in [0, 2^31) for each batch of problems, or row, of an analysis.

    Hashes another text than `derive_seed`, and less of it: an analysis that goes on where an earlier one stopped must
    draw the responses that the earlier one would have drawn.
    """
    digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def generator(seed: int, *parts: str | int) -> torch.Generator:
    """A CPU generator seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *parts))
