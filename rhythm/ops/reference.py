"""The definitions, eager: full attention maps, one sequence at a time, small enough to trust.

Every other backend is tested against this file. It runs in fp64 for fp64 inputs and in fp32 for all others.

Shape suffixes: T tokens of all packed sequences, N tokens of one sequence, H query heads, G key heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible_keys(row_R: Tensor, column_C: Tensor, sliding_window: int | None = None) -> Tensor:
    """bool [R, C], true where the row at position row_R sees the key at column_C, s ≤ t and t − s < sliding_window."""
    distance_RC = row_R[:, None] - column_C
    visible_RC = distance_RC >= 0
    if sliding_window is not None:
        visible_RC &= distance_RC < sliding_window
    return visible_RC


def masked_scores(
    q_HRD: Tensor, k_HCD: Tensor, visible_RC: Tensor, scale: float, softcap: float | None = None
) -> Tensor:
    """[H, R, C]: scale·q·k, with a softcap softcap·tanh(score / softcap); −inf where not visible."""
    score_HRC = (q_HRD @ k_HCD.transpose(1, 2)) * scale
    if softcap is not None:
        score_HRC = softcap * torch.tanh(score_HRC / softcap)
    return score_HRC.masked_fill(~visible_RC, -torch.inf)


def attention_weights(
    q_NHD: Tensor,
    k_NGD: Tensor,
    scale: float,
    *,
    lse_HN: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention map of one sequence.

    A[h, t, s] = exp(score[h, t, s] − lse[h, t]) for s ≤ t, score = scale · q_t·k_s, query heads sharing key heads.
    A row whose lse is not finite (NaN or +inf among its scores, or all of them −inf) is NaN throughout.

    Args:
        q_NHD, k_NGD: [N, H, D] and [N, G, D] of one float type; H a multiple of G.
        lse_HN: [H, N] to use instead of computing it.
        sliding_window: keys at distance ≥ this are masked, as in models with sliding-window layers.
        softcap: scores become c·tanh(score/c), as in Gemma 2.

    Returns:
        (A [H, N, N], lse [H, N], natural logarithm), both fp64 for fp64 inputs, else fp32.
    """
    dtype = torch.float64 if q_NHD.dtype == torch.float64 else torch.float32
    group = q_NHD.shape[1] // k_NGD.shape[1]
    k_NHD = k_NGD.to(dtype).repeat_interleave(group, dim=1)
    position_N = torch.arange(q_NHD.shape[0], device=q_NHD.device)
    visible = visible_keys(position_N, position_N, sliding_window)
    score = masked_scores(q_NHD.to(dtype).transpose(0, 1), k_NHD.transpose(0, 1), visible, scale, softcap)
    if lse_HN is None:
        lse_HN = torch.logsumexp(score, dim=-1)
    lse_HN = lse_HN.to(dtype)
    lse_HN = lse_HN.masked_fill(~lse_HN.isfinite(), torch.nan)
    weights = torch.exp(score - lse_HN[..., None]).masked_fill(~visible, 0.0)
    return weights, lse_HN


def sequence_statistics(
    weights_HNN: Tensor, *, prompt_len: int, window: int, horizon: tuple[int, int | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """(span [H], waad [H, N], fai [H, N]) of one sequence from its attention map; NaN where undefined.

    span (eq. 7): mean over response rows t of Σ_s A[t, s]·(t − s).
    waad (eq. 9): Σ_s A[t, s]·min(t − s, W) on response rows.
    fai (eq. 10): mean of A[t, s] over response rows t with s + H_lo ≤ t ≤ min(N − 1, s + H_hi).
    """
    n = weights_HNN.shape[-1]
    distance = _distance(n, weights_HNN.device)
    is_response = torch.arange(n, device=weights_HNN.device) >= prompt_len
    span = _weighted(weights_HNN, distance.clamp(min=0))[:, prompt_len:].contiguous().mean(dim=-1)
    waad = _weighted(weights_HNN, distance.clamp(min=0, max=window))
    waad = waad.masked_fill(~is_response, torch.nan)

    lo, hi = horizon
    reached = (distance >= lo) & is_response[:, None]
    if hi is not None:
        reached &= distance <= hi
    count = reached.sum(dim=0)
    # where, not a product with 0: a NaN outside the horizon stays outside.
    total = torch.where(reached, weights_HNN, 0.0).sum(dim=-2)
    fai = (total / count).masked_fill(count == 0, torch.nan)
    return span, waad, fai


def attention_statistics(
    q_THD: Tensor,
    k_TGD: Tensor,
    *,
    bounds: list[int],
    prompt_lens: list[int],
    scale: float,
    window: int = 10,
    horizon: tuple[int, int | None] = (10, 50),
    lse_HT: Tensor | None = None,
    v_TGD: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(span [B, H], waad, fai, lse [H, T], out [T, H, D] or None) of packed sequences bounds[i] … bounds[i + 1]."""
    heads, dtype = q_THD.shape[1], torch.float64 if q_THD.dtype == torch.float64 else torch.float32
    span = q_THD.new_full((len(bounds) - 1, heads), torch.nan, dtype=dtype)
    waad, fai, lse = (q_THD.new_full((heads, q_THD.shape[0]), torch.nan, dtype=dtype) for _ in range(3))
    out = None if v_TGD is None else torch.zeros_like(q_THD)
    for i, (start, end, prompt_len) in enumerate(zip(bounds[:-1], bounds[1:], prompt_lens, strict=True)):
        if start == end:
            continue
        rows, response = slice(start, end), slice(start + prompt_len, end)
        given = None if lse_HT is None else lse_HT[:, rows]
        weights, row_lse = attention_weights(
            q_THD[rows], k_TGD[rows], scale, lse_HN=given, sliding_window=sliding_window, softcap=softcap
        )
        span[i], waad[:, rows], fai[:, rows] = sequence_statistics(
            weights, prompt_len=prompt_len, window=window, horizon=horizon
        )
        lse[:, response] = row_lse[:, prompt_len:]
        if out is not None and v_TGD is not None:
            v = v_TGD[rows].to(dtype).repeat_interleave(heads // k_TGD.shape[1], dim=1).transpose(0, 1)
            out[rows] = _attended(weights, v, sliding_window).transpose(0, 1).to(q_THD.dtype)
    return span, waad, fai, lse, out


def _attended(weights_HNN: Tensor, v_HND: Tensor, sliding_window: int | None) -> Tensor:
    """Σ_s A[h, t, s]·v[h, s] over the keys that row t sees: NaN and infinities in v reach no other row."""
    finite_N = v_HND.isfinite().all(dim=-1).all(dim=0)
    out_HND = weights_HNN @ torch.where(finite_N[:, None], v_HND, 0.0)
    for s in (~finite_N).nonzero().flatten().tolist():
        seeing = slice(s, None if sliding_window is None else s + sliding_window)
        out_HND[:, seeing] += weights_HNN[:, seeing, s, None] * v_HND[:, s, None]
    return out_HND


def _distance(n: int, device: torch.device) -> Tensor:
    """t − s as an [n, n] integer tensor, row t, column s."""
    position = torch.arange(n, device=device)
    return position[:, None] - position[None, :]


def _weighted(weights_HNN: Tensor, value_NN: Tensor) -> Tensor:
    """Σ_s weights[h, t, s]·value[t, s]."""
    return (weights_HNN * value_NN.to(weights_HNN.dtype)).sum(dim=-1)
