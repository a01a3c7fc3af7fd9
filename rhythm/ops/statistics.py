"""Q, K → statistics: the public ops; registered.py has them under torch.ops.rhythm.

Shape suffixes: B sequences, T tokens of all sequences on one axis (that of the keys), H query heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rhythm import shapes
from rhythm.ops import arguments, backends, registered
from rhythm.ops import attention as implementations
from rhythm.ops.answers import also_names, check_also
from rhythm.system.renamed import refuse_renamed


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
        max_logit: same shape: max_s of the scaled, capped score; a sink is not counted. This and what follows is NaN on
            prompt rows and None unless `also` names it.
        top1: same shape: max_s A[t, s].
        entropy: same shape: −Σ_s A[t, s]·log A[t, s], nats, in [0, log(t + 1)] for rows that sum to 1.
        first_mass: same shape: Σ A[t, s] over the first keys of the sequence, s < `first`.
        prompt_mass: same shape: Σ A[t, s] over its prompt, s < prompt_lens.

    T is the tokens of k. Where q has fewer rows, tokens without one count as prompt.
    """

    span: Tensor | None
    waad: Tensor
    fai: Tensor
    lse: Tensor
    max_logit: Tensor | None = None
    top1: Tensor | None = None
    entropy: Tensor | None = None
    first_mass: Tensor | None = None
    prompt_mass: Tensor | None = None


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
    also: Sequence[str] = (),
    first: int = 4,
    prompt_rows: bool = False,
) -> AttentionStatistics:
    """Span, WAAD (windowed average attention distance) and FAI (future attention influence) of
    causal attention, without the attention maps (paper eqs. 7, 9, 10).

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
        lse: fp32, shaped as the result's, or of q's rows alone where these are fewer; used instead of computing it, so
            it must be that of these scores: rows are taken to sum to 1. An infinite or NaN one leaves a row undefined.
        span: whether span is wanted.
        backend: "auto", "cpu", "triton" or "reference".
        span_rows: with `lse` given, estimate span from this many rows of each response, evenly spread
            (docs/attention.md says how well), instead of a full sweep.
        softcap: c > 0: scores become c·tanh(score / c), as in Gemma 2. None: they stay as they are.
        sliding_window: w ≥ 1, tokens: keys at t − s ≥ w are hidden; a token sees itself and w − 1 before it. None: none
            are hidden.
        sinks: [Hq], natural logits: lse = log(Σ exp(score) + exp(sink)), as in gpt-oss. None: none.
        cu_seqlens_k: int32 [B + 1], of k (and v), where cu_seqlens is that of fewer rows of q. None: as cu_seqlens.
        also: more of the result's fields, of "max_logit", "top1", "entropy", "first_mass" and "prompt_mass"; no other
            result changes by it. The C++ kernels compute them in the same sweep, the Triton kernels in one more launch,
            the reference in one more pass by plain torch. With `lse` given A is exp(score − lse), and the last two need
            no sweep.
        first: how many keys count in first_mass, at least 1.
        prompt_rows: max_logit on rows of the prompt, too.

    Raises:
        ValueError: an argument is not as described; the message names it.
        RuntimeError: the named backend is not available on this machine.
    """
    lo, hi = arguments.pair(horizon)
    given = (
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
    if not (more := _more_arguments(also, first, prompt_rows)):
        return _statistics(k, registered.attention_statistics(*given), span)
    *results, also_AHT = registered.attention_statistics_also(*given, *more)
    return _statistics(k, results, span, also_names(also), also_AHT)


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
    also: Sequence[str] = (),
    first: int = 4,
    prompt_rows: bool = False,
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
    given = (
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
    if not (more := _more_arguments(also, first, prompt_rows)):
        out, *results = registered.attention_with_statistics(*given)
        return out, _statistics(k, results)
    out, *results, also_AHT = registered.attention_with_statistics_also(*given, *more)
    return out, _statistics(k, results, True, also_names(also), also_AHT)


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


def _more_arguments(also: Sequence[str], first: int, prompt_rows: bool) -> tuple[str, int, bool] | tuple[()]:
    """The last three arguments of the ops that end in _also; () where the ops without do, the checks made."""
    names, first = also_names(also), shapes.integer("first", first, 1)
    check_also(names, first, prompt_rows)
    return (",".join(names), first, bool(prompt_rows)) if names else ()


def _statistics(
    k: Tensor, results: Sequence[Tensor], span: bool = True, names: Sequence[str] = (), also_AHT: Tensor | None = None
) -> AttentionStatistics:
    """The flat results (span, waad, fai, lse) of an op, and those of the named answers, in the shapes of k."""
    span_BH, *of_tokens = results
    more = (
        {}
        if also_AHT is None
        else {name: unflatten(x_HT, k) for name, x_HT in zip(names, also_AHT.unbind(), strict=True)}
    )
    return AttentionStatistics(span_BH if span else None, *(unflatten(x_HT, k) for x_HT in of_tokens), **more)


def unflatten(x_HT: Tensor, k: Tensor) -> Tensor:
    """[…, H, B·T] → […, B, H, T] where k is batched."""
    return x_HT if k.ndim == 3 else x_HT.view(*x_HT.shape[:-1], *k.shape[:2]).transpose(-3, -2)
