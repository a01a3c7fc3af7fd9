"""What a backend gives back, on the flattened token axis."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from rhythm.ops.arguments import Layout


@dataclass(frozen=True)
class Outputs:
    """Statistics in fp32 (fp64 from the reference for fp64 inputs); T is the flattened token axis."""

    span_BH: Tensor
    waad_HT: Tensor
    fai_HT: Tensor
    lse_HT: Tensor
    out_THD: Tensor | None


def mean_span(row_span_HT: Tensor, layout: Layout) -> Tensor:
    """[B, H]: the mean over each sequence's response rows, summed in fp64; NaN where there are none."""
    spans = [
        row_span_HT[:, start + prompt : end].mean(dim=-1, dtype=torch.float64).float()
        for (start, end), prompt in zip(pairwise(layout.bounds), layout.prompt_lens, strict=True)
    ]
    return torch.stack(spans) if spans else row_span_HT.new_empty((0, row_span_HT.shape[0]))
