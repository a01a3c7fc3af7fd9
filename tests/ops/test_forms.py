"""Sliding windows, capped scores, sinks, and fewer queries than keys: every op against the definitions, in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from forms import (
    BACKENDS,
    FORMS,
    HEADS,
    HORIZON,
    KEY_HEADS,
    KEYS,
    PROMPTS,
    ROWS,
    SINKS,
    SIZE,
    WINDOW,
    Packed,
    assert_form_accurate,
    converted,
    maps,
    packed,
    responses,
)
from tensors import assert_same, normal
from torch import Tensor

from rhythm import _C, attention_statistics, attention_with_statistics, column_scores
from rhythm.ops import attention


def expected_statistics(case: Packed, form: dict[str, Any]) -> dict[str, Tensor]:
    weights, lse = maps(case, form)
    nan = torch.full((HEADS, sum(KEYS)), math.nan, dtype=torch.float64)
    waad, fai, span = nan.clone(), nan.clone(), torch.full((4, HEADS), math.nan, dtype=torch.float64)
    start = 0
    for i, (a, response) in enumerate(zip(weights, responses(case, PROMPTS), strict=True)):
        n = a.shape[-1]
        distance = torch.arange(n)[:, None] - torch.arange(n)
        if len(response):
            span[i] = (a * distance)[:, response].sum(-1).mean(-1)
        lse[:, start : start + (response.start if len(response) else n)] = math.nan
        for t in response:
            waad[:, start + t] = (a[:, t] * distance[t].clamp(max=WINDOW)).sum(-1)
        for s in range(n):
            reached = [t for t in response if s + HORIZON[0] <= t <= s + HORIZON[1]]
            if reached:
                fai[:, start + s] = a[:, reached, s].mean(-1)
        start += n
    return {"span": span, "waad": waad, "fai": fai, "lse": lse}


def expected_output(case: Packed, form: dict[str, Any]) -> Tensor:
    parts, start = [], 0
    for a, rows in zip(maps(case, form)[0], case.rows, strict=True):
        n = a.shape[-1]
        values = case.v[start : start + n].repeat_interleave(HEADS // KEY_HEADS, dim=1).transpose(0, 1)
        parts.append((a @ values).transpose(0, 1)[n - rows :])
        start += n
    return torch.cat(parts)


def expected_columns(case: Packed, form: dict[str, Any], begin: int | None, end: int | None) -> Tensor:
    """Σ over the rows of that range, at distances within the horizon."""
    parts = []
    for a, rows in zip(maps(case, form)[0], case.rows, strict=True):
        n = a.shape[-1]
        chosen = [t for t in range(n)[slice(begin, end)] if t >= n - rows]
        total = torch.zeros(HEADS, n, dtype=torch.float64)
        for t in chosen:
            for s in range(n):
                total[:, s] += a[:, t, s] if HORIZON[0] <= t - s <= HORIZON[1] else 0.0
        parts.append(total)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=str)
@pytest.mark.parametrize("fewer", [False, True], ids=["as many rows", "fewer rows"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_op_is_the_definition(form: dict[str, Any], fewer: bool, backend: str, dtype: torch.dtype) -> None:
    case = packed(fewer)
    (q, k, v), options = converted(case, form, dtype)
    options["backend"] = backend
    here = {"prompt_lens": PROMPTS, "window": WINDOW, "horizon": HORIZON} | options
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5

    def check(name: str, actual: Tensor, wanted: Tensor) -> None:
        torch.testing.assert_close(
            actual.double(), wanted, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda text: f"{name}: {text}"
        )

    expected = expected_statistics(case, form)
    out, beside = attention_with_statistics(q, k, v, **here)
    check("out", out, expected_output(case, form))
    lse = expected["lse"].to(torch.promote_types(dtype, torch.float32))
    of_rows = lse[
        :,
        torch.cat(
            [
                torch.arange(end - r, end)
                for end, r in zip(torch.tensor(KEYS).cumsum(0).tolist(), case.rows, strict=True)
            ]
        ),
    ]
    results = {
        "alone": attention_statistics(q, k, **here),
        "beside": beside,
        "bands": attention_statistics(q, k, lse=lse, span=False, **here),
        "bands, lse of q's rows": attention_statistics(q, k, lse=of_rows, span=False, **here),
        "lse given": attention_statistics(q, k, lse=of_rows, **here),
        "all rows sampled": attention_statistics(q, k, lse=lse, span_rows=99, **here),
    }
    for way, statistics in results.items():
        for name, wanted in expected.items():
            if name == "span" and statistics.span is None:
                continue
            check(f"{way}: {name}", getattr(statistics, name), wanted)
    for rows in ((None, None), (2, -1), (-12, None)):
        scores = column_scores(q, k, rows=rows, horizon=HORIZON, **options)
        check(f"column sums of {rows}", scores, expected_columns(case, form, *rows))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_batches_are_their_sequences(form: dict[str, Any]) -> None:
    q, k, v = (normal(2, n, h, SIZE, seed=h + n).double() for n, h in ((9, 4), (20, 2), (20, 2)))
    out, batched = attention_with_statistics(q, k, v, prompt_lens=[3, 15], **form)
    assert batched.waad.shape == batched.lse.shape == (2, HEADS, 20)
    for i in range(2):
        one_out, one = attention_with_statistics(q[i], k[i], v[i], prompt_lens=[[3, 15][i]], **form)
        assert_same(out[i], one_out)
        for name in ("waad", "fai", "lse"):
            assert_same(getattr(batched, name)[i], getattr(one, name))
    bands = attention_statistics(q, k, prompt_lens=[3, 15], lse=batched.lse[:, :, 11:], span=False, **form)
    torch.testing.assert_close(bands.waad, batched.waad, equal_nan=True)
    torch.testing.assert_close(bands.fai, batched.fai, equal_nan=True)


def test_compiled_without_a_graph_break() -> None:
    q, k = normal(9, 4, SIZE).double(), normal(20, 2, SIZE).double()
    cu_seqlens, cu_seqlens_k = torch.tensor([0, 4, 9]).int(), torch.tensor([0, 8, 20]).int()
    options = {"cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k, "sliding_window": 4, "softcap": 2.0}

    def call(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        out, beside = attention_with_statistics(q, k, k, sinks=SINKS, **options)
        alone = attention_statistics(q, k, **options)
        return out, beside.lse.nan_to_num(), alone.waad.nan_to_num(), column_scores(q, k, **options)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k)
    for actual, wanted in zip(compiled, call(q, k), strict=True):
        assert_same(actual, wanted)


OPS: dict[str, Callable[..., Any]] = {
    "attention_statistics": attention_statistics,
    "attention_with_statistics": lambda q, k, **rest: attention_with_statistics(q, k, k, **rest),
    "column_scores": column_scores,
}
INT = torch.int32


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"softcap": 0.0}, "softcap is 0.0; it must be a finite number above 0, or None"),
        ({"softcap": -50}, "softcap is -50.0; it must be a finite number above 0"),
        ({"softcap": math.nan}, "softcap is nan; it must be a finite number above 0"),
        ({"softcap": math.inf}, "softcap is inf; it must be a finite number above 0"),
        ({"softcap": "50"}, "softcap is '50'; it must be a finite number above 0"),
        ({"softcap": True}, "softcap is True; it must be a finite number above 0"),
        ({"sliding_window": 0}, "sliding_window is 0; it must be an integer of at least 1"),
        ({"sliding_window": 2.5}, "sliding_window is 2.5; it must be an integer"),
        ({"sliding_window": True}, "sliding_window is True; it must be an integer"),
        ({"sinks": torch.zeros(3)}, r"sinks has shape \(3,\); it must be \(4,\), one per query head"),
        ({"sinks": torch.zeros(4, 1)}, r"sinks has shape \(4, 1\); it must be \(4,\)"),
        ({"sinks": torch.zeros(4, dtype=INT)}, "sinks has dtype torch.int32; allowed are torch.float32"),
        ({"sinks": torch.zeros(4, device="meta")}, "sinks is on meta; it must be on q's device, cpu"),
        ({"sinks": [0.0] * 4}, "sinks is of type list; it must be a torch.Tensor"),
        ({"q": torch.zeros(7, 4, 8)}, "q has 7 rows and k 6; q may have fewer than k, not more"),
        ({"cu_seqlens_k": torch.tensor([0, 6]).int()}, r"cu_seqlens_k has shape \(2,\); it goes with cu_seqlens"),
        (
            {"cu_seqlens": torch.tensor([0, 2, 4]).int(), "cu_seqlens_k": torch.tensor([0, 6]).int()},
            r"cu_seqlens_k has shape \(2,\); it goes with cu_seqlens of as many sequences, which is of shape \(3,\)",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 4]).int(), "cu_seqlens_k": torch.tensor([0, 6])},
            "cu_seqlens_k has dtype torch.int64; it must be torch.int32",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 4]).int(), "cu_seqlens_k": torch.tensor([0, 5]).int()},
            "cu_seqlens_k runs from 0 to 5; it must cover 0 to T = 6",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 3]).int(), "cu_seqlens_k": torch.tensor([0, 6]).int()},
            "cu_seqlens runs from 0 to 3; it must cover 0 to T = 4",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 3, 4]).int(), "cu_seqlens_k": torch.tensor([0, 2, 6]).int()},
            "cu_seqlens gives sequence 0 3 rows of q and cu_seqlens_k 2 keys; it may have fewer rows than keys",
        ),
        ({"cu_seqlens": torch.tensor([0, 4]).int()}, "q and k of the same length; they have 4 and 6, and cu_seqlens_k"),
    ],
)  # fmt: skip
def test_bad_input_is_named(op: Callable[..., Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        op(**({"q": torch.zeros(4, 4, 8), "k": torch.zeros(6, 2, 8)} | change))


@pytest.mark.parametrize("name", sorted(OPS.keys() - {"attention_with_statistics"}))  # which takes none
def test_an_lse_of_another_shape_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"lse has shape \(4, 5\); it must be \(4, 4\) or \(4, 6\)"):
        OPS[name](q=torch.zeros(4, 4, 8), k=torch.zeros(6, 2, 8), lse=torch.zeros(4, 5))


def test_undefined_stays_where_it_touches() -> None:
    """A NaN key within a sliding window, an infinite score under a softcap, a NaN sink, and rows without any weight."""
    q, k, v = (x.double() for x in (normal(30, 4, 8), normal(30, 2, 8, seed=1), normal(30, 2, 8, seed=2)))
    bad = k.clone()
    bad[10, 0] = math.nan
    out, statistics = attention_with_statistics(q, bad, v, sliding_window=6, horizon=(0, 20))
    undefined = torch.zeros(4, 30, dtype=torch.bool)
    undefined[:2, 10:16] = True
    assert statistics.lse.isnan().equal(undefined)
    assert statistics.waad.isnan().equal(undefined)
    assert out.isnan().all(-1).T.equal(undefined)
    seen = torch.zeros(4, 30, dtype=torch.bool)
    seen[:2, 5:16] = True  # keys that an undefined row sees
    assert statistics.fai.isnan().equal(seen)

    bad[10, 0] = math.inf
    capped = attention_statistics(q.abs(), bad, softcap=3.0)
    assert capped.lse.isfinite().all()

    nan_sink = attention_statistics(q, k, sinks=torch.tensor([0.0, math.nan, math.inf, -math.inf]))
    assert nan_sink.lse.isnan().all(-1).tolist() == [False, True, True, False]
    assert nan_sink.lse.isfinite().all(-1).tolist() == [True, False, False, True]

    nothing = torch.full_like(k, -math.inf)
    only_sink = attention_statistics(q.abs(), nothing, sinks=torch.full((4,), 1.5))
    assert (only_sink.lse == 1.5).all()
    assert (only_sink.waad == 0).all()


def test_other_libraries_take_what_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash_attn gets window_size, softcap and both cu_seqlens; torch's SDPA refuses the forms by name."""
    case = packed(True)
    q, k, v = (x.to(torch.bfloat16) for x in (case.q, case.k, case.v))
    form = {"sliding_window": 7, "softcap": 0.8}
    calls: list[dict[str, Any]] = []

    def varlen(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, most_q: int, most_k: int, softmax_scale: float,
        causal: bool, window_size: tuple[int, int], softcap: float, return_attn_probs: bool = False,
    ) -> tuple[Tensor, Tensor, None]:  # fmt: skip
        calls.append({"window_size": window_size, "softcap": softcap, "longest": (most_q, most_k)})
        given = {"cu_seqlens": cu_q, "cu_seqlens_k": cu_k, "scale": softmax_scale, "backend": "reference"}
        out, statistics = attention_with_statistics(
            q, k, v, **given, softcap=softcap, sliding_window=window_size[0] + 1
        )
        has_row = torch.cat([torch.arange(n) >= n - r for n, r in zip(KEYS, ROWS, strict=True)])
        return out, statistics.lse[:, has_row], None

    monkeypatch.setattr(attention, "_flash_attn_module", lambda: "flash")
    monkeypatch.setattr(attention, "import_module", lambda name: type("M", (), {"flash_attn_varlen_func": varlen}))
    monkeypatch.setattr(attention, "_asking_for_lse", lambda function: {"return_attn_probs": True})
    refuses = attention.FlashAttn.refuses
    monkeypatch.setattr(attention.FlashAttn, "refuses", lambda self, request: None)
    options = case.arguments | form | {"prompt_lens": PROMPTS, "backend": "reference"}
    expected_out, expected = attention_with_statistics(q, k, v, **options)
    out, statistics = attention_with_statistics(q, k, v, attention="flash_attn", **options)
    assert calls == [{"window_size": (6, 0), "softcap": 0.8, "longest": (sum(ROWS), sum(KEYS))}]
    torch.testing.assert_close(out, expected_out)
    assert_same(statistics, expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(attention.FlashAttn, "refuses", refuses)
    with pytest.raises(ValueError, match="sdpa_flash' can't run: the call has softcap and sliding_window and fewer"):
        attention_with_statistics(q, k, v, attention="sdpa_flash", **options)


def test_lengths_of_rows_are_where_they_are_said_to_be() -> None:
    """Two sequences with other lengths of q: each is what it is alone."""
    case = packed(True)
    together = attention_statistics(case.q, case.k, horizon=HORIZON, **case.arguments)
    bounds = zip(pairwise([0, 23, 23, 24, 70]), pairwise([0, 10, 10, 11, 41]), strict=True)
    for (start, end), (row_start, row_end) in bounds:
        alone = attention_statistics(case.q[row_start:row_end], case.k[start:end], horizon=HORIZON)
        for name in ("waad", "fai", "lse"):
            assert_same(getattr(together, name)[:, start:end], getattr(alone, name), rtol=1e-12, atol=1e-12)


# (key lengths, query lengths, prompts, query heads, key heads, head size, W, horizon, form): many tiles, odd edges
SHAPES: list[Any] = [
    ([700], [700], [31], 4, 2, 64, 10, (10, 50), {"sliding_window": 100}),
    ([300, 7, 0, 601], [100, 7, 0, 500], [40, 6, 0, 200], 4, 1, 33, 40, (1, 20),
     {"sliding_window": 37, "softcap": 5.0, "sinks": SINKS.float()}),
    ([1100], [900], [0], 4, 4, 16, 300, (10, 700), {"sliding_window": 257, "sinks": SINKS.float()}),
    ([520], [520], [100], 2, 2, 128, 10, (10, None), {"softcap": 2.0}),
    ([300, 290], [1, 290], [0, 0], 4, 4, 40, 10, (0, None), {"sliding_window": 1, "sinks": SINKS.float()}),
    ([640], [630], [2], 8, 1, 80, 10, (0, 1000), {"sliding_window": 256}),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("index", range(len(SHAPES)))
@pytest.mark.parametrize("isa", _C.available_isas())
def test_accuracy(
    isa: str, index: int, dtype: torch.dtype, assert_accurate: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RHYTHM_CPU_ISA", isa)
    assert_form_accurate(SHAPES[index], dtype, "cpu", assert_accurate)
