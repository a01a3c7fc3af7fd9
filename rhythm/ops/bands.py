"""WAAD and FAI for several windows and horizons from one pass over the bands near the diagonal.

Shape suffixes: W windows, F horizons, B sequences, T tokens of all sequences on one axis, H query heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rhythm import shapes
from rhythm.ops import arguments, backends
from rhythm.ops.arguments import Request
from rhythm.ops.registered import own_precision
from rhythm.ops.statistics import form_arguments, unflatten
from rhythm.shapes import MAX_INT


def attention_bands(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    windows: Sequence[int],
    horizons: Sequence[tuple[int, int | None]],
    cu_seqlens: Tensor | None = None,
    prompt_lens: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    backend: str = "auto",
    softcap: float | None = None,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(WAAD (windowed average attention distance) for each window, FAI (future attention influence) for
    each horizon) of causal attention whose lse is known (paper eqs. 9, 10).

    The same as `attention_statistics(q, k, lse=lse, span=False, …)` for one window and horizon after the other. The C++
    kernels compute the products near the diagonal once for all of them, O(T·max(window, H_hi)·D); other backends make
    one pass for each window and horizon, the i-th of both together.

    Args:
        q, k, cu_seqlens, prompt_lens, scale, backend, softcap, sliding_window, sinks, cu_seqlens_k: as in
            `attention_statistics`.
        lse: fp32 [Hq, T] or [B, Hq, T], from `attention_statistics` or any flash forward.
        windows: each at least 1, tokens; may be empty.
        horizons: pairs (H_lo, H_hi), tokens, both ends in; H_hi None: to the end, a sweep over all later rows; may be
            empty.

    Returns:
        WAAD [len(windows), Hq, T] and FAI [len(horizons), Hq, T], fp32, tokens and 1; batched [len, B, Hq, T].

    Raises:
        ValueError: an argument is not as described; the message names it.
        RuntimeError: the named backend is not available on this machine.
    """
    for name, x in (("q", q), ("k", k), ("lse", lse)):
        shapes.check_tensor(name, x)
    if cu_seqlens is not None:
        shapes.check_tensor("cu_seqlens", cu_seqlens)
    pairs = [_named(f"horizons[{i}]", horizon) for i, horizon in enumerate(_items("horizons", horizons))]
    waad_WHT, fai_FHT = _attention_bands(
        q.detach(),
        k.detach(),
        lse.detach(),
        [shapes.integer(f"windows[{i}]", window, 1) for i, window in enumerate(_items("windows", windows))],
        [lo for lo, _ in pairs],
        [hi for _, hi in pairs],
        cu_seqlens,
        None if prompt_lens is None else arguments.prompt_lens_tensor(prompt_lens, q.device),
        arguments.softmax_scale(q, scale),
        arguments.name_of("backend", backend, backends.NAMES),
        *form_arguments(softcap, sliding_window, sinks, cu_seqlens_k),
    )
    return unflatten(waad_WHT, k), unflatten(fai_FHT, k)


@torch.library.custom_op("rhythm::attention_bands", mutates_args=())
def _attention_bands(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    windows: Sequence[int],
    horizons_lo: Sequence[int],
    horizons_hi: Sequence[int],
    cu_seqlens: Tensor | None,
    prompt_lens: Tensor | None,
    scale: float,
    backend: str,
    softcap: float | None = None,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A horizon to the end has the largest integer as its upper end."""
    horizons, options = _pairs(horizons_lo, horizons_hi), (cu_seqlens, prompt_lens, scale)
    request = _checked(q, k, lse, windows, horizons, options, (softcap, sliding_window, sinks, cu_seqlens_k))
    chosen = backends.choose(backend, request)
    with own_precision(q):
        return chosen.bands(arguments.ready(request), list(windows), horizons)


@_attention_bands.register_fake
def _(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    windows: Sequence[int],
    horizons_lo: Sequence[int],
    horizons_hi: Sequence[int],
    cu_seqlens: Tensor | None,
    prompt_lens: Tensor | None,
    scale: float,
    backend: str,
    *form: object,
) -> tuple[Tensor, Tensor]:
    horizons, options = _pairs(horizons_lo, horizons_hi), (cu_seqlens, prompt_lens, scale)
    request = _checked(q, k, lse, windows, horizons, options, form)
    heads, dtype = q.shape[-2], torch.float64 if q.dtype == torch.float64 else torch.float32
    waad, fai = (q.new_empty((n, heads, request.sequences.tokens), dtype=dtype) for n in (len(windows), len(horizons)))
    return waad, fai


def _checked(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    windows: Sequence[int],
    horizons: list[tuple[int, int]],
    options: tuple[Tensor | None, Tensor | None, float],
    form: tuple[object, ...],
) -> Request:
    for i, window in enumerate(windows):
        shapes.integer(f"windows[{i}]", window, 1)
    for i, (lo, hi) in enumerate(horizons):
        if not 0 <= lo <= hi:
            raise ValueError(f"horizons[{i}] is {(lo, hi)}; it must be (lo, hi) with 0 <= lo <= hi, or hi None")
    named = dict(zip(("softcap", "sliding_window", "sinks", "cu_seqlens_k"), form, strict=False))
    return arguments.checked(q, k, None, *options, 1, 0, None, lse=lse, span=False, **named)  # type: ignore[arg-type]


def _pairs(lo: Sequence[int], hi: Sequence[int]) -> list[tuple[int, int]]:
    if len(lo) != len(hi):
        raise ValueError(f"horizons_lo has {len(lo)} entries and horizons_hi {len(hi)}; they must have as many")
    return list(zip(lo, hi, strict=True))


def _items(name: str, values: object) -> Sequence[object]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{name} is {values!r}; it must be a sequence")
    return values


def _named(name: str, horizon: object) -> tuple[int, int]:
    """(lo, hi) of a horizon, the largest integer for None."""
    try:
        lo, hi = arguments.pair(horizon)
    except ValueError as error:
        raise ValueError(str(error).replace("horizon", name, 1)) from None
    return lo, MAX_INT if hi is None else hi
