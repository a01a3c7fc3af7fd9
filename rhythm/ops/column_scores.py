"""How much attention each key receives: the exact scores that cache eviction and interpretability estimate.

Shape suffixes: B sequences, T tokens of all sequences on one axis, H query heads, G key heads, D head size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from rhythm import shapes
from rhythm.ops import arguments, backends
from rhythm.ops.arguments import Request
from rhythm.ops.backends.in_blocks import Columns
from rhythm.ops.registered import own_precision, run
from rhythm.ops.statistics import form_arguments, unflatten
from rhythm.shapes import Sequences

REDUCE, PER = ("sum", "mean", "max"), ("head", "group")
FAR = 2**62
"""Tokens, beyond any sequence; a position can still be added to it."""

Rows = tuple[int | None, int | None]


def column_scores(
    q: Tensor,
    k: Tensor,
    *,
    reduce: Literal["sum", "mean", "max"] = "sum",
    per: Literal["head", "group"] = "head",
    rows: Rows | Tensor | None = None,
    horizon: tuple[int, int | None] = (0, None),
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    lse: Tensor | None = None,
    backend: str = "auto",
    softcap: float | None = None,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Σ_t A[t, s], its mean or max_t A[t, s], over the rows t of a range that lie at a distance within `horizon` from
    key s; with row weights Σ_t w[t]·A[t, s], that over Σ_t w[t], or max_t w[t]·A[t, s].

    With the defaults the accumulated attention of H2O (arXiv 2306.14048); with `rows=(-64, None), per="group"` the
    observation window of SnapKV (arXiv 2404.14469); with `reduce="mean"` and a minimum distance the received
    attention of Thought Anchors (arXiv 2506.19143); with `reduce="max"` the largest attention that KVzip (arXiv
    2505.23416) keeps a key for. Never builds a map: memory is O(Hq·T).

    Args:
        q: [T, Hq, D] packed, or [B, T, Hq, D]; fp32, fp16 or bf16 (fp64 for the reference); any strides. It may have
            fewer rows than k, as at decoding: they are the last ones of each sequence.
        k: same with Hkv heads, Hkv dividing Hq.
        reduce: "sum" is 0 and "mean" and "max" are NaN for a key that no row reaches.
        per: "group" adds up (or averages, or takes the largest of) the query heads that share a key head.
        rows: (begin, end) in tokens of each sequence, as in a slice: negative counts from the end, None is open; or
            int32 or int64 [B, 2], one range per sequence. None: all rows that q has.
        horizon: (lo, hi), tokens, both ends in; hi None: to the end.
        cu_seqlens: int32 [B + 1]; packed q only.
        scale: softmax scale; None: D^−½.
        lse: fp32 [Hq, T] or [B, Hq, T], of q's rows, from any flash attention; None: computed, in a separate sweep.
        backend, softcap, sliding_window, sinks, cu_seqlens_k: as in `attention_statistics`. Keys that a row's sliding
            window hides receive 0 from it.
        row_weights: w, one factor for each row, of any sign: [T], or [Hq, T] for one per head; for batched q [B, T] or
            [B, Hq, T]; of any float type. Of q's rows where these are fewer than k's, or of all tokens. A row of weight
            0 takes no part: it reaches no key. A weight that is infinite is NaN. Detached. None: all are 1.

    Returns:
        fp32 [Hq, T] for packed k, [B, Hq, T] for batched; with per="group" Hkv in place of Hq.

    Raises:
        ValueError: an argument is not as described; the message names it.
        RuntimeError: the named backend is not available on this machine.
    """
    begin, end, rows_B2 = _rows(rows)
    lo, hi = arguments.pair(horizon)
    for name, x in (("q", q), ("k", k), ("cu_seqlens", cu_seqlens), ("lse", lse), ("row_weights", row_weights)):
        if x is not None or name in ("q", "k"):
            shapes.check_tensor(name, x)
    scores: Tensor = _column_scores(
        q.detach(),
        k.detach(),
        arguments.name_of("reduce", reduce, REDUCE),
        arguments.name_of("per", per, PER),
        begin,
        end,
        rows_B2,
        lo,
        hi,
        cu_seqlens,
        arguments.softmax_scale(q, scale),
        None if lse is None else lse.detach(),
        arguments.name_of("backend", backend, backends.NAMES),
        *form_arguments(softcap, sliding_window, sinks, cu_seqlens_k),
        None if row_weights is None else row_weights.detach(),
    )
    return scores


@torch.library.custom_op("rhythm::column_scores", mutates_args=())
def _column_scores(
    q: Tensor,
    k: Tensor,
    reduce: str,
    per: str,
    rows_begin: int | None,
    rows_end: int | None,
    rows: Tensor | None,
    horizon_lo: int,
    horizon_hi: int | None,
    cu_seqlens: Tensor | None,
    scale: float,
    lse: Tensor | None,
    backend: str,
    softcap: float | None = None,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> Tensor:
    form = (softcap, sliding_window, sinks, cu_seqlens_k)
    request = _checked(q, k, reduce, per, horizon_lo, horizon_hi, cu_seqlens, scale, lse, *form)
    _check_row_weights(row_weights, q, k)
    request = arguments.ready(request)
    sequences = request.sequences
    length_B = _lengths(sequences.cu_seqlens, sequences.tokens, sequences.count, q.device)
    missing_B = torch.zeros_like(length_B)
    if sequences.fewer_rows:
        missing_B = length_B - _lengths(sequences.cu_rows, sequences.rows or 0, sequences.count, q.device)
    begin_B, end_B = _range(rows_begin, rows_end, rows, missing_B, length_B)
    position_T, sequence_T = _positions(length_B, sequences.tokens)
    weights_HT = None if row_weights is None else _of_tokens(row_weights, q, k, sequences)
    plain = reduce != "max" and weights_HT is None
    columns = None if plain else Columns("max" if reduce == "max" else "sum", weights_HT)
    if end_B is None:
        received_HT = _received(replace(request, sequences=replace(sequences, prompt_lens=begin_B)), columns, backend)
    else:
        begin_B = torch.minimum(begin_B, end_B)
        kept_T = position_T < end_B[sequence_T]
        q_SHD, k_TGD = request.q.flatten(0, -3), request.k.flatten(0, -3)[kept_T]
        q_SHD = q_SHD[kept_T[sequences.row_places(q.device)]]
        lse_HT = None if request.lse_HT is None else request.lse_HT[:, kept_T]
        rows_B = (end_B - missing_B).clamp(min=0) if sequences.fewer_rows else None
        kept = Sequences(
            _bounds(end_B),
            begin_B,
            k_TGD.shape[0],
            sequences.count,
            cu_rows=None if rows_B is None else _bounds(rows_B),
            rows=q_SHD.shape[0],
        )
        if columns is not None and weights_HT is not None:
            columns = replace(columns, row_weights_HT=weights_HT[:, kept_T])
        kept_HT = _received(replace(request, q=q_SHD, k=k_TGD, lse_HT=lse_HT, sequences=kept), columns, backend)
        received_HT = kept_HT.new_full((kept_HT.shape[0], sequences.tokens), _without_rows(columns))
        received_HT[:, kept_T] = kept_HT

    lo, hi = min(horizon_lo, FAR), None if horizon_hi is None else min(horizon_hi, FAR)
    last_B = (length_B if end_B is None else end_B) - 1
    reach_T = last_B[sequence_T] if hi is None else torch.minimum(last_B[sequence_T], position_T + hi)
    from_T = torch.maximum(begin_B[sequence_T], position_T + lo)
    start_T = torch.arange(sequences.tokens, device=q.device) - position_T

    def total(x_HT: Tensor | None, from_T: Tensor) -> Tensor:
        """Of the rows from_T … reach_T; None: how many these are."""
        return _between(x_HT, start_T, from_T, reach_T)

    if reduce == "max":
        if request.sliding_window is not None:  # hidden keys receive 0
            counted_HT = None if weights_HT is None else (weights_HT != 0).double()
            hidden_T = torch.maximum(from_T, position_T + min(request.sliding_window, FAR))
            received_HT = torch.where(total(counted_HT, hidden_T) > 0, received_HT.clamp(min=0), received_HT)
        received_HT = received_HT.masked_fill(received_HT == -torch.inf, torch.nan)
    elif columns is None and reduce == "sum":
        count_T = total(None, from_T)
        received_HT = torch.where(count_T > 0, received_HT * count_T, 0.0)
    elif columns is not None and reduce == "mean":
        received_HT = (received_HT / total(weights_HT, from_T)).to(received_HT.dtype)
    if per == "group":
        grouped = received_HT.view(k.shape[-2], q.shape[-2] // k.shape[-2], sequences.tokens)
        if reduce == "max":
            received_HT = grouped.amax(dim=1)
        else:
            received_HT = grouped.sum(dim=1) if reduce == "sum" else grouped.mean(dim=1)
    return unflatten(received_HT, k)


def _received(request: Request, columns: Columns | None, backend: str) -> Tensor:
    """[H, T]: the mean over rows that reach a key, which is FAI of a sequence whose prompt ends where the range begins;
    or what `columns` asks for.
    """
    if columns is None:
        return run(request, backend).fai_HT
    chosen = backends.choose(backend, request)
    with own_precision(request.q):
        return chosen.columns(request, columns)


def _without_rows(columns: Columns | None) -> float:
    """What `_received` gives for a key that no row reaches."""
    if columns is None:
        return torch.nan
    return 0.0 if columns.reduce == "sum" else -torch.inf


def _between(x_HT: Tensor | None, start_T: Tensor, from_T: Tensor, to_T: Tensor) -> Tensor:
    """fp64 [H, T], Σ x over rows from_T … to_T, positions in sequences that begin at start_T, 0 where there are none;
    None: int64 [T], their number. What is no number in x counts as 0.
    """
    count_T = (to_T - from_T + 1).clamp(min=0)
    if x_HT is None:
        return count_T
    sums_HT = torch.nn.functional.pad(x_HT.double().nan_to_num(0.0, 0.0, 0.0).cumsum(-1), (1, 0))
    first_T = torch.where(count_T > 0, start_T + from_T, 0)
    return sums_HT[:, first_T + count_T] - sums_HT[:, first_T]


@_column_scores.register_fake
def _(
    q: Tensor, k: Tensor, reduce: str, per: str, rows_begin: object, rows_end: object, rows: Tensor | None, *rest: Any
) -> Tensor:
    request = _checked(q, k, reduce, per, *rest[:5], *rest[6:10])
    _check_row_weights(rest[10] if len(rest) > 10 else None, q, k)
    if rows is not None:
        _check_rows(rows, request.sequences.count)
    heads, dtype = (q if per == "head" else k).shape[-2], torch.float64 if q.dtype == torch.float64 else torch.float32
    return unflatten(q.new_empty((heads, request.sequences.tokens), dtype=dtype), k)


def _checked(
    q: Tensor,
    k: Tensor,
    reduce: str,
    per: str,
    horizon_lo: int,
    horizon_hi: int | None,
    cu_seqlens: Tensor | None,
    scale: float,
    lse: Tensor | None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Request:
    for name, value, allowed in (("reduce", reduce, REDUCE), ("per", per, PER)):
        if value not in allowed:
            raise arguments.unknown_name(name, value, allowed)
    # Without lse the row sweep has to run, which span asks for; with it the bands are enough.
    options = (scale, 1, horizon_lo, horizon_hi)
    return arguments.checked(
        q,
        k,
        None,
        cu_seqlens,
        None,
        *options,
        lse=lse,
        span=lse is None,
        softcap=softcap,
        sliding_window=sliding_window,
        sinks=sinks,
        cu_seqlens_k=cu_seqlens_k,
    )


def _rows(rows: Rows | Tensor | None) -> tuple[int | None, int | None, Tensor | None]:
    """(begin, end) of a pair, or a tensor of ranges, as the op takes them."""
    if rows is None or isinstance(rows, Tensor):
        return None, None, rows
    if not isinstance(rows, (tuple, list)) or len(rows) != 2:
        raise ValueError(f"rows is {rows!r}; it must be (begin, end), integers or None, or a tensor [B, 2]")
    begin, end = (None if x is None else shapes.integer(f"rows[{i}]", x) for i, x in enumerate(rows))
    return begin, end, None


def _check_row_weights(weights: Tensor | None, q: Tensor, k: Tensor) -> None:
    """A float tensor of q's rows or of k's tokens, with or without heads, on q's device."""
    if weights is None:
        return
    shapes.check_dense("row_weights", weights)
    before, heads = tuple(q.shape[:-3]), q.shape[-2]
    allowed = [(*before, *per_head, x.shape[-3]) for x in (q, k) for per_head in ((), (heads,))]
    if tuple(weights.shape) not in allowed:
        raise ValueError(
            f"row_weights has shape {tuple(weights.shape)}; it must be {' or '.join(map(str, dict.fromkeys(allowed)))}"
        )
    if weights.dtype not in arguments.DTYPES:
        raise ValueError(f"row_weights has dtype {weights.dtype}; allowed are {', '.join(map(str, arguments.DTYPES))}")
    if weights.device != q.device:
        raise ValueError(f"row_weights is on {weights.device}; it must be on q's device, {q.device}")


def _of_tokens(weights: Tensor, q: Tensor, k: Tensor, sequences: Sequences) -> Tensor:
    """[Hq or 1, T] on the token axis, fp64 for fp64 q, else fp32; 0 where q has no row, NaN where not finite."""
    weights = weights.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    per_head = weights.ndim == q.ndim - 1
    weights = weights if per_head else weights.unsqueeze(-2)
    if q.ndim == 4:
        weights = weights.transpose(0, 1).flatten(1)
    weights = torch.where(weights.isfinite(), weights, torch.nan)
    if weights.shape[1] == sequences.tokens:
        return weights
    of_tokens = weights.new_zeros((weights.shape[0], sequences.tokens))
    of_tokens[:, sequences.row_places(q.device)] = weights
    return of_tokens


def _lengths(bounds: Tensor | None, total: int, count: int, device: torch.device) -> Tensor:
    """int64 [B], between bounds int32 [B + 1], or even parts of the total."""
    if bounds is not None:
        return bounds.diff().long()
    return torch.full((count,), total // max(count, 1), dtype=torch.int64, device=device)


def _bounds(length_B: Tensor) -> Tensor:
    """int32 [B + 1], where parts of these lengths begin."""
    return torch.cat([length_B.new_zeros(1), length_B.cumsum(0)]).to(torch.int32)


def _positions(length_B: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """int64 [T] each: the position of a token in its sequence, and which sequence that is."""
    index_B = torch.arange(length_B.shape[0], device=length_B.device)
    sequence_T = torch.repeat_interleave(index_B, length_B, output_size=tokens)
    start_B = length_B.cumsum(0) - length_B
    return torch.arange(tokens, device=length_B.device) - start_B[sequence_T], sequence_T


def _check_rows(rows_B2: Tensor, count: int) -> None:
    shapes.check_dense("rows", rows_B2)
    if rows_B2.dtype not in (torch.int32, torch.int64) or rows_B2.shape != (count, 2):
        raise ValueError(
            f"rows has shape {tuple(rows_B2.shape)} and dtype {rows_B2.dtype}; it must be int32 or int64 "
            f"[{count}, 2], one range per sequence"
        )


def _range(
    begin: int | None, end: int | None, rows_B2: Tensor | None, missing_B: Tensor, length_B: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(first row, row after the last) of each sequence, int64 [B] within its length; no end: the sequence's own.

    missing_B: first tokens without a row.
    """
    if rows_B2 is not None:
        _check_rows(rows_B2, length_B.shape[0])
        begin_B, end_B = rows_B2.to(length_B.device, torch.int64).unbind(dim=1)
        return torch.maximum(_within(begin_B, length_B), missing_B), _within(end_B, length_B)
    begin_B, end_B = (torch.full_like(length_B, max(-FAR, min(x or 0, FAR))) for x in (begin, end))
    begin_B = torch.maximum(_within(begin_B, length_B), missing_B)
    return begin_B, None if end is None else _within(end_B, length_B)


def _within(index_B: Tensor, length_B: Tensor) -> Tensor:
    """As a slice takes an index: negative from the end, and cut to the length."""
    return torch.minimum(torch.where(index_B < 0, index_B + length_B, index_B).clamp(min=0), length_B)
