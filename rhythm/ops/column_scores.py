"""How much attention each key receives: the exact scores that cache eviction and interpretability estimate.

Shape suffixes: B sequences, T tokens of all sequences on one axis, H query heads, G key heads, D head size.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rhythm import shapes
from rhythm.ops import arguments
from rhythm.ops.statistics import attention_statistics

FAR = 2**62
"""Tokens, beyond any sequence; a position can still be added to it."""

Rows = tuple[int | None, int | None]


def column_scores(
    q: Tensor,
    k: Tensor,
    *,
    reduce: Literal["sum", "mean"] = "sum",
    per: Literal["head", "group"] = "head",
    rows: Rows | Tensor | None = None,
    horizon: tuple[int, int | None] = (0, None),
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    lse: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Σ_t A[t, s], or its mean, over the rows t of a range that lie at a distance within `horizon` from key s.

    With the defaults the accumulated attention of H2O (arXiv 2306.14048); with `rows=(-64, None), per="group"` the
    observation window of SnapKV (arXiv 2404.14469); with `reduce="mean"` and a minimum distance the received
    attention of Thought Anchors (arXiv 2506.19143). Never builds a map: memory is O(Hq·T).

    Args:
        q: [T, Hq, D] packed, or [B, T, Hq, D]; fp32, fp16 or bf16 (fp64 for the reference); any strides. For one
            sequence or a batch q may have fewer rows than k, as at decoding: they are the last ones.
        k: same with Hkv heads, Hkv dividing Hq.
        reduce: "sum" is 0 and "mean" NaN for a key that no row reaches.
        per: "group" adds up (or averages) the query heads that share a key head.
        rows: (begin, end) in tokens of each sequence, as in a slice: negative counts from the end, None is open; or
            int32 or int64 [B, 2], a range for each. None: all rows that q has.
        horizon: (lo, hi), tokens, both ends in; hi None: to the end.
        cu_seqlens: int32 [B + 1]; packed q and k of the same length only.
        scale: softmax scale; None: D^−½.
        lse: fp32 [Hq, T] or [B, Hq, T], of q's rows, from any flash forward; None: computed, in a sweep of its own.
        backend: as in `attention_statistics`.

    Returns:
        fp32 [Hq, T] for packed k, [B, Hq, T] for batched; with per="group" Hkv in place of Hq.

    Raises:
        ValueError: an argument is not as described; the message names it.
        RuntimeError: the named backend is not available on this machine.
    """
    arguments.check_name("reduce", reduce, ("sum", "mean"))
    arguments.check_name("per", per, ("head", "group"))
    for name, x in (("q", q), ("k", k), ("cu_seqlens", cu_seqlens), ("lse", lse)):
        if x is not None or name in ("q", "k"):
            shapes.check_dense(name, x)
    _, _, horizon = arguments.check_options(1.0, 1, horizon)
    q, lse, missing = _at_the_end(q, k, lse, cu_seqlens)
    arguments.check_tensors(q, k)
    heads = q.shape[-2]
    arguments.check_lse(lse, (heads, q.shape[0]) if q.ndim == 3 else (q.shape[0], heads, q.shape[1]), q.device)
    arguments.check_sequences(q, cu_seqlens, None)
    length_B = _lengths(q, cu_seqlens)
    begin_B, end_B = _range(rows, missing, length_B)
    if end_B is not None:
        begin_B = torch.minimum(begin_B, end_B)

    flat = q.ndim == 4 and end_B is not None
    if flat:  # what is cut leaves sequences of different lengths
        cu_seqlens = torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device) * q.shape[1]
    shape = (q.shape[0], q.shape[1]) if q.ndim == 4 else None
    position_T, sequence_T = _positions(q, length_B)
    if end_B is None:
        received = _received(q, k, lse, cu_seqlens, begin_B, horizon, scale, backend)
    else:
        kept_T = position_T < end_B[sequence_T]
        q_THD, k_TGD = (x.flatten(0, -3)[kept_T] for x in (q, k))
        lse_HT = None if lse is None else (lse.transpose(0, 1).flatten(1) if flat else lse)[:, kept_T]
        bounds = torch.cat([end_B.new_zeros(1), end_B.cumsum(0)]).to(torch.int32)
        kept = _received(q_THD, k_TGD, lse_HT, bounds, begin_B, horizon, scale, backend)
        received = kept.new_full((kept.shape[0], kept_T.shape[0]), torch.nan)
        received[:, kept_T] = kept
    if received.ndim == 3:
        received = received.transpose(0, 1).flatten(1)

    lo, hi = min(horizon[0], FAR), None if horizon[1] is None else min(horizon[1], FAR)
    last_B = (length_B if end_B is None else end_B) - 1
    reach_T = last_B[sequence_T] if hi is None else torch.minimum(last_B[sequence_T], position_T + hi)
    count_T = (reach_T - torch.maximum(begin_B[sequence_T], position_T + lo) + 1).clamp(min=0)
    if reduce == "sum":
        received = torch.where(count_T > 0, received * count_T, 0.0)
    if per == "group":
        grouped = received.view(k.shape[-2], q.shape[-2] // k.shape[-2], received.shape[-1])
        received = grouped.sum(dim=1) if reduce == "sum" else grouped.mean(dim=1)
    return received if shape is None else received.view(received.shape[0], *shape).transpose(0, 1)


def _received(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    cu_seqlens: Tensor | None,
    begin_B: Tensor,
    horizon: tuple[int, int | None],
    scale: float | None,
    backend: str,
) -> Tensor:
    """The mean: FAI of a sequence whose prompt ends where the range begins."""
    statistics = attention_statistics(
        q,
        k,
        cu_seqlens=cu_seqlens,
        prompt_lens=begin_B,
        scale=scale,
        window=1,
        horizon=horizon,
        lse=lse,
        span=lse is None,
        backend=backend,
    )
    return statistics.fai


def _at_the_end(
    q: Tensor, k: Tensor, lse: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None, int]:
    """(q and lse as long as k, and how many rows were put before theirs: no kernel reads them)."""
    if q.ndim not in (3, 4) or k.ndim != q.ndim:
        raise ValueError(
            f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}; allowed are [(B,) T, heads, D] for both"
        )
    missing = k.shape[-3] - q.shape[-3]
    if missing == 0:
        return q, lse, 0
    if missing < 0:
        raise ValueError(f"q has {q.shape[-3]} rows and k {k.shape[-3]}; q may have fewer than k, not more")
    if cu_seqlens is not None:
        raise ValueError(f"cu_seqlens goes with q and k of the same length; they have {q.shape[-3]} and {k.shape[-3]}")
    q = torch.cat([q.new_zeros((*q.shape[:-3], missing, *q.shape[-2:])), q], dim=-3)
    if lse is not None:
        lse = torch.cat([lse.new_full((*lse.shape[:-1], missing), torch.nan), lse], dim=-1)
    return q, lse, missing


def _lengths(q: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """int64 [B], tokens."""
    if cu_seqlens is not None:
        return cu_seqlens.diff().long()
    count = q.shape[0] if q.ndim == 4 else 1
    return torch.full((count,), q.shape[-3], dtype=torch.int64, device=q.device)


def _positions(q: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [T] each: the position of a token in its sequence, and which sequence that is."""
    tokens = q.shape[:-2].numel()
    index_B = torch.arange(length_B.shape[0], device=q.device)
    sequence_T = torch.repeat_interleave(index_B, length_B, output_size=tokens)
    start_B = length_B.cumsum(0) - length_B
    return torch.arange(tokens, device=q.device) - start_B[sequence_T], sequence_T


def _range(rows: Rows | Tensor | None, missing: int, length_B: Tensor) -> tuple[Tensor, Tensor | None]:
    """(first row, row after the last) of each sequence, int64 [B] within its length; no end: the sequence's own."""
    if rows is None:
        rows = (missing, None)
    if isinstance(rows, Tensor):
        if rows.dtype not in (torch.int32, torch.int64) or rows.shape != (length_B.shape[0], 2):
            raise ValueError(
                f"rows has shape {tuple(rows.shape)} and dtype {rows.dtype}; it must be int32 or int64 "
                f"[{length_B.shape[0]}, 2], a range for each sequence"
            )
        begin_B, end_B = rows.to(length_B.device, torch.int64).unbind(dim=1)
        return _within(begin_B, length_B).clamp(min=missing), _within(end_B, length_B)
    if not isinstance(rows, (tuple, list)) or len(rows) != 2:
        raise ValueError(f"rows is {rows!r}; it must be (begin, end), integers or None, or a tensor [B, 2]")
    begin, end = (None if x is None else shapes.integer(f"rows[{i}]", x, -FAR, FAR) for i, x in enumerate(rows))
    begin_B = _within(torch.full_like(length_B, 0 if begin is None else begin), length_B).clamp(min=missing)
    return begin_B, None if end is None else _within(torch.full_like(length_B, end), length_B)


def _within(index_B: Tensor, length_B: Tensor) -> Tensor:
    """As a slice takes an index: negative from the end, and cut to the length."""
    return torch.minimum(torch.where(index_B < 0, index_B + length_B, index_B).clamp(min=0), length_B)
