"""What a backend gives back, on the flattened token axis."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Outputs:
    """Statistics in fp32 (fp64 from the reference for fp64 inputs); T is the flattened token axis."""

    span_BH: Tensor
    waad_HT: Tensor
    fai_HT: Tensor
    lse_HT: Tensor
    out_THD: Tensor | None
