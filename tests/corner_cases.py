"""Unusual inputs of the public ops by name, and their results; every backend must agree with the reference.

    from corner_cases import CASES, assert_agrees, by_name

    @pytest.mark.parametrize("case", CASES, ids=by_name)
    def test_corner_case(case: Case) -> None:
        assert_agrees(case, "cpu")

tests/conftest.py makes the module importable. Every case is small enough for Triton's interpreter.

Shapes: q [T, Hq, D], k and v [T, Hkv, D] packed, or with B in front.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rhythm import attention_statistics, attention_with_statistics, column_scores
from rhythm.ops.answers import ALSO
from rhythm.ops.statistics import AttentionStatistics

QKV = tuple[Tensor, Tensor, Tensor]
FIELDS = ("span", "waad", "fai", "lse", *ALSO)
FORM = ("cu_seqlens", "cu_seqlens_k", "softcap", "sliding_window", "sinks")


@dataclass(frozen=True)
class Case:
    """One odd call.

    Attributes:
        build: gives q, k, v on the CPU.
        options: of `attention_statistics` and `attention_with_statistics`; tensors as lists.
        bands: also with the reference's lse given. Off where scores are so large that a difference in their last
            place decides everything.
        lse: what becomes of the reference's lse [Hq, T] before it is given; then the case is of a given lse alone.
        rtol: of all results but the output of 16-bit types.
    """

    name: str
    build: Callable[[], QKV]
    options: dict[str, Any] = field(default_factory=dict)
    bands: bool = True
    lse: Callable[[Tensor], Tensor] | None = None
    rtol: float = 1e-4


def by_name(case: Case) -> str:
    return case.name


def qkv(
    tokens: int = 70,
    heads: int = 4,
    key_heads: int = 2,
    size: int = 16,
    dtype: torch.dtype = torch.float32,
    batch: int | None = None,
) -> QKV:
    generator = torch.Generator().manual_seed(1000 * tokens + 10 * heads + size)
    before = () if batch is None else (batch,)
    q, k, v = (torch.randn((*before, tokens, h, size), generator=generator) for h in (heads, key_heads, key_heads))
    return (1.5 * q).to(dtype), k.to(dtype), v.to(dtype)


def _with(change: Callable[[Tensor], Tensor], **shape: Any) -> Callable[[], QKV]:
    """Each operand changed alike."""
    return lambda: tuple(change(x) for x in qkv(**shape))  # type: ignore[return-value]


def _poisoned(which: int, at: tuple[int, ...], value: float, **shape: Any) -> Callable[[], QKV]:
    """One element of q (0), k (1) or v (2) replaced."""

    def build() -> QKV:
        operands = qkv(**shape)
        operands[which][at] = value
        return operands

    return build


def _over_nan(x: Tensor) -> Tensor:
    """The same values with gaps between tokens and between elements, heads outermost, in storage full of NaN."""
    tokens, heads, size = x.shape
    storage = torch.full((heads, 2 * tokens, 3 * size), math.nan, dtype=x.dtype)
    view = storage[:, 1::2, 2::3].transpose(0, 1)
    view.copy_(x)
    return view


def _offset(x: Tensor) -> Tensor:
    """The same values from the third element of a longer storage on, NaN before and after."""
    storage = torch.full((x.numel() + 7,), math.nan, dtype=x.dtype)
    storage[3 : 3 + x.numel()] = x.flatten()
    return storage[3 : 3 + x.numel()].view(x.shape)


def _permuted(x: Tensor) -> Tensor:
    """The same values with elements outermost in memory and tokens innermost."""
    return x.permute(2, 1, 0).contiguous().permute(2, 1, 0)


def _one_key() -> QKV:
    q, k, v = qkv()
    return q, k[:1].expand(70, 2, 16), v[:, :1].expand(70, 2, 16)


def _scaled(factor: float, **shape: Any) -> Callable[[], QKV]:
    def build() -> QKV:
        q, k, v = qkv(**shape)
        return (q.double() * factor).to(q.dtype), (k.double() * factor).to(k.dtype), v

    return build


def _tiny_q(dtype: torch.dtype) -> Callable[[], QKV]:
    def build() -> QKV:
        q, k, v = qkv(dtype=dtype)
        return (q.double() * 2.0 * torch.finfo(dtype).smallest_normal / 16).to(dtype), k, v

    return build


def _at(rows: tuple[int, ...], value: float, head: int = 1) -> Callable[[Tensor], Tensor]:
    def change(lse: Tensor) -> Tensor:
        lse = lse.clone()
        for row in rows:
            lse[head, row] = value
        return lse

    return change


PACKED = {"cu_seqlens": [0, 23, 23, 24, 70], "prompt_lens": [3, 0, 0, 11], "horizon": (2, 12)}
NEAR = {"horizon": (1, 20)}
NAN, INF = math.nan, math.inf
HALVES = (torch.float16, torch.bfloat16)

CASES = [
    # Strides.
    Case("transposed", _with(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)), PACKED),
    Case("permuted", _with(_permuted), PACKED),
    Case("gaps over NaN", _with(_over_nan), PACKED),
    Case("gaps over NaN, bf16", _with(_over_nan, dtype=torch.bfloat16), PACKED),
    Case("offset", _with(_offset), PACKED),
    Case("offset, fp16", _with(_offset, dtype=torch.float16, size=7), PACKED),
    Case("expanded", _one_key, NEAR),
    Case("batched, every second row", _with(lambda x: x.repeat(1, 2, 1, 1)[:, ::2], tokens=20, batch=3), NEAR),
    # Head sizes and heads.
    *(Case(f"head size {size}", lambda size=size: qkv(33, 2, 1, size), NEAR) for size in (1, 3, 17, 65, 129, 255, 256)),
    *(
        Case(f"head size {size}, {dtype}", lambda size=size, dtype=dtype: qkv(33, 2, 1, size, dtype), NEAR)
        for size in (1, 33, 255)
        for dtype in HALVES
    ),
    *(
        Case(f"{heads} heads over {keys}", lambda heads=heads, keys=keys: qkv(25, heads, keys, 8), NEAR)
        for heads, keys in ((1, 1), (3, 3), (9, 3), (24, 1), (22, 2), (24, 3))
    ),
    # Types.
    *(Case(f"{dtype}", lambda dtype=dtype: qkv(dtype=dtype), PACKED) for dtype in (torch.float32, *HALVES)),
    *(Case(f"subnormal q, {dtype}", _tiny_q(dtype), NEAR) for dtype in (torch.float32, *HALVES)),
    # Sequences and rows.
    Case("empty sequences", qkv, {"cu_seqlens": [0, 0, 30, 30, 30, 70, 70], "horizon": (0, 9)}),
    Case("all is prompt", qkv, {"prompt_lens": [70]}),
    Case("one response row", qkv, {"prompt_lens": [69], "horizon": (0, 5)}),
    Case("one token", lambda: qkv(1), {"horizon": (0, 3)}),
    Case("packed T = 0", lambda: qkv(0)),
    Case("packed T = 0, two sequences", lambda: qkv(0), {"cu_seqlens": [0, 0, 0]}),
    Case("no sequence", lambda: qkv(0), {"cu_seqlens": [0]}),
    Case("B = 0", lambda: qkv(9, batch=0)),
    Case("B = 0 and T = 0", lambda: qkv(0, batch=0)),
    Case("batched T = 0", lambda: qkv(0, batch=3), {"prompt_lens": [0, 0, 0]}),
    Case("B = 0, prompts", lambda: qkv(9, batch=0), {"prompt_lens": []}),
    # Windows and horizons.
    Case("window of the sequence", qkv, {"window": 70}),
    *(
        Case(f"window {window}", qkv, PACKED | {"window": window})
        for window in (47, 10**6, 10**9, 2**31 - 1, 2**31, 2**62, 2**63 - 1)
    ),
    Case("window 10^9, bf16", lambda: qkv(dtype=torch.bfloat16), {"window": 10**9}),
    Case("window 10^9, batched", lambda: qkv(30, batch=2), {"window": 10**9, "prompt_lens": [0, 8]}),
    Case("window 1", qkv, {"window": 1}),
    *(
        Case(f"horizon {horizon}", qkv, PACKED | {"horizon": horizon})
        for horizon in (
            (0, 0),
            (0, None),
            (69, None),
            (0, 2**31),
            (3, 2**62),
            (2**31, 2**31 + 5),
            (2**62, None),
            (2**62, 2**63 - 1),
        )
    ),
    # Scales and scores.
    Case("scale 0", qkv, PACKED | {"scale": 0.0}),
    Case("scale -0", qkv, NEAR | {"scale": -0.0}),
    Case("scale 0, bf16", lambda: qkv(dtype=torch.bfloat16), NEAR | {"scale": 0.0}),
    Case("scale 0 and an infinite k", _poisoned(1, (30, 1, 3), -INF), NEAR | {"scale": 0.0}),
    Case("scale 0 and an infinite q", _poisoned(0, (30, 1, 3), INF), NEAR | {"scale": 0.0}),
    Case("scale 10^-50", qkv, NEAR | {"scale": 1e-50}),
    Case("scale -10^-50", qkv, NEAR | {"scale": -1e-50}),
    Case("scale 10^-42", qkv, NEAR | {"scale": 1e-42}),
    Case("negative scale", qkv, NEAR | {"scale": -0.4}),
    Case("scale 10^30", qkv, NEAR | {"scale": 1e30}, bands=False),
    Case("scale -10^30", qkv, NEAR | {"scale": -1e30}, bands=False),
    Case("scale 3x10^38", _scaled(0.1), NEAR | {"scale": 3e38}, bands=False),
    Case("scores of 10^4", _scaled(100.0), NEAR, bands=False),
    Case("scores of 10^18", _scaled(1e9), NEAR, bands=False),
    Case("scores of 10^18, bf16", _scaled(1e9, dtype=torch.bfloat16), NEAR, bands=False),
    Case("scores that overflow", _scaled(1e18), NEAR | {"scale": 1e10}, bands=False),
    # One value that is no number.
    *(
        Case(f"{value} in {name}, {dtype}", _poisoned(which, at, value, dtype=dtype), PACKED | NEAR)
        for which, name, at in ((0, "q", (40, 2, 3)), (1, "k", (41, 0, 3)), (2, "v", (42, 1, 3)))
        for value in (NAN, INF, -INF)
        for dtype in (torch.float32, *HALVES)
    ),
    Case("NaN in the last v", _poisoned(2, (69, 0, 0), NAN), NEAR),
    Case("NaN in the first v of a sequence", _poisoned(2, (24, 0, 15), NAN), PACKED),
    Case("NaN in v, wide heads", _poisoned(2, (5, 0, 200), NAN, tokens=40, size=256), NEAR),
    # A given lse.
    *(
        Case(f"lse {value} at 30", qkv, NEAR | {"prompt_lens": [11]}, lse=_at((30,), value))
        for value in (NAN, INF, -INF)
    ),
    Case("lse inf in the prompt", qkv, NEAR | {"prompt_lens": [31]}, lse=_at((30,), INF)),
    Case("lse inf in two sequences", qkv, PACKED, lse=_at((22, 69), INF)),
    Case("lse -inf, bf16", lambda: qkv(dtype=torch.bfloat16), {"horizon": (0, None)}, lse=_at((0, 50), -INF)),
    Case("lse as it is, wide window", qkv, PACKED | {"window": 10**9}, lse=lambda lse: lse),
]

SINKS = [-1.0, 0.5, 3.0, -INF]
FEWER = {"cu_seqlens": [0, 10, 10, 11, 41], "cu_seqlens_k": [0, 23, 23, 24, 70]} | {
    name: PACKED[name] for name in ("prompt_lens", "horizon")
}


def _fewer(rows: int = 41, dtype: torch.dtype = torch.float32) -> QKV:
    """q has the first `rows` rows of `qkv` alone; FEWER says to which keys they belong."""
    q, k, v = qkv(dtype=dtype)
    return q[:rows], k, v


# Forms of attention other than plain and causal.
FORM_CASES = [
    *(
        Case(f"sliding window {window}", qkv, PACKED | {"sliding_window": window})
        for window in (1, 2, 5, 16, 33, 46, 69, 70, 2**31, 2**63 - 1)
    ),
    Case("sliding window of one token, open horizon", qkv, {"sliding_window": 1, "horizon": (0, None)}),
    Case("sliding window before the horizon", qkv, {"sliding_window": 3, "horizon": (5, 20)}),
    Case("sliding window below the window", qkv, {"sliding_window": 7, "window": 30, "prompt_lens": [20]}),
    Case("sliding window, bf16", lambda: qkv(dtype=torch.bfloat16), PACKED | {"sliding_window": 9}),
    Case("sliding window, nan in k", _poisoned(1, (30, 0, 3), NAN), NEAR | {"sliding_window": 9}),
    Case("sliding window, nan in v", _poisoned(2, (30, 0, 3), NAN), NEAR | {"sliding_window": 9}),
    Case("sliding window, inf in v", _poisoned(2, (30, 0, 3), INF), NEAR | {"sliding_window": 9}),
    *(Case(f"softcap {cap}", qkv, PACKED | {"softcap": cap}) for cap in (1e-50, 1e-6, 0.3, 2.0, 50.0, 1e12, 1e300)),
    Case("softcap, negative scale", qkv, NEAR | {"softcap": 1.0, "scale": -0.4}),
    Case("softcap, scale 0", qkv, NEAR | {"softcap": 1.0, "scale": 0.0}),
    Case("softcap, scores of 10^18", _scaled(1e9), NEAR | {"softcap": 5.0}),
    Case("softcap, scale 10^30", qkv, NEAR | {"softcap": 5.0, "scale": 1e30}),
    Case("softcap, nan in k", _poisoned(1, (30, 0, 3), NAN), NEAR | {"softcap": 1.0}),
    Case("softcap, inf in k", _poisoned(1, (30, 0, 3), INF), NEAR | {"softcap": 1.0}),
    Case("sinks", qkv, PACKED | {"sinks": SINKS}),
    Case("sinks that outweigh all", qkv, NEAR | {"sinks": [50.0, 120.0, 1e4, 1e30]}),
    Case("sinks of no weight", qkv, NEAR | {"sinks": [-50.0, -200.0, -1e4, -1e30]}),
    Case("sinks that are no numbers", qkv, NEAR | {"sinks": [NAN, INF, -INF, 0.0]}, bands=False),
    Case("sinks and keys of no weight", _poisoned(1, (slice(0, 20), slice(None), 0), -INF), NEAR | {"sinks": SINKS}),
    Case("sinks, inf in k", _poisoned(1, (30, 0, 3), INF), NEAR | {"sinks": SINKS}),
    Case("sinks, wide window", qkv, NEAR | {"sinks": SINKS, "window": 10**9}),
    Case("fewer rows", _fewer, FEWER),
    Case("fewer rows, bf16", lambda: _fewer(dtype=torch.bfloat16), FEWER),
    Case("fewer rows of one sequence", lambda: _fewer(9), NEAR | {"prompt_lens": [64]}),
    Case("one row", lambda: _fewer(1), {"horizon": (0, None)}),
    Case("no row", lambda: _fewer(0), {"horizon": (0, None)}),
    Case("fewer rows, no prompt", _fewer, {name: FEWER[name] for name in ("cu_seqlens", "cu_seqlens_k")}),
    Case("fewer rows, batched", lambda: (qkv(7, batch=2)[0], *qkv(20, batch=2)[1:]), {"prompt_lens": [0, 15]}),
    Case("fewer rows over NaN", lambda: tuple(_over_nan(x) for x in _fewer()), FEWER),  # type: ignore[arg-type]
    Case("all forms", _fewer, FEWER | {"sliding_window": 7, "softcap": 0.8, "sinks": SINKS}),
    Case(
        "all forms, fp16",
        lambda: _fewer(dtype=torch.float16),
        FEWER | {"sliding_window": 12, "softcap": 3.0, "sinks": SINKS},
    ),
]


def _moved(x: Tensor, device: str) -> Tensor:
    """On the device with the same strides."""
    if device == "cpu":
        return x
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return storage.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def _inputs(case: Case, device: str) -> tuple[QKV, dict[str, Any]]:
    q, k, v = (_moved(x, device) for x in case.build())
    options = dict(case.options)
    types = {"cu_seqlens": torch.int32, "cu_seqlens_k": torch.int32, "prompt_lens": torch.int64, "sinks": torch.float32}
    for name, dtype in types.items():
        if name in options:
            options[name] = torch.tensor(options[name], dtype=dtype, device=device)
    return (q, k, v), options


def _named(prefix: str, statistics: AttentionStatistics) -> dict[str, Tensor]:
    values = {f"{prefix} {name}": getattr(statistics, name) for name in FIELDS}
    return {name: value for name, value in values.items() if value is not None}


def outcome(case: Case, backend: str, device: str = "cpu") -> dict[str, Tensor]:
    """All that the public ops give for the case, by name, on the CPU."""
    (q, k, v), options = _inputs(case, device)
    scores: dict[str, Any] = {name: options[name] for name in ("scale", "horizon", *FORM) if name in options}
    results: dict[str, Tensor] = {}
    if case.lse is None:
        results |= _named("alone", attention_statistics(q, k, **options, also=ALSO, prompt_rows=True, backend=backend))
        results["out"], beside = attention_with_statistics(q, k, v, **options, backend=backend)
        results |= _named("beside", beside)
        results["column sum"] = column_scores(q, k, per="group", **scores, backend=backend)
        results["column mean"] = column_scores(q, k, reduce="mean", rows=(2, -1), **scores, backend=backend)
        weights = torch.arange(q.shape[-3], device=device).remainder(4) / 2 - 0.5  # some are 0, some below
        weights = weights if q.ndim == 3 else weights.expand(q.shape[:2])
        scores["row_weights"] = weights
        results["weighted column sum"] = column_scores(q, k, rows=(1, None), **scores, backend=backend)
        results["weighted column maximum"] = column_scores(q, k, reduce="max", **scores, backend=backend)
    if case.bands or case.lse is not None:
        lse = _reference_lse(case.name).to(device)
        results |= _named("bands", attention_statistics(q, k, **options, lse=lse, span=False, backend=backend))
        results |= _named("given", attention_statistics(q, k, **options, lse=lse, also=ALSO, backend=backend))
        results |= _named("sampled", attention_statistics(q, k, **options, lse=lse, span_rows=7, backend=backend))
        if case.lse is not None:
            results["column sum"] = column_scores(q, k, **scores, lse=lse, backend=backend)
    return {name: value.cpu() for name, value in results.items()}


def _named_case(name: str) -> Case:
    return next(case for case in (*CASES, *FORM_CASES) if case.name == name)


@cache
def _reference_lse(name: str) -> Tensor:
    case = _named_case(name)
    (q, k, _), options = _inputs(case, "cpu")
    lse = attention_statistics(q, k, **options, backend="reference").lse
    return lse if case.lse is None else case.lse(lse)


@cache
def _expected(name: str) -> dict[str, Tensor]:
    return outcome(_named_case(name), "reference")


def assert_agrees(case: Case, backend: str, device: str = "cpu") -> None:
    """Everything the backend gives is the reference's: NaN and infinities in the same places, numbers nearby."""
    actual, expected = outcome(case, backend, device), _expected(case.name)
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        assert actual[name].shape == wanted.shape, name
        assert actual[name].dtype == wanted.dtype, name
        half = name == "out" and wanted.dtype in HALVES
        rtol, atol = (2e-2, 2e-2) if half else (case.rtol, 2e-5)
        torch.testing.assert_close(
            actual[name], wanted, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )
