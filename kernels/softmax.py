"""What the row sweep hands to the column sweep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Softmax:
    """Of each response row what its weights are made of: A = 2^((product − largest)·scale − log2_sum).

    In two parts, since the fp32 lse of large scores has no room for the digits of the second.

    Attributes:
        parts: fp32 [Hq, T, 2], largest (a product of q and k, or of −q for a negative scale) and log2_sum; log2_sum is
            NaN where a row is undefined.
        steep: int32 [1], 0 before the sweep; 1 after it where some row's exponents reach STEEP (tiles.py).
    """

    parts: Tensor
    steep: Tensor

    @staticmethod
    def empty(heads: int, tokens: int, device: torch.device) -> Softmax:
        """Nothing is written yet, steep neither."""
        parts_HT2 = torch.empty((heads, tokens, 2), device=device)
        return Softmax(parts_HT2, torch.empty(1, dtype=torch.int32, device=device))
