"""Q, K → statistics: the public ops, also registered as torch.ops.rhythm.

Shape suffixes: B sequences, T tokens of all sequences on one axis, H query heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rhythm import shapes
from rhythm.ops import arguments, attention, backends


@dataclass(frozen=True)
class AttentionStatistics:
    """What the paper needs of the attention maps of one layer, per query head, in fp32.

    Attributes:
        span: [B, Hq], tokens: mean distance looked back over response rows (eq. 7); NaN without response rows.
            None where it was not asked for.
        waad: [Hq, T] for packed q, [B, Hq, T] for q [B, T, Hq, D]; tokens, in [0, window] (eq. 9); NaN on prompt rows.
        fai: same shape: mean attention received from response rows within the horizon (eq. 10); NaN where there
            are none.
        lse: same shape: log Σ exp(score), natural; NaN on prompt rows.
    """

    span: Tensor | None
    waad: Tensor
    fai: Tensor
    lse: Tensor


def attention_statistics(
    q: Tensor,
    k: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    prompt_lens: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    window: int = 10,
    horizon: tuple[int, int | None] = (10, 50),
    lse: Tensor | None = None,
    span: bool = True,
    backend: str = "auto",
    span_rows: int | None = None,
) -> AttentionStatistics:
    """Span, WAAD and FAI of causal attention, without the attention maps (paper eqs. 7, 9, 10).

    Memory is O(Hq·T) beyond a packed copy of k. With `lse` given (from any flash forward) and `span=False` only the
    bands near the diagonal are visited, O(T·(window + H_hi)·D). Inputs that require grad are treated as detached.

    Args:
        q: [T, Hq, D] packed, or [B, T, Hq, D]; fp32, fp16 or bf16 (fp64 for the reference); any strides.
        k: same with Hkv heads, Hkv dividing Hq, on q's device, of q's type.
        cu_seqlens: int32 [B + 1], as in flash-attn's varlen calls; packed q only. None: one sequence.
        prompt_lens: int32 or int64 [B], tokens of each sequence that are its prompt. None: all rows are response.
        scale: softmax scale; None: D^−½.
        window: W of eq. 9, tokens, at least 1.
        horizon: (H_lo, H_hi) of eq. 10, tokens, both ends in; H_hi None: to the end of the sequence.
        lse: fp32, shaped as the result's; used instead of computing it. An infinite or NaN one leaves a row undefined.
        span: whether span is wanted.
        backend: "auto", "cpu", "triton" or "reference".
        span_rows: with `lse` given, estimate span from this many rows of each response, evenly spread
            (docs/forwards.md says how well), instead of a full sweep.

    Raises:
        ValueError: an argument is not as described; the message names it.
        RuntimeError: the named backend is not available on this machine.
    """
    if span_rows is not None and (lse is None or not span):
        raise ValueError(f"span_rows is {span_rows}; it goes with lse given and span wanted, else the sweep has span")
    q, k = _detached("q", q), _detached("k", k)
    scale, prompts = _prepared(q, cu_seqlens, prompt_lens, scale)
    scale, window, horizon = arguments.check_options(scale, window, horizon)
    span_rows = _checked_names(backend, "fused", span_rows)
    if lse is not None:
        arguments.check_lse(lse, _lse_shape(q), q.device)
        lse = _flatten(lse.detach(), q)
    span_BH, waad_HT, fai_HT, lse_HT = _attention_statistics(
        q, k, cu_seqlens, prompts, scale, window, horizon[0], horizon[1], lse, span, backend, span_rows
    )
    return AttentionStatistics(
        span_BH if span else None, _unflatten(waad_HT, q), _unflatten(fai_HT, q), _unflatten(lse_HT, q)
    )


def attention_with_statistics(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    prompt_lens: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    window: int = 10,
    horizon: tuple[int, int | None] = (10, 50),
    backend: str = "auto",
    forward: str = "fused",
    span_rows: int | None = None,
) -> tuple[Tensor, AttentionStatistics]:
    """Causal attention and its statistics: (out shaped and typed as q, AttentionStatistics).

    `out` covers all rows, the statistics those of the response. v is shaped and typed as k; everything else is as in
    `attention_statistics`. Forward only: inputs that require grad are treated as detached.

    Args:
        forward: "fused": all in one sweep. "flash_attn", "sdpa_flash", "sdpa_cudnn": the library's out and lse, to
            which the bands are added; span then takes a sweep of its own, or `span_rows`. "auto": what was measured
            to be fastest on this device.
        span_rows: with another forward than the fused one, estimate span from this many rows of each response. With
            "auto" it holds where the choice is not the fused sweep, which has the exact span for nothing.

    Raises:
        ValueError: an argument is not as described; the message names it.
        RuntimeError: the named backend or forward is not available on this machine.
    """
    if span_rows is not None and forward == "fused":
        raise ValueError(
            f"span_rows is {span_rows}; it goes with a forward other than 'fused', which has the exact span"
        )
    q, k, v = _detached("q", q), _detached("k", k), _detached("v", v)
    scale, prompts = _prepared(q, cu_seqlens, prompt_lens, scale)
    scale, window, horizon = arguments.check_options(scale, window, horizon)
    span_rows = _checked_names(backend, forward, span_rows)
    out, span_BH, waad_HT, fai_HT, lse_HT = _attention_with_statistics(
        q, k, v, cu_seqlens, prompts, scale, window, horizon[0], horizon[1], backend, forward, span_rows
    )
    statistics = AttentionStatistics(span_BH, _unflatten(waad_HT, q), _unflatten(fai_HT, q), _unflatten(lse_HT, q))
    return out, statistics


def _detached(name: str, x: Tensor) -> Tensor:
    shapes.check_dense(name, x)
    return x.detach()


def _checked_names(backend: str, forward: str, span_rows: int | None) -> int | None:
    """span_rows, as Python's number; all three go to torch, which knows types but not what is allowed."""
    arguments.check_name("backend", backend, backends.NAMES)
    arguments.check_name("forward", forward, attention.NAMES)
    return None if span_rows is None else shapes.integer("span_rows", span_rows, 1)


def _prepared(
    q: Tensor, cu_seqlens: Tensor | None, prompt_lens: Tensor | Sequence[int] | None, scale: float | None
) -> tuple[float, Tensor | None]:
    """The softmax scale, and prompt_lens as a tensor."""
    if q.ndim not in (3, 4):
        raise ValueError(f"q has shape {tuple(q.shape)}; allowed are [T, Hq, D] and [B, T, Hq, D]")
    if cu_seqlens is not None:
        shapes.check_dense("cu_seqlens", cu_seqlens)
    prompts = None if prompt_lens is None else arguments.prompt_lens_tensor(prompt_lens, q.device)
    return (max(q.shape[-1], 1) ** -0.5 if scale is None else scale), prompts


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cu_seqlens: Tensor | None,
    prompt_lens: Tensor | None,
    scale: float,
    window: int,
    horizon: tuple[int, int | None],
    span_rows: int | None,
) -> None:
    """The static checks. Inside the ops, since compiled graphs and C++ call these."""
    arguments.check_tensors(q, k, v)
    arguments.check_options(scale, window, horizon)
    arguments.check_sequences(q, cu_seqlens, prompt_lens)
    if span_rows is not None:
        shapes.integer("span_rows", span_rows, 1)


def _lse_shape(q: Tensor) -> tuple[int, ...]:
    return (q.shape[-2], q.shape[0]) if q.ndim == 3 else (q.shape[0], q.shape[-2], q.shape[1])


def _flatten(x: Tensor, q: Tensor) -> Tensor:
    """[B, H, T] → [H, B·T] where q is batched."""
    return x if q.ndim == 3 else x.transpose(0, 1).flatten(1)


def _unflatten(x_HT: Tensor, q: Tensor) -> Tensor:
    """[H, B·T] → [B, H, T] where q is batched."""
    return x_HT if q.ndim == 3 else x_HT.view(x_HT.shape[0], q.shape[0], q.shape[1]).transpose(0, 1)


def _own_precision(q: Tensor) -> AbstractContextManager[Any]:
    """Without the caller's autocast, which would take fp32 products of the plain torch parts to low precision."""
    kind = q.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


@torch.library.custom_op("rhythm::attention_statistics", mutates_args=())
def _attention_statistics(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None,
    prompt_lens: Tensor | None,
    scale: float,
    window: int,
    horizon_lo: int,
    horizon_hi: int | None,
    lse: Tensor | None,
    span: bool,
    backend: str,
    span_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    horizon = (horizon_lo, horizon_hi)
    _check(q, k, None, cu_seqlens, prompt_lens, scale, window, horizon, span_rows)
    arguments.check_lse(lse, (q.shape[-2], q.shape[:-2].numel()), q.device)
    layout = arguments.layout(q, cu_seqlens, prompt_lens)
    chosen = backends.choose(backend, q)
    sampled = span_rows is not None and lse is not None
    with _own_precision(q):
        outputs = chosen.run(
            q,
            k,
            None,
            layout,
            scale=scale,
            window=window,
            horizon=horizon,
            lse_HT=lse,
            span=span and not sampled,
        )
        span_BH = chosen.sampled_span(q, k, lse, layout, scale=scale, count=span_rows) if sampled else outputs.span_BH
    return span_BH, outputs.waad_HT, outputs.fai_HT, outputs.lse_HT


@torch.library.custom_op("rhythm::attention_with_statistics", mutates_args=())
def _attention_with_statistics(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    prompt_lens: Tensor | None,
    scale: float,
    window: int,
    horizon_lo: int,
    horizon_hi: int | None,
    backend: str,
    forward: str = "fused",
    span_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    horizon = (horizon_lo, horizon_hi)
    _check(q, k, v, cu_seqlens, prompt_lens, scale, window, horizon, span_rows)
    layout = arguments.layout(q, cu_seqlens, prompt_lens)
    chosen = backends.choose(backend, q)
    settings = {"scale": scale, "window": window, "horizon": horizon}
    library = attention.choose(forward, q, k, layout)
    with _own_precision(q):
        if library is None or layout.tokens == 0:
            outputs = chosen.run(q, k, v, layout, lse_HT=None, span=True, **settings)
            assert outputs.out_THD is not None
            return outputs.out_THD.view(q.shape), outputs.span_BH, outputs.waad_HT, outputs.fai_HT, outputs.lse_HT
        out, lse_HT = library.run(q, k, v, layout, scale)
        outputs = chosen.run(q, k, None, layout, lse_HT=lse_HT, span=span_rows is None, **settings)
        if span_rows is None:
            span_BH = outputs.span_BH
        else:
            span_BH = chosen.sampled_span(q, k, lse_HT, layout, scale=scale, count=span_rows)
    return out, span_BH, outputs.waad_HT, outputs.fai_HT, outputs.lse_HT


@_attention_statistics.register_fake
def _(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None,
    prompt_lens: Tensor | None,
    scale: float,
    window: int,
    horizon_lo: int,
    horizon_hi: int | None,
    lse: Tensor | None,
    span: bool,
    backend: str,
    span_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(q, k, None, cu_seqlens, prompt_lens, scale, window, (horizon_lo, horizon_hi), span_rows)
    return _fake_statistics(q, cu_seqlens)


@_attention_with_statistics.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    prompt_lens: Tensor | None,
    scale: float,
    window: int,
    horizon_lo: int,
    horizon_hi: int | None,
    backend: str,
    forward: str = "fused",
    span_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(q, k, v, cu_seqlens, prompt_lens, scale, window, (horizon_lo, horizon_hi), span_rows)
    return q.new_empty(q.shape), *_fake_statistics(q, cu_seqlens)


def _fake_statistics(q: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty (span [B, H], waad, fai, lse [H, T]) of the types and shapes the ops give."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads = q.shape[-2]
    if q.ndim == 4:
        batch, tokens = q.shape[0], q.shape[0] * q.shape[1]
    else:
        batch, tokens = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1, q.shape[0]
    waad, fai, lse = (q.new_empty((heads, tokens), dtype=dtype) for _ in range(3))
    return q.new_empty((batch, heads), dtype=dtype), waad, fai, lse
