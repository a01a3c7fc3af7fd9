"""What the row sweep hands to the column sweep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Softmax:
    """The softmax of each response row in two parts: A = 2^((product − largest)·scale − log2_sum).

    One number would not do: the fp32 lse of large scores has no room for the digits of log2_sum.

    Attributes:
        parts: fp32 [Hq, T, 2], largest (a product of q and k, or of −q for a negative scale) and log2_sum; log2_sum is
            NaN where a row is undefined.
        steep: int32 [1], 0 before the sweep; 1 after it where some row's exponents reach STEEP (tiles.py).
    """

    parts: Tensor
    steep: Tensor

    @staticmethod
    def empty(heads: int, tokens: int, device: torch.device) -> Softmax:
        """Uninitialized memory; undefined_results sets steep to 0."""
        parts_HT2 = torch.empty((heads, tokens, 2), device=device)
        return Softmax(parts_HT2, torch.empty(1, dtype=torch.int32, device=device))
