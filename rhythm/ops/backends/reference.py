"""The reference as a backend: any device, any float type, memory O(Hq·N²) of the longest sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from rhythm.ops import reference
from rhythm.ops.arguments import Layout
from rhythm.ops.backends.base import Outputs
from rhythm.ops.backends.sampled_span import sampled_span as sampled_span


def unavailable() -> str | None:
    return None


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    layout: Layout,
    *,
    scale: float,
    window: int,
    horizon: tuple[int, int | None],
    lse_HT: Tensor | None,
    span: bool,
) -> Outputs:
    q_THD, k_TGD = q.flatten(0, -3), k.flatten(0, -3)
    v_TGD = None if v is None else v.flatten(0, -3)
    span_BH, waad_HT, fai_HT, row_lse_HT, out_THD = reference.attention_statistics(
        q_THD,
        k_TGD,
        bounds=layout.bounds,
        prompt_lens=layout.prompt_lens,
        scale=scale,
        window=window,
        horizon=horizon,
        lse_HT=lse_HT,
        v_TGD=v_TGD,
    )
    return Outputs(span_BH, waad_HT, fai_HT, row_lse_HT, out_THD)
