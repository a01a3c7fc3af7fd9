"""Q, K → statistics: the public ops, also registered as torch.ops.rhythm.

Shape suffixes: B sequences, T tokens of all sequences on one axis, H query heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rhythm import arguments, backends


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
) -> AttentionStatistics:
    """Span, WAAD and FAI of causal attention, without the attention maps (DESIGN §2; paper eqs. 7, 9, 10).

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
        lse: fp32, shaped as the result's; used instead of computing it.
        span: whether span is wanted.
        backend: "auto", "cpu" or "reference".

    Raises:
        ValueError: an argument is not as described; the message names it.
        RuntimeError: the named backend is not available on this machine.
    """
    q, k = q.detach(), k.detach()
    scale, prompts = _checked(q, k, None, cu_seqlens, prompt_lens, scale, window, horizon, lse)
    flat_lse = None if lse is None else _flatten(lse, q)
    span_BH, waad_HT, fai_HT, lse_HT = _attention_statistics(
        q, k, cu_seqlens, prompts, scale, window, horizon[0], horizon[1], flat_lse, span, backend
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
) -> tuple[Tensor, AttentionStatistics]:
    """Causal attention and its statistics in one sweep: (out shaped and typed as q, AttentionStatistics).

    `out` covers all rows, the statistics those of the response. v is shaped and typed as k; everything else is as in
    `attention_statistics`. Forward only: inputs that require grad are treated as detached.
    """
    q, k, v = q.detach(), k.detach(), v.detach()
    scale, prompts = _checked(q, k, v, cu_seqlens, prompt_lens, scale, window, horizon, None)
    out, span_BH, waad_HT, fai_HT, lse_HT = _attention_with_statistics(
        q, k, v, cu_seqlens, prompts, scale, window, horizon[0], horizon[1], backend
    )
    statistics = AttentionStatistics(span_BH, _unflatten(waad_HT, q), _unflatten(fai_HT, q), _unflatten(lse_HT, q))
    return out, statistics


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cu_seqlens: Tensor | None,
    prompt_lens: Tensor | Sequence[int] | None,
    scale: float | None,
    window: int,
    horizon: tuple[int, int | None],
    lse: Tensor | None,
) -> tuple[float, Tensor | None]:
    """The static checks; gives the softmax scale and prompt_lens as a tensor."""
    arguments.check_tensors(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    arguments.check_options(scale, window, horizon)
    heads = q.shape[-2]
    arguments.check_lse(lse, (heads, q.shape[0]) if q.ndim == 3 else (q.shape[0], heads, q.shape[1]), q.device)
    if prompt_lens is not None and not isinstance(prompt_lens, Tensor):
        prompt_lens = torch.tensor(prompt_lens, dtype=torch.int64, device=q.device)
    arguments.check_sequences(q, cu_seqlens, prompt_lens)
    return scale, prompt_lens


def _flatten(x: Tensor, q: Tensor) -> Tensor:
    """[B, H, T] → [H, B·T] where q is batched."""
    return x if q.ndim == 3 else x.transpose(0, 1).flatten(1)


def _unflatten(x_HT: Tensor, q: Tensor) -> Tensor:
    """[H, B·T] → [B, H, T] where q is batched."""
    return x_HT if q.ndim == 3 else x_HT.view(-1, q.shape[0], q.shape[1]).transpose(0, 1)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layout = arguments.layout(q, cu_seqlens, prompt_lens)
    outputs = backends.choose(backend, q).run(
        q,
        k,
        None,
        layout,
        scale=scale,
        window=window,
        horizon=(horizon_lo, horizon_hi),
        lse_HT=lse,
        span=span,
    )
    return outputs.span_BH, outputs.waad_HT, outputs.fai_HT, outputs.lse_HT


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    layout = arguments.layout(q, cu_seqlens, prompt_lens)
    outputs = backends.choose(backend, q).run(
        q,
        k,
        v,
        layout,
        scale=scale,
        window=window,
        horizon=(horizon_lo, horizon_hi),
        lse_HT=None,
        span=True,
    )
    assert outputs.out_THD is not None
    return outputs.out_THD.view(q.shape), outputs.span_BH, outputs.waad_HT, outputs.fai_HT, outputs.lse_HT


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
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
