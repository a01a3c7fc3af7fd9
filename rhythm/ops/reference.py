"""The definitions, eager: full attention maps, one sequence at a time, small enough to trust.

Every other backend is tested against this file. It runs in fp64 for fp64 inputs and in fp32 for all others.

Shape suffixes: T tokens of all packed sequences, S those among them that have a query, N tokens of one sequence, R its
last tokens that have a query, C some of its keys, H query heads, G key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

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


def row_lse(score_HRC: Tensor, sinks_H: Tensor | None = None) -> Tensor:
    """[H, R]: log Σ exp(score) of masked scores; with sinks log(Σ exp(score) + exp(sink))."""
    if sinks_H is not None:
        sink_HR1 = sinks_H.to(score_HRC)[:, None, None].expand(-1, score_HRC.shape[1], 1)
        score_HRC = torch.cat([score_HRC, sink_HR1], dim=-1)
    return torch.logsumexp(score_HRC, dim=-1)


def attention_weights(
    q_RHD: Tensor,
    k_NGD: Tensor,
    scale: float,
    *,
    lse_HR: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention map of one sequence, the rows of its last R tokens.

    A[h, t, s] = exp(score[h, t, s] − lse[h, t]) for s ≤ t, score = scale · q_t·k_s, query heads sharing key heads.
    A row whose lse is not finite (NaN or +inf among its scores, or all of them −inf) is NaN throughout.

    Args:
        q_RHD, k_NGD: [R, H, D] and [N, G, D] of one float type; R ≤ N, H a multiple of G.
        lse_HR: [H, R] to use instead of computing it.
        sliding_window: keys at distance ≥ this are masked, as in models with sliding-window layers.
        softcap: scores become c·tanh(score/c), as in Gemma 2.
        sinks_H: one more logit for each row of a head, which takes part in lse but has no key, as in gpt-oss.

    Returns:
        (A [H, R, N], lse [H, R], natural logarithm), both fp64 for fp64 inputs, else fp32.
    """
    dtype = torch.float64 if q_RHD.dtype == torch.float64 else torch.float32
    rows, keys = q_RHD.shape[0], k_NGD.shape[0]
    k_NHD = k_NGD.to(dtype).repeat_interleave(q_RHD.shape[1] // k_NGD.shape[1], dim=1)
    position_N = torch.arange(keys, device=q_RHD.device)
    visible = visible_keys(position_N[keys - rows :], position_N, sliding_window)
    score = masked_scores(q_RHD.to(dtype).transpose(0, 1), k_NHD.transpose(0, 1), visible, scale, softcap)
    if lse_HR is None:
        lse_HR = row_lse(score, sinks_H)
    lse_HR = lse_HR.to(dtype)
    lse_HR = lse_HR.masked_fill(~lse_HR.isfinite(), torch.nan)
    weights = torch.exp(score - lse_HR[..., None]).masked_fill(~visible, 0.0)
    return weights, lse_HR


def row_answers(
    score_HRC: Tensor,
    lse_HR: Tensor | None,
    names: tuple[str, ...],
    *,
    prompt_len: int,
    first: int,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """[len(names), H, R]: `answers.ALSO` of rows, from their masked scores against keys 0 … C − 1.

    max_logit is max_s score; with A[s] = exp(score[s] − lse), top1 is max_s A, entropy −Σ_s A·log A in nats, first_mass
    Σ A over s < first, prompt_mass Σ A over s < prompt_len. NaN where lse, given or of the scores, is not finite.
    """
    if lse_HR is None:
        lse_HR = row_lse(score_HRC, sinks_H)
    lse_HR = lse_HR.to(score_HRC.dtype)
    weights_HRC = torch.exp(score_HRC - lse_HR[..., None])
    answers: dict[str, Callable[[], Tensor]] = {
        "max_logit": lambda: score_HRC.amax(dim=-1),
        "top1": lambda: weights_HRC.amax(dim=-1),
        "entropy": lambda: -torch.xlogy(weights_HRC, weights_HRC).sum(dim=-1),
        "first_mass": lambda: weights_HRC[..., :first].sum(dim=-1),
        "prompt_mass": lambda: weights_HRC[..., :prompt_len].sum(dim=-1),
    }
    return torch.stack([answers[name]().masked_fill(~lse_HR.isfinite(), torch.nan) for name in names])


def sequence_statistics(
    weights_HRN: Tensor, *, prompt_len: int, window: int, horizon: tuple[int, int | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """(span [H], waad [H, N], fai [H, N]) of one sequence from its attention map; NaN where undefined.

    The map has the rows of its last R tokens; tokens before these count as prompt.

    span (eq. 7): mean over response rows t of Σ_s A[t, s]·(t − s).
    waad (eq. 9): Σ_s A[t, s]·min(t − s, W) on response rows.
    fai (eq. 10): mean of A[t, s] over response rows t with s + H_lo ≤ t ≤ min(N − 1, s + H_hi).
    """
    rows, n = weights_HRN.shape[-2:]
    position_N = torch.arange(n, device=weights_HRN.device)
    distance = position_N[n - rows :, None] - position_N
    is_response = position_N[n - rows :] >= prompt_len
    first = max(prompt_len - (n - rows), 0)
    span = _weighted(weights_HRN, distance.clamp(min=0))[:, first:].contiguous().mean(dim=-1)
    waad = weights_HRN.new_full((weights_HRN.shape[0], n), torch.nan)
    waad[:, n - rows + first :] = _weighted(weights_HRN, distance.clamp(min=0, max=window))[:, first:]

    lo, hi = horizon
    reached = (distance >= lo) & is_response[:, None]
    if hi is not None:
        reached &= distance <= hi
    count = reached.sum(dim=0)
    # where, not a product with 0: a NaN outside the horizon stays outside.
    total = torch.where(reached, weights_HRN, 0.0).sum(dim=-2)
    fai = (total / count).masked_fill(count == 0, torch.nan)
    return span, waad, fai


def attention_statistics(
    q_SHD: Tensor,
    k_TGD: Tensor,
    *,
    bounds: list[int],
    prompt_lens: list[int],
    row_bounds: list[int] | None = None,
    scale: float,
    window: int = 10,
    horizon: tuple[int, int | None] = (10, 50),
    lse_HT: Tensor | None = None,
    v_TGD: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(span [B, H], waad, fai, lse [H, T], out [S, H, D] or None) of packed sequences bounds[i] … bounds[i + 1].

    row_bounds: where the queries of each sequence lie in q_SHD, those of its last tokens; None: all tokens have one.
    """
    heads, dtype = q_SHD.shape[1], torch.float64 if q_SHD.dtype == torch.float64 else torch.float32
    span = q_SHD.new_full((len(bounds) - 1, heads), torch.nan, dtype=dtype)
    waad, fai, lse = (q_SHD.new_full((heads, k_TGD.shape[0]), torch.nan, dtype=dtype) for _ in range(3))
    out = None if v_TGD is None else torch.zeros_like(q_SHD)
    spans = zip(pairwise(bounds), pairwise(row_bounds or bounds), prompt_lens, strict=True)
    for i, ((start, end), (row_start, row_end), prompt_len) in enumerate(spans):
        if start == end:
            continue
        keys, rows, first = slice(start, end), slice(row_start, row_end), end - (row_end - row_start)
        weights, row_lse = attention_weights(
            q_SHD[rows],
            k_TGD[keys],
            scale,
            lse_HR=None if lse_HT is None else lse_HT[:, first:end],
            sliding_window=sliding_window,
            softcap=softcap,
            sinks_H=sinks_H,
        )
        span[i], waad[:, keys], fai[:, keys] = sequence_statistics(
            weights, prompt_len=prompt_len, window=window, horizon=horizon
        )
        response = max(start + prompt_len, first)
        lse[:, response:end] = row_lse[:, response - first :]
        if out is not None and v_TGD is not None:
            v = v_TGD[keys].to(dtype).repeat_interleave(heads // k_TGD.shape[1], dim=1).transpose(0, 1)
            out[rows] = _attended(weights, v, sliding_window).transpose(0, 1).to(q_SHD.dtype)
    return span, waad, fai, lse, out


def _attended(weights_HRN: Tensor, v_HND: Tensor, sliding_window: int | None) -> Tensor:
    """Σ_s A[h, t, s]·v[h, s] over the keys that row t sees: NaN and infinities in v reach no other row."""
    finite_N = v_HND.isfinite().all(dim=-1).all(dim=0)
    out_HRD = weights_HRN @ torch.where(finite_N[:, None], v_HND, 0.0)
    before = v_HND.shape[1] - weights_HRN.shape[1]
    for s in (~finite_N).nonzero().flatten().tolist():
        end = None if sliding_window is None else max(s + sliding_window - before, 0)
        seeing = slice(max(s - before, 0), end)
        out_HRD[:, seeing] += weights_HRN[:, seeing, s, None] * v_HND[:, s, None]
    return out_HRD


def column_sums(weights_HRC: Tensor, row_weights_HR: Tensor | None, reached_RC: Tensor, reduce: str) -> Tensor:
    """[H, C]: Σ_t w[t]·A[t, s] over the rows t that reach key s (reduce "sum"), 0 without any; or max_t, −inf without.

    A row whose weight is 0 reaches no key, so that a NaN in it stays there.
    """
    reached_HRC = reached_RC.expand(weights_HRC.shape)
    if row_weights_HR is not None:
        reached_HRC = reached_HRC & (row_weights_HR[..., None] != 0)
        weights_HRC = weights_HRC * row_weights_HR[..., None].to(weights_HRC.dtype)
    if reduce == "sum":
        return torch.where(reached_HRC, weights_HRC, 0.0).sum(dim=-2)
    return torch.where(reached_HRC, weights_HRC, -torch.inf).amax(dim=-2)


def _weighted(weights_HRN: Tensor, value_RN: Tensor) -> Tensor:
    """Σ_s weights[h, t, s]·value[t, s]."""
    return (weights_HRN * value_RN.to(weights_HRN.dtype)).sum(dim=-1)
