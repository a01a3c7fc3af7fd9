"""RMSNorm for Megatron's `local` layers, with sequence parallelism.

Without Apex Megatron takes torch's own RMSNorm there, which it refuses with sequence parallelism: the gradient of a
norm's weight is then of the rank's own tokens, and only of weights that are marked Megatron sums it over the tensor
ranks.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer import TransformerConfig
from torch import nn


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm over the last axis, built as Megatron builds the norms of a layer spec."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
