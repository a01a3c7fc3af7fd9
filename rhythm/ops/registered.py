"""The statistics as ops under torch.ops.rhythm, with fakes, and the run of a checked request by a backend.

The public functions (statistics.py) turn Python's values into these ops' arguments. An op returns what a backend does,
with the tokens of all sequences on one axis.

Shape suffixes: B sequences, T tokens of all sequences on one axis (that of the keys), H query heads, A answers.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rhythm.ops import arguments, backends
from rhythm.ops import attention as implementations
from rhythm.ops.answers import also_names
from rhythm.ops.arguments import Request
from rhythm.ops.backends.base import BackendResult

FORM = ("softcap", "sliding_window", "sinks", "cu_seqlens_k")
MORE = ("also", "first", "prompt_rows")
"""The ops' last arguments, in this order; those of MORE only of the ops that end in _also."""


def own_precision(q: Tensor) -> AbstractContextManager[Any]:
    """Disables the caller's autocast, which would compute the fp32 products of plain torch code in low precision."""
    kind = q.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def run(request: Request, backend: str) -> BackendResult:
    """The result of the backend named `backend`, with span from sampled rows if the request asks for them."""
    chosen = backends.choose(backend, request)
    sampled = request.span_rows is not None and request.lse_HT is not None
    with own_precision(request.q):
        result = chosen.run(replace(request, span=request.span and not sampled))
        if request.also and result.also_AHT is None:
            result = replace(result, also_AHT=chosen.also(request))
        if request.span_rows is None or request.lse_HT is None:
            return result
        return replace(result, span_BH=chosen.sampled_span(request, request.lse_HT, request.span_rows))


def _statistics(
    q: Tensor, k: Tensor, options: tuple[Any, ...], lse: Tensor | None, span: bool, backend: str,
    span_rows: int | None, rest: dict[str, Any],
) -> BackendResult:  # fmt: skip
    if span_rows is not None and (lse is None or not span):
        raise ValueError(f"span_rows is {span_rows}; it goes with lse given and span wanted, else the sweep has span")
    request = arguments.checked(q, k, None, *options, lse=lse, span=span, span_rows=span_rows, **rest)
    return run(arguments.ready(request), backend)


def _with_output(
    q: Tensor, k: Tensor, v: Tensor, options: tuple[Any, ...], backend: str, attention: str, span_rows: int | None,
    rest: dict[str, Any],
) -> tuple[Tensor, BackendResult]:  # fmt: skip
    if span_rows is not None and attention == "fused":
        raise ValueError(
            f"span_rows is {span_rows}; it goes with attention other than 'fused', which has the exact span"
        )
    request = arguments.ready(arguments.checked(q, k, v, *options, span_rows=span_rows, **rest))
    implementation = implementations.choose(attention, request)
    if implementation is None or request.sequences.tokens == 0:
        result = run(request, backend)
        assert result.out_THD is not None
        return result.out_THD.view(q.shape), result
    with own_precision(q):
        out, lse_HT = implementation.run(request)
    return out, run(arguments.ready(replace(request, v=None, lse_HT=lse_HT)), backend)


@torch.library.custom_op("rhythm::attention_statistics", mutates_args=())
def attention_statistics(
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
    options = (cu_seqlens, prompt_lens, scale, window, horizon_lo, horizon_hi)
    form = _form(softcap, sliding_window, sinks, cu_seqlens_k)
    return _flat(_statistics(q, k, options, lse, span, backend, span_rows, form))


@torch.library.custom_op("rhythm::attention_statistics_also", mutates_args=())
def attention_statistics_also(
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
    also: str = "",
    first: int = 4,
    prompt_rows: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """also: names with commas between; the last result is [A, H, T], in the order of `answers.ALSO`."""
    options = (cu_seqlens, prompt_lens, scale, window, horizon_lo, horizon_hi)
    rest = _form(softcap, sliding_window, sinks, cu_seqlens_k) | _more(also, first, prompt_rows)
    result = _statistics(q, k, options, lse, span, backend, span_rows, rest)
    return *_flat(result), _also(result)


@torch.library.custom_op("rhythm::attention_with_statistics", mutates_args=())
def attention_with_statistics(
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
    options = (cu_seqlens, prompt_lens, scale, window, horizon_lo, horizon_hi)
    form = _form(softcap, sliding_window, sinks, cu_seqlens_k)
    out, result = _with_output(q, k, v, options, backend, attention, span_rows, form)
    return out, *_flat(result)


@torch.library.custom_op("rhythm::attention_with_statistics_also", mutates_args=())
def attention_with_statistics_also(
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
    also: str = "",
    first: int = 4,
    prompt_rows: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """also: as in attention_statistics_also."""
    options = (cu_seqlens, prompt_lens, scale, window, horizon_lo, horizon_hi)
    rest = _form(softcap, sliding_window, sinks, cu_seqlens_k) | _more(also, first, prompt_rows)
    out, result = _with_output(q, k, v, options, backend, attention, span_rows, rest)
    return out, *_flat(result), _also(result)


def _form(*values: Any) -> dict[str, Any]:
    return dict(zip(FORM, values, strict=True))


def _more(also: str, first: int, prompt_rows: bool) -> dict[str, Any]:
    names = also_names(also.split(",") if also else ())
    return {"also": names, "first": first, "prompt_rows": prompt_rows}


def _flat(result: BackendResult) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return result.span_BH, result.waad_HT, result.fai_HT, result.lse_HT


def _also(result: BackendResult) -> Tensor:
    return result.lse_HT.new_empty((0, *result.lse_HT.shape)) if result.also_AHT is None else result.also_AHT


# In the fakes `rest` begins with the six arguments from cu_seqlens to horizon_hi, and may end before those of FORM.


@attention_statistics.register_fake
def _(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_statistics(arguments.checked(q, k, None, *rest[:6], lse=rest[6], **_named(rest[10:])))


@attention_statistics_also.register_fake
def _(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    request = arguments.checked(q, k, None, *rest[:6], lse=rest[6], **_named(rest[10:]))
    return *_empty_statistics(request), _empty_also(request)


@attention_with_statistics.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), *_empty_statistics(arguments.checked(q, k, v, *rest[:6], **_named(rest[9:])))


@attention_with_statistics_also.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    request = arguments.checked(q, k, v, *rest[:6], **_named(rest[9:]))
    return q.new_empty(q.shape), *_empty_statistics(request), _empty_also(request)


def _named(values: tuple[Any, ...]) -> dict[str, Any]:
    """The last arguments of an op by name; those of MORE as where they are not given."""
    given: dict[str, Any] = dict(zip((*FORM, *MORE), values, strict=False))
    return given | _more(given.get("also", ""), given.get("first", 4), given.get("prompt_rows", False))


def _empty_statistics(request: Request) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty (span [B, H], waad, fai, lse [H, T]) of the types and shapes the ops give."""
    q, sequences = request.q, request.sequences
    waad, fai, lse = (_empty(request, q.shape[-2], sequences.tokens) for _ in range(3))
    return _empty(request, sequences.count, q.shape[-2]), waad, fai, lse


def _empty_also(request: Request) -> Tensor:
    return _empty(request, len(request.also), request.q.shape[-2], request.sequences.tokens)


def _empty(request: Request, *shape: int) -> Tensor:
    dtype = torch.float64 if request.q.dtype == torch.float64 else torch.float32
    return request.q.new_empty(shape, dtype=dtype)
