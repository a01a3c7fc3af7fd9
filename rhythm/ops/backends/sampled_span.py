"""Spans from some rows of each response, in plain torch.

Shape suffixes: B sequences, T tokens of all sequences, N tokens of one, n sampled rows, H query heads, D head size.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from rhythm.shapes import Sequences

SCORES_AT_ONCE = 1 << 24
"""A limit on memory: 64 MB of fp32."""


def sampled_rows(response: int, count: int, device: torch.device) -> Tensor:
    """int64 [n]: the middle row of each of `count` equal strata of a response; all rows where there are fewer."""
    if response <= count:
        return torch.arange(response, device=device)
    return (2 * torch.arange(count, device=device) + 1) * response // (2 * count)


def sampled_span(q: Tensor, k: Tensor, lse_HT: Tensor, sequences: Sequences, *, scale: float, count: int) -> Tensor:
    """[B, H] fp32, tokens: the mean of Σ_s A[t, s]·(t − s) over the sampled rows, A = exp(score − lse).

    NaN without response rows, and where the lse of a sampled row is not finite. Sums are fp32 (fp64 for fp64 q); reads
    the lengths on the host.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_THD, k_TGD = q.flatten(0, -3), k.flatten(0, -3)
    heads, group = q_THD.shape[1], q_THD.shape[1] // k_TGD.shape[1]
    span_BH = torch.full((sequences.count, heads), torch.nan, dtype=dtype, device=q.device)
    lengths = zip(pairwise(sequences.host.cu_seqlens), sequences.host.prompt_lens, strict=True)
    for i, ((start, end), prompt) in enumerate(lengths):
        row_n = prompt + sampled_rows(end - start - prompt, count, q.device)
        if not row_n.numel():
            continue
        q_HnD = q_THD[start + row_n].to(dtype).transpose(0, 1)
        lse_Hn = lse_HT[:, start + row_n].to(dtype)
        lse_Hn = lse_Hn.masked_fill(~lse_Hn.isfinite(), torch.nan)
        total_Hn = torch.zeros_like(lse_Hn)
        chunk = max(1, SCORES_AT_ONCE // total_Hn.numel())
        for first in range(start, start + int(row_n[-1]) + 1, chunk):
            last = min(first + chunk, end)
            k_HDN = k_TGD[first:last].to(dtype).permute(1, 2, 0).repeat_interleave(group, dim=0)
            distance_nN = start + row_n[:, None] - torch.arange(first, last, device=q.device)
            weights = (q_HnD @ k_HDN * scale - lse_Hn[..., None]).exp()
            total_Hn += torch.where(distance_nN >= 0, weights * distance_nN, 0.0).sum(dim=-1)
        span_BH[i] = total_Hn.mean(dim=-1)
    return span_BH
