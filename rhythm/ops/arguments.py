"""Arguments of the ops, refused by messages that name the argument, what it was and what is allowed.

The public functions turn Python's values into the types of the ops' schemas (`prompt_lens_tensor`, `softmax_scale`,
`cap`, `pair`, `name_of`, `shapes.integer`): what torch's dispatcher would not take is refused there. Which values are
allowed is checked in `checked`, inside the op, since compiled graphs and C++ call that without the public function; it
reads shapes, types and devices only, so it also runs on fake tensors. `check_values` reads cu_seqlens and prompt_lens.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from rhythm.ops.answers import check_also
from rhythm.shapes import MAX_INT, Sequences, check_dense, index, integer

MAX_SEQUENCES = 2**24  # a batch of more than that without a token would be hours of nothing
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_HEAD_SIZE = 256
LEAST_SOFTCAP, MOST_SOFTCAP = 1e-30, 1e18  # beyond them scores are 0, or as they were, and fp32 has room for no more


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call of an op, its arguments checked: what backends and attention implementations compute.

    Attributes:
        q, k, v: [T, H, D] or [B, T, H, D], k and v with Hkv heads; v is None where no attention output is wanted. q may
            have fewer rows than k: the last ones of each sequence.
        sequences: where the sequences lie on the flattened token axis.
        scale: softmax scale.
        window, horizon: W of eq. 9 and (H_lo, H_hi) of eq. 10, tokens; H_hi None: to the end of the sequence.
        lse_HT: [H, T] on the flattened token axis, to use instead of computing it; NaN where q has no row.
        span: whether span is wanted.
        span_rows: with lse_HT given, estimate span from this many rows of each response.
        softcap: c of score ← c·tanh(score / c); None: scores as they are.
        sliding_window: w, tokens: keys at t − s ≥ w are hidden; None: none are.
        sinks_H: [H], natural logits, one more in the denominator of each row of a head; None: none.
        also: which of `answers.ALSO` are wanted too, in that order.
        first: the keys s < first are those of first_mass.
        prompt_rows: whether max_logit is wanted on rows of the prompt, too.
    """

    q: Tensor
    k: Tensor
    v: Tensor | None
    sequences: Sequences
    scale: float
    window: int
    horizon: tuple[int, int | None]
    lse_HT: Tensor | None = None
    span: bool = True
    span_rows: int | None = None
    softcap: float | None = None
    sliding_window: int | None = None
    sinks_H: Tensor | None = None
    also: tuple[str, ...] = ()
    first: int = 4
    prompt_rows: bool = False

    @property
    def also_sweeps(self) -> bool:
        """Whether `also` has what takes a sweep over all keys, also where lse is given."""
        return self.lse_HT is None or not {"first_mass", "prompt_mass"}.issuperset(self.also)

    @property
    def forms(self) -> list[str]:
        """What makes the attention other than plain and causal with a row for every key, in words."""
        names = {
            "softcap": self.softcap is not None,
            "sliding_window": self.sliding_window is not None,
            "sinks": self.sinks_H is not None,
            "fewer rows in q than in k": self.sequences.fewer_rows,
        }
        return [name for name, given in names.items() if given]


def checked(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cu_seqlens: Tensor | None,
    prompt_lens: Tensor | None,
    scale: float,
    window: int,
    horizon_lo: int,
    horizon_hi: int | None,
    *,
    lse: Tensor | None = None,
    span: bool = True,
    span_rows: int | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    also: tuple[str, ...] = (),
    first: int = 4,
    prompt_rows: bool = False,
) -> Request:
    """The request that an op's arguments make, after all checks but those of values in cu_seqlens and prompt_lens;
    `ready` makes these.

    Args:
        lse: shaped as the statistics, [H, T] or [B, H, T]; for batched q [H, B·T] too, as the ops return it. Where q
            has fewer rows than k, of q's rows or of all tokens.
    """
    check_tensors(q, k, v)
    check_options(scale, window, (horizon_lo, horizon_hi))
    check_form(q, softcap, sliding_window, sinks)
    check_sequences(q, k, cu_seqlens, cu_seqlens_k, prompt_lens)
    check_lse(lse, q, k)
    check_also(also, first, prompt_rows)
    if span_rows is not None:
        integer("span_rows", span_rows, 1)
    if lse is not None and lse.ndim == 3:
        lse = lse.transpose(0, 1).flatten(1)
    if sinks is not None:
        sinks = sinks.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    return Request(
        q=q,
        k=k,
        v=v,
        sequences=_sequences(q, k, cu_seqlens, cu_seqlens_k, prompt_lens),
        scale=scale,
        window=window,
        horizon=(horizon_lo, horizon_hi),
        lse_HT=lse,
        span=span,
        span_rows=span_rows,
        softcap=None if softcap is None else min(max(softcap, LEAST_SOFTCAP), MOST_SOFTCAP),
        sliding_window=sliding_window,
        sinks_H=sinks,
        also=also,
        first=first,
        prompt_rows=prompt_rows,
    )


def ready(request: Request) -> Request:
    """The request, once values in cu_seqlens and prompt_lens are checked, with a given lse on the token axis."""
    sequences, lse = request.sequences, request.lse_HT
    check_values(sequences)
    if lse is None or not sequences.fewer_rows or lse.shape[1] != sequences.rows:
        return request
    of_tokens = lse.new_full((lse.shape[0], sequences.tokens), torch.nan)
    of_tokens[:, sequences.row_places(lse.device)] = lse
    return replace(request, lse_HT=of_tokens)


def _sequences(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, prompt_lens: Tensor | None
) -> Sequences:
    tokens, rows = _flat(k), _flat(q)
    if q.ndim == 4:
        return Sequences(None, prompt_lens, tokens, q.shape[0], rows=rows)
    count = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if cu_seqlens_k is None:
        return Sequences(cu_seqlens, prompt_lens, tokens, count, rows=rows)
    return Sequences(cu_seqlens_k, prompt_lens, tokens, count, cu_rows=cu_seqlens, rows=rows)


def _flat(x: Tensor) -> int:
    """Length of the flattened token axis. Size.numel() would make a symbolic length of torch.compile a constant."""
    return x.shape[0] if x.ndim == 3 else x.shape[0] * x.shape[1]


def prompt_lens_tensor(prompt_lens: object, device: torch.device) -> Tensor:
    """prompt_lens as a tensor: tensors as they are, a sequence of integers as int64 on the device."""
    if isinstance(prompt_lens, Tensor) and prompt_lens.ndim:
        return prompt_lens
    several = isinstance(prompt_lens, Iterable) and not isinstance(prompt_lens, (str, Tensor))
    numbers = list(prompt_lens) if several else None  # type: ignore[call-overload]  # an Iterable
    if numbers is None:
        one, example = index(prompt_lens), ""
        if one is not None:
            prompt_lens, example = one, f" ([{one}] for one sequence)"
        raise ValueError(
            f"prompt_lens is {prompt_lens!r}; it must be int32 or int64 [B], or a sequence of integers{example}"
        )
    # Whether an entry fits its sequence is checked by `check_values`.
    checked = [integer(f"prompt_lens[{i}]", number) for i, number in enumerate(numbers)]
    return torch.tensor(checked, dtype=torch.int64, device=device)


def softmax_scale(q: Tensor, scale: object) -> float:
    """scale as Python's number; None: D^−½."""
    if scale is None:
        return float(max((1, *q.shape)[-1], 1) ** -0.5)
    if (number := _number(scale)) is None:
        raise ValueError(f"scale is {scale!r}; it must be finite, a number")
    return number


def cap(softcap: object) -> float | None:
    """softcap as Python's number."""
    if softcap is not None and (number := _number(softcap)) is None:
        raise ValueError(f"softcap is {softcap!r}; it must be a finite number above 0, or None")
    return None if softcap is None else number


def _number(x: object) -> float | None:
    try:
        # A string such as "0.5" would be taken by float, too.
        return None if isinstance(x, (str, bytes, bool)) else float(x)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None


def pair(horizon: object) -> tuple[int, int | None]:
    """horizon as (lo, hi), Python's integers of 64 bits, or hi None."""
    if not isinstance(horizon, (tuple, list)) or len(horizon) != 2:
        raise ValueError(f"horizon is {horizon!r}; it must be a pair (lo, hi)")
    lo, hi = index(horizon[0]), None if horizon[1] is None else index(horizon[1])
    if lo is None or (hi is None and horizon[1] is not None):
        raise ValueError(f"horizon is {horizon!r}; it must be (lo, hi), integers, or hi None")
    if max(abs(lo), abs(hi or 0)) > MAX_INT:
        raise ValueError(f"horizon is {horizon!r}; it must be (lo, hi) with hi <= {MAX_INT}, or hi None")
    return lo, hi


def name_of(argument: str, name: object, allowed: Iterable[str]) -> str:
    """The name, if it is a string; whether it is an allowed one is checked in the op."""
    if not isinstance(name, str):
        raise unknown_name(argument, name, allowed)
    return name


def unknown_name(argument: str, name: object, allowed: Iterable[str]) -> ValueError:
    return ValueError(f"{argument} is {name!r}; allowed are {', '.join(allowed)}")


def check_tensors(q: Tensor, k: Tensor, v: Tensor | None = None) -> None:
    """q [T, Hq, D] or [B, T, Hq, D]; k and v the same with Hkv heads, Hkv dividing Hq, and perhaps more tokens."""
    check_dense("q", q)
    if q.ndim not in (3, 4):
        raise ValueError(f"q has shape {tuple(q.shape)}; allowed are [T, Hq, D] and [B, T, Hq, D]")
    if q.dtype not in DTYPES:
        raise ValueError(f"q has dtype {q.dtype}; allowed are {', '.join(map(str, DTYPES))}")
    for name, x in (("k", k), ("v", v)):
        if x is None:
            continue
        check_dense(name, x)
        if x.ndim != q.ndim or x.shape[:-3] != q.shape[:-3] or x.shape[-1] != q.shape[-1]:
            wanted = [*q.shape[:-3], "T", "Hkv", q.shape[-1]]
            raise ValueError(f"{name} has shape {tuple(x.shape)}; q's shape {tuple(q.shape)} allows {wanted}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype}; it must be q's, {q.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}; it must be on q's device, {q.device}")
    if v is not None and v.shape != k.shape:
        raise ValueError(f"v has shape {tuple(v.shape)}; it must be k's, {tuple(k.shape)}")
    if q.shape[-3] > k.shape[-3]:
        raise ValueError(f"q has {q.shape[-3]} rows and k {k.shape[-3]}; q may have fewer than k, not more")
    if not 1 <= q.shape[-1] <= MAX_HEAD_SIZE:
        raise ValueError(f"q has head size {q.shape[-1]}; allowed are 1 to {MAX_HEAD_SIZE}")
    if q.ndim == 4 and q.shape[0] > MAX_SEQUENCES:
        raise ValueError(f"q has shape {tuple(q.shape)}, {q.shape[0]} sequences; allowed are {MAX_SEQUENCES}")
    query_heads, key_heads = q.shape[-2], k.shape[-2]
    if key_heads < 1 or query_heads < 1 or query_heads % key_heads:
        raise ValueError(f"q has {query_heads} heads and k has {key_heads}; k's must divide q's, both at least 1")


def check_options(scale: float, window: int, horizon: tuple[int, int | None]) -> None:
    """A finite scale, window ≥ 1, and 0 ≤ H_lo ≤ H_hi (H_hi None: to the end of the sequence)."""
    if not abs(scale) < float("inf"):
        raise ValueError(f"scale is {scale!r}; it must be finite, a number")
    integer("window", window, 1)
    lo, hi = horizon
    if lo < 0 or (hi is not None and hi < lo):
        raise ValueError(f"horizon is {horizon!r}; it must be (lo, hi) with 0 <= lo <= hi, or hi None")


def check_form(q: Tensor, softcap: float | None, sliding_window: int | None, sinks: Tensor | None) -> None:
    """A finite softcap above 0, a window of at least one token, and a logit for each query head on q's device."""
    if softcap is not None and not 0.0 < softcap < float("inf"):
        raise ValueError(f"softcap is {softcap!r}; it must be a finite number above 0, or None")
    if sliding_window is not None:
        integer("sliding_window", sliding_window, 1)
    if sinks is None:
        return
    check_dense("sinks", sinks)
    if tuple(sinks.shape) != (q.shape[-2],):
        raise ValueError(f"sinks has shape {tuple(sinks.shape)}; it must be ({q.shape[-2]},), one per query head")
    if sinks.dtype not in DTYPES:
        raise ValueError(f"sinks has dtype {sinks.dtype}; allowed are {', '.join(map(str, DTYPES))}")
    if sinks.device != q.device:
        raise ValueError(f"sinks is on {sinks.device}; it must be on q's device, {q.device}")


def check_lse(lse: Tensor | None, q: Tensor, k: Tensor) -> None:
    """lse fp32 (or fp64) of the statistics' shape, or flat, on q's device; of q's rows or of all tokens."""
    if lse is None:
        return
    check_dense("lse", lse)
    heads, shape = q.shape[-2], tuple(lse.shape)
    own, of_tokens = ((heads, x.shape[0]) if q.ndim == 3 else (x.shape[0], heads, x.shape[1]) for x in (q, k))
    if shape not in (own, of_tokens, (heads, _flat(q)), (heads, _flat(k))):
        or_tokens = f" or {of_tokens}" if of_tokens != own else ""
        raise ValueError(f"lse has shape {shape}; it must be {own}{or_tokens}")
    if lse.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"lse has dtype {lse.dtype}; allowed are torch.float32, and torch.float64 for float64 q")
    if lse.device != q.device:
        raise ValueError(f"lse is on {lse.device}; it must be on q's device, {q.device}")


def check_sequences(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, prompt_lens: Tensor | None
) -> None:
    """Types and shapes of cu_seqlens and cu_seqlens_k int32 [B + 1] (packed q only), prompt_lens int32 or int64 [B]."""
    for name, bounds in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
        if bounds is None:
            continue
        check_dense(name, bounds)
        if q.ndim == 4:
            raise ValueError(f"{name} goes with packed q [T, Hq, D]; q has shape {tuple(q.shape)}")
        if bounds.dtype != torch.int32:
            raise ValueError(f"{name} has dtype {bounds.dtype}; it must be torch.int32")
        if bounds.ndim != 1 or bounds.shape[0] < 1:
            raise ValueError(f"{name} has shape {tuple(bounds.shape)}; it must be [B + 1]")
        if bounds.device != q.device:
            raise ValueError(f"{name} is on {bounds.device}; it must be on q's device, {q.device}")
    if cu_seqlens_k is not None and (cu_seqlens is None or cu_seqlens.shape != cu_seqlens_k.shape):
        given = "None" if cu_seqlens is None else f"of shape {tuple(cu_seqlens.shape)}"
        raise ValueError(
            f"cu_seqlens_k has shape {tuple(cu_seqlens_k.shape)}; it goes with cu_seqlens of as many "
            f"sequences, which is {given}"
        )
    if cu_seqlens is not None and cu_seqlens_k is None and q.shape[0] != k.shape[0]:
        raise ValueError(
            f"cu_seqlens goes with q and k of the same length; they have {q.shape[0]} and {k.shape[0]}, and "
            "cu_seqlens_k is None"
        )
    if prompt_lens is not None:
        check_dense("prompt_lens", prompt_lens)
        count = q.shape[0] if q.ndim == 4 else 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if prompt_lens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"prompt_lens has dtype {prompt_lens.dtype}; allowed are torch.int32 and torch.int64")
        if tuple(prompt_lens.shape) != (count,):
            raise ValueError(
                f"prompt_lens has shape {tuple(prompt_lens.shape)}; it must be ({count},), one per sequence"
            )
        if prompt_lens.device != q.device:
            raise ValueError(f"prompt_lens is on {prompt_lens.device}; it must be on q's device, {q.device}")


def check_values(sequences: Sequences) -> None:
    """cu_seqlens (and cu_seqlens_k) runs from 0 to T without falling; each prompt is at most as long as its sequence,
    which has at least as many keys as queries.

    Values on a GPU are not read, since that would wait for it, unless RHYTHM_CHECK_VALUES=1 asks for the checks; the
    kernels cut what lies beyond the tensors.
    """
    given = [x for x in (sequences.cu_seqlens, sequences.prompt_lens, sequences.cu_rows) if x is not None]
    if not given or (given[0].device.type != "cpu" and os.environ.get("RHYTHM_CHECK_VALUES") != "1"):
        return
    host = sequences.host
    name = "cu_seqlens" if sequences.cu_rows is None else "cu_seqlens_k"
    _check_bounds(name, host.cu_seqlens, sequences.tokens)
    if sequences.cu_rows is not None:
        _check_bounds("cu_seqlens", host.cu_rows, sequences.rows or 0)
    for i, missing in enumerate(host.missing):
        if missing < 0:
            rows = host.cu_rows[i + 1] - host.cu_rows[i]
            raise ValueError(
                f"cu_seqlens gives sequence {i} {rows} rows of q and cu_seqlens_k {rows + missing} keys; it may have "
                "fewer rows than keys, not more"
            )
    if sequences.prompt_lens is not None:
        for i, (prompt, (start, end)) in enumerate(
            zip(sequences.prompt_lens.tolist(), pairwise(host.cu_seqlens), strict=True)
        ):
            if not 0 <= prompt <= end - start:
                raise ValueError(f"prompt_lens[{i}] is {prompt}; its sequence allows 0 to {end - start}")


def _check_bounds(name: str, bounds: list[int], tokens: int) -> None:
    if bounds[0] != 0 or bounds[-1] != tokens:
        raise ValueError(f"{name} runs from {bounds[0]} to {bounds[-1]}; it must cover 0 to T = {tokens}")
    for i, (start, end) in enumerate(pairwise(bounds)):
        if end < start:
            raise ValueError(f"{name} falls from {start} to {end} at entry {i + 1}; it must not fall")
