"""Spans from some rows of each response, in plain torch.

Shape suffixes: B sequences, T tokens of all sequences, S those that have a query, N tokens of one, n sampled rows,
H query heads, G key heads, D head size.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from rhythm.ops.arguments import Request
from rhythm.ops.reference import masked_scores, visible_keys

SCORES_AT_ONCE = 1 << 24
"""A limit on memory: 64 MB of fp32."""


def sampled_rows(response: int, count: int, device: torch.device) -> Tensor:
    """int64 [n]: the middle row of each of `count` equal strata of a response; all rows where there are fewer."""
    if response <= count:
        return torch.arange(response, device=device)
    return (2 * torch.arange(count, device=device) + 1) * response // (2 * count)


def sampled_span(request: Request, lse_HT: Tensor, count: int) -> Tensor:
    """[B, H] fp32, tokens: the mean of Σ_s A[t, s]·(t − s) over the sampled rows, A = exp(score − lse).

    NaN without response rows, and where the lse of a sampled row is not finite. Sums are fp32 (fp64 for fp64 q); reads
    the lengths on the host.
    """
    q, host = request.q, request.sequences.host
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_SHD, k_TGD = q.flatten(0, -3), request.k.flatten(0, -3)
    heads, group = q_SHD.shape[1], q_SHD.shape[1] // k_TGD.shape[1]
    span_BH = torch.full((request.sequences.count, heads), torch.nan, dtype=dtype, device=q.device)
    for i, ((start, end), row_end, prompt) in enumerate(
        zip(pairwise(host.cu_seqlens), host.cu_rows[1:], host.prompt_lens, strict=True)
    ):
        row_n = prompt + sampled_rows(end - start - prompt, count, q.device)
        if not row_n.numel():
            continue
        q_HnD = q_SHD[row_end - (end - start) + row_n].to(dtype).transpose(0, 1)
        lse_Hn = lse_HT[:, start + row_n].to(dtype)
        lse_Hn = lse_Hn.masked_fill(~lse_Hn.isfinite(), torch.nan)
        total_Hn = torch.zeros_like(lse_Hn)
        chunk = max(1, SCORES_AT_ONCE // total_Hn.numel())
        begin = 0 if request.sliding_window is None else max(0, int(row_n[0]) - request.sliding_window + 1)
        for first in range(start + begin, start + int(row_n[-1]) + 1, chunk):
            last = min(first + chunk, end)
            k_HND = k_TGD[first:last].to(dtype).transpose(0, 1).repeat_interleave(group, dim=0)
            position_n, position_N = start + row_n, torch.arange(first, last, device=q.device)
            visible_nN = visible_keys(position_n, position_N, request.sliding_window)
            score_HnN = masked_scores(q_HnD, k_HND, visible_nN, request.scale, request.softcap)
            weights = (score_HnN - lse_Hn[..., None]).exp() * (position_n[:, None] - position_N)
            total_Hn += torch.where(visible_nN, weights, 0.0).sum(dim=-1)
        span_BH[i] = total_Hn.mean(dim=-1)
    return span_BH
