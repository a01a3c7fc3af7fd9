"""Q, K → statistics: the public ops, also registered as torch.ops.rhythm.

Shape suffixes: B sequences, T tokens of all sequences on one axis (that of the keys), H query heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rhythm import shapes
from rhythm.ops import arguments, backends
from rhythm.ops import attention as implementations
from rhythm.ops.arguments import Request
from rhythm.ops.backends.base import BackendResult
from rhythm.system.renamed import refuse_renamed

FORM = ("softcap", "sliding_window", "sinks", "cu_seqlens_k")  # last arguments of the ops, in this order


@dataclass(frozen=True)
class AttentionStatistics:
    """Statistics of the attention maps of one layer, per query head, in fp32.

    Attributes:
        span: [B, Hq], tokens: mean distance looked back over response rows (eq. 7); NaN without response rows.
            None where it was not asked for.
        waad: [Hq, T] for packed q, [B, Hq, T] for q [B, T, Hq, D]; tokens, in [0, window] (eq. 9); NaN on prompt rows.
        fai: same shape: mean attention received from response rows within the horizon (eq. 10); NaN where there
            are none.
        lse: same shape: log Σ exp(score), natural; NaN on prompt rows.

    T is the tokens of k. Where q has fewer rows, tokens without one count as prompt.
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
    softcap: float | None = None,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> AttentionStatistics:
    """Span, WAAD and FAI of causal attention, without the attention maps (paper eqs. 7, 9, 10).

    Memory is O(Hq·T) beyond a packed copy of k. With `lse` given (from any flash forward) and `span=False` only the
    bands near the diagonal are visited, O(T·(window + H_hi)·D). Inputs that require grad are treated as detached.

    Statistics are those of the attention as it is: with a sliding window hidden keys have A = 0, with sinks the rows of
    A sum to less than 1.

    Args:
        q: [T, Hq, D] packed, or [B, T, Hq, D]; fp32, fp16 or bf16 (fp64 for the reference); any strides. It may have
            fewer rows than k, those of the last tokens of each sequence.
        k: same with Hkv heads, Hkv dividing Hq, on q's device, of q's type.
        cu_seqlens: int32 [B + 1], as in flash-attn's varlen calls; packed q only. None: one sequence.
        prompt_lens: int32 or int64 [B], tokens of each sequence that are its prompt. None: all rows are response.
        scale: softmax scale; None: D^−½.
        window: W of eq. 9, tokens, at least 1.
        horizon: (H_lo, H_hi) of eq. 10, tokens, both ends in; H_hi None: to the end of the sequence.
        lse: fp32, shaped as the result's, or of q's rows alone where these are fewer; used instead of computing it. An
            infinite or NaN one leaves a row undefined.
        span: whether span is wanted.
        backend: "auto", "cpu", "triton" or "reference".
        span_rows: with `lse` given, estimate span from this many rows of each response, evenly spread
            (docs/attention.md says how well), instead of a full sweep.
        softcap: c > 0: scores become c·tanh(score / c), as in Gemma 2. None: they stay as they are.
        sliding_window: w ≥ 1, tokens: keys at t − s ≥ w are hidden; a token sees itself and w − 1 before it. None: none
            are hidden.
        sinks: [Hq], natural logits: lse = log(Σ exp(score) + exp(sink)), as in gpt-oss. None: none.
        cu_seqlens_k: int32 [B + 1], of k (and v), where cu_seqlens is that of fewer rows of q. None: as cu_seqlens.

    Raises:
        ValueError: an argument is not as described; the message names it.
        RuntimeError: the named backend is not available on this machine.
    """
    lo, hi = arguments.pair(horizon)
    span_BH, waad_HT, fai_HT, lse_HT = _attention_statistics(
        _detached("q", q),
        _detached("k", k),
        None if cu_seqlens is None else _detached("cu_seqlens", cu_seqlens),
        None if prompt_lens is None else arguments.prompt_lens_tensor(prompt_lens, q.device),
        arguments.softmax_scale(q, scale),
        shapes.integer("window", window),
        lo,
        hi,
        None if lse is None else _detached("lse", lse),
        span,
        arguments.name_of("backend", backend, backends.NAMES),
        None if span_rows is None else shapes.integer("span_rows", span_rows),
        *form_arguments(softcap, sliding_window, sinks, cu_seqlens_k),
    )
    return AttentionStatistics(
        span_BH if span else None, _unflatten(waad_HT, k), _unflatten(fai_HT, k), _unflatten(lse_HT, k)
    )


@refuse_renamed(forward="attention")
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
    attention: str = "fused",
    span_rows: int | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, AttentionStatistics]:
    """Causal attention and its statistics: (out shaped and typed as q, AttentionStatistics).

    `out` covers all rows, the statistics those of the response. v is shaped and typed as k; everything else is as in
    `attention_statistics`. There is no backward: inputs that require grad are treated as detached.

    Args:
        attention: "fused": all in one sweep. "flash_attn", "sdpa_flash", "sdpa_cudnn": the library's out and lse, to
            which the bands are added; span then takes a separate sweep, or `span_rows`. "auto": what was measured
            to be fastest on this device.
        span_rows: with attention other than "fused", estimate span from this many rows of each response. With "auto"
            it is not used where the choice is the fused sweep, which computes the exact span at no extra cost.

    Raises:
        ValueError: an argument is not as described; the message names it.
        RuntimeError: the named backend or attention is not available on this machine.
    """
    lo, hi = arguments.pair(horizon)
    out, span_BH, waad_HT, fai_HT, lse_HT = _attention_with_statistics(
        _detached("q", q),
        _detached("k", k),
        _detached("v", v),
        None if cu_seqlens is None else _detached("cu_seqlens", cu_seqlens),
        None if prompt_lens is None else arguments.prompt_lens_tensor(prompt_lens, q.device),
        arguments.softmax_scale(q, scale),
        shapes.integer("window", window),
        lo,
        hi,
        arguments.name_of("backend", backend, backends.NAMES),
        arguments.name_of("attention", attention, implementations.NAMES),
        None if span_rows is None else shapes.integer("span_rows", span_rows),
        *form_arguments(softcap, sliding_window, sinks, cu_seqlens_k),
    )
    statistics = AttentionStatistics(span_BH, _unflatten(waad_HT, k), _unflatten(fai_HT, k), _unflatten(lse_HT, k))
    return out, statistics


def form_arguments(
    softcap: object, sliding_window: object, sinks: Tensor | None, cu_seqlens_k: Tensor | None
) -> tuple[float | None, int | None, Tensor | None, Tensor | None]:
    """These four as the ops' schemas have them."""
    return (
        arguments.cap(softcap),
        None if sliding_window is None else shapes.integer("sliding_window", sliding_window),
        None if sinks is None else _detached("sinks", sinks),
        None if cu_seqlens_k is None else _detached("cu_seqlens_k", cu_seqlens_k),
    )


def _detached(name: str, x: Tensor) -> Tensor:
    shapes.check_tensor(name, x)
    return x.detach()


def _unflatten(x_HT: Tensor, k: Tensor) -> Tensor:
    """[H, B·T] → [B, H, T] where k is batched."""
    return x_HT if k.ndim == 3 else x_HT.view(x_HT.shape[0], k.shape[0], k.shape[1]).transpose(0, 1)


def own_precision(q: Tensor) -> AbstractContextManager[Any]:
    """Without the caller's autocast, which would take fp32 products of the plain torch parts to low precision."""
    kind = q.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def run(request: Request, backend: str) -> BackendResult:
    """What the backend called `backend` gives; span from sampled rows where the request asks for them."""
    chosen = backends.choose(backend, request)
    sampled = request.span_rows is not None and request.lse_HT is not None
    with own_precision(request.q):
        result = chosen.run(replace(request, span=request.span and not sampled))
        if request.span_rows is None or request.lse_HT is None:
            return result
        return replace(result, span_BH=chosen.sampled_span(request, request.lse_HT, request.span_rows))


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
    softcap: float | None = None,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if span_rows is not None and (lse is None or not span):
        raise ValueError(f"span_rows is {span_rows}; it goes with lse given and span wanted, else the sweep has span")
    options = (scale, window, horizon_lo, horizon_hi)
    form: dict[str, Any] = dict(zip(FORM, (softcap, sliding_window, sinks, cu_seqlens_k), strict=True))
    request = arguments.checked(
        q, k, None, cu_seqlens, prompt_lens, *options, lse=lse, span=span, span_rows=span_rows, **form
    )
    result = run(arguments.ready(request), backend)
    return result.span_BH, result.waad_HT, result.fai_HT, result.lse_HT


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
    attention: str = "fused",
    span_rows: int | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if span_rows is not None and attention == "fused":
        raise ValueError(
            f"span_rows is {span_rows}; it goes with attention other than 'fused', which has the exact span"
        )
    options = (scale, window, horizon_lo, horizon_hi)
    form: dict[str, Any] = dict(zip(FORM, (softcap, sliding_window, sinks, cu_seqlens_k), strict=True))
    request = arguments.ready(
        arguments.checked(q, k, v, cu_seqlens, prompt_lens, *options, span_rows=span_rows, **form)
    )
    implementation = implementations.choose(attention, request)
    if implementation is None or request.sequences.tokens == 0:
        result = run(request, backend)
        assert result.out_THD is not None
        out = result.out_THD.view(q.shape)
    else:
        with own_precision(q):
            out, lse_HT = implementation.run(request)
        result = run(arguments.ready(replace(request, v=None, lse_HT=lse_HT)), backend)
    return out, result.span_BH, result.waad_HT, result.fai_HT, result.lse_HT


# In the fakes `rest` begins with the six arguments from cu_seqlens to horizon_hi, and may end before those of FORM.


@_attention_statistics.register_fake
def _(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    form: dict[str, Any] = dict(zip(FORM, rest[10:], strict=False))
    return _empty_statistics(arguments.checked(q, k, None, *rest[:6], lse=rest[6], **form))


@_attention_with_statistics.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    form: dict[str, Any] = dict(zip(FORM, rest[9:], strict=False))
    return q.new_empty(q.shape), *_empty_statistics(arguments.checked(q, k, v, *rest[:6], **form))


def _empty_statistics(request: Request) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty (span [B, H], waad, fai, lse [H, T]) of the types and shapes the ops give."""
    q, sequences = request.q, request.sequences
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    waad, fai, lse = (q.new_empty((q.shape[-2], sequences.tokens), dtype=dtype) for _ in range(3))
    return q.new_empty((sequences.count, q.shape[-2]), dtype=dtype), waad, fai, lse
