"""Packed sequences, forms of attention and their maps by the definition, element by element, in fp64.

    from forms import FORMS, Packed, converted, maps, packed, responses

tests/conftest.py makes the module importable. T tokens, N tokens of one sequence, H query heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensors import normal
from torch import Tensor

from rhythm import attention_statistics, attention_with_statistics

HEADS, KEY_HEADS, SIZE, WINDOW = 4, 2, 8, 5
KEYS, ROWS, PROMPTS = [23, 0, 1, 46], [10, 0, 1, 30], [3, 0, 0, 20]
HORIZON = (2, 12)
SINKS = torch.tensor([-1.0, 0.5, 3.0, -math.inf], dtype=torch.float64)
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window 1": {"sliding_window": 1},
    "window 3": {"sliding_window": 3},
    "window 9": {"sliding_window": 9},
    "window beyond": {"sliding_window": 2**62},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": SINKS},
    "all": {"sliding_window": 7, "softcap": 0.8, "sinks": SINKS},
}


@dataclass(frozen=True)
class Packed:
    """q, k, v of four sequences in fp64, their lengths, and the call's arguments that say so."""

    q: Tensor
    k: Tensor
    v: Tensor
    rows: list[int]
    arguments: dict[str, Any]


def packed(fewer: bool) -> Packed:
    rows = ROWS if fewer else KEYS
    q, k, v = (
        normal(sum(n), h, SIZE, seed=h + i).double()
        for i, (n, h) in enumerate(zip((rows, KEYS, KEYS), (HEADS, KEY_HEADS, KEY_HEADS), strict=True))
    )
    cu_rows, cu_keys = (torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in (rows, KEYS))
    return Packed(1.5 * q, k, v, rows, {"cu_seqlens": cu_rows} | ({"cu_seqlens_k": cu_keys} if fewer else {}))


def maps(case: Packed, form: dict[str, Any]) -> tuple[list[Tensor], Tensor]:
    """(A [H, N, N] of each sequence, rows that are not there 0; lse [H, T]) by the definition, element by element."""
    weights, lse = [], torch.full((HEADS, sum(KEYS)), math.nan, dtype=torch.float64)
    cap, window = form.get("softcap"), form.get("sliding_window", 2**62)
    sinks = form.get("sinks", torch.full((HEADS,), -math.inf, dtype=torch.float64))
    row_end = key_start = 0
    for keys, rows in zip(KEYS, case.rows, strict=True):
        row_end += rows
        a = torch.zeros(HEADS, keys, keys, dtype=torch.float64)
        for h in range(HEADS):
            for t in range(keys - rows, keys):
                query = case.q[row_end - keys + t, h]
                seen = [s for s in range(t + 1) if t - s < window]
                scores = [float(query @ case.k[key_start + s, h // 2]) * SIZE**-0.5 for s in seen]
                if cap is not None:
                    scores = [cap * math.tanh(x / cap) for x in scores]
                norm = math.log(sum(map(math.exp, scores)) + math.exp(float(sinks[h])))
                lse[h, key_start + t] = norm
                for s, score in zip(seen, scores, strict=True):
                    a[h, t, s] = math.exp(score - norm)
        weights.append(a)
        key_start += keys
    return weights, lse


def responses(case: Packed, prompts: list[int]) -> list[range]:
    """The response rows of each sequence."""
    return [range(max(p, n - r), n) for n, r, p in zip(KEYS, case.rows, prompts, strict=True)]


def converted(case: Packed, form: dict[str, Any], dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    form = form | {"sinks": form["sinks"].to(torch.promote_types(dtype, torch.float32))} if "sinks" in form else form
    return [x.to(dtype) for x in (case.q, case.k, case.v)], case.arguments | form


BACKENDS = [("reference", torch.float64), ("cpu", torch.float32)]


def assert_form_accurate(
    shape: Sequence[Any], dtype: torch.dtype, backend: str, assert_accurate: Callable[..., None], *, device: str = "cpu"
) -> None:
    """All results of a backend against the reference in fp64, as accurate as the reference in `dtype`.

    shape: (key lengths, query lengths, prompts, query heads, key heads, head size, W, horizon, form).
    """
    keys, rows, prompts, heads, key_heads, size, window, horizon, form = shape
    q, k, v = (
        normal(sum(n), h, size, seed=seed, dtype=dtype).to(device)
        for seed, (n, h) in enumerate(((rows, heads), (keys, key_heads), (keys, key_heads)))
    )
    cu_rows, cu_keys = (torch.tensor([0, *n]).cumsum(0).to(device, torch.int32) for n in (rows, keys))
    options = {
        "cu_seqlens": cu_rows,
        "cu_seqlens_k": cu_keys,
        "prompt_lens": prompts,
        "window": window,
        "horizon": horizon,
    } | form
    exact_out, exact = attention_with_statistics(q.double(), k.double(), v.double(), backend="reference", **options)
    plain_out, plain = attention_with_statistics(q, k, v, backend="reference", **options)
    out, beside = attention_with_statistics(q, k, v, backend=backend, **options)
    alone = attention_statistics(q, k, backend=backend, **options)
    bands = attention_statistics(q, k, lse=exact.lse.float(), span=False, backend=backend, **options)
    assert_accurate("out", dtype, out, exact_out, plain_out)
    for name in ("span", "waad", "fai", "lse"):
        for result in (alone, beside) if name == "span" else (alone, beside, bands):
            wanted, unfused = getattr(exact, name), getattr(plain, name)
            assert_accurate(name, dtype, getattr(result, name), wanted, unfused, window if name == "waad" else 1e-3)
