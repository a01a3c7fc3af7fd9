"""The CPU kernels against the reference over random shapes and arguments, valid and invalid.

What is allowed gives what the reference gives on the same numbers in fp64; what is not raises a ValueError, the same in
both backends. How small the error has to be is test_statistics.py's business: tolerances here tell right from wrong.
"""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tensors import normal

from rhythm import attention_statistics, attention_with_statistics, column_scores

NAMES = ("span", "waad", "fai", "lse")
INT = torch.int32
CHECK = settings(
    max_examples=200,
    deadline=None,  # a busy machine is no failure
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of attention_statistics that are allowed, but for the backend."""
    size = draw(st.integers(1, 40) | st.sampled_from([64, 80, 256]))
    key_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    call: dict[str, Any] = {}
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, 90), max_size=4))
        shape: tuple[int, ...] = (sum(lengths),)
        call["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).to(INT)
    else:
        lengths = [draw(st.integers(0, 90))] * draw(st.integers(0, 3))
        shape = (len(lengths), lengths[0] if lengths else 5)
    prompts = [draw(st.integers(0, n)) for n in lengths]
    call["prompt_lens"] = draw(st.sampled_from([None, prompts, torch.tensor(prompts, dtype=INT)]))
    seed = draw(st.integers(0, 99))
    for name, heads, at in (("q", key_heads * group, seed), ("k", key_heads, seed + 100)):
        wide = normal(*shape, heads, size + draw(st.integers(0, 3)), seed=at, dtype=dtype)
        call[name] = wide[..., :size]  # of any stride between heads
    call["scale"] = draw(st.none() | st.floats(-4.0, 4.0).map(lambda sharp: sharp * size**-0.5))
    call["window"] = draw(st.integers(1, 3) | st.integers(1, 120))
    lo = draw(st.integers(0, 3) | st.integers(0, 100))
    call["horizon"] = (lo, draw(st.none() | st.integers(lo, 130)))
    return call


def doubled(call: dict[str, Any]) -> dict[str, Any]:
    """The call in fp64, for the reference."""
    return call | {
        name: call[name].double() for name in ("q", "k", "v", "lse") if isinstance(call.get(name), torch.Tensor)
    }


def assert_near(name: str, actual: torch.Tensor, expected: torch.Tensor, unit: float = 1.0) -> None:
    torch.testing.assert_close(
        actual.double(),
        expected,
        rtol=1e-4,
        atol=1e-4 * unit,
        equal_nan=True,
        msg=lambda text: f"{name}: {text}",
    )


@given(call=calls(), given_lse=st.booleans())
@CHECK
def test_statistics_are_the_references(call: dict[str, Any], given_lse: bool) -> None:
    expected = attention_statistics(**doubled(call), backend="reference")
    actual = attention_statistics(**call, backend="cpu")
    for name in NAMES:
        assert_near(name, getattr(actual, name), getattr(expected, name))
    if given_lse:
        bands = attention_statistics(**call, lse=actual.lse, span=False, backend="cpu")
        assert bands.span is None
        for name in ("waad", "fai"):
            assert_near(name, getattr(bands, name), getattr(expected, name))


@given(call=calls())
@CHECK
def test_the_output_is_the_references(call: dict[str, Any]) -> None:
    call["v"] = call["k"].flip(-1)
    expected_out, expected = attention_with_statistics(**doubled(call), backend="reference")
    out, actual = attention_with_statistics(**call, backend="cpu")
    assert out.dtype == call["q"].dtype
    unit = {torch.float32: 1.0, torch.float16: 20.0, torch.bfloat16: 150.0}[out.dtype]
    assert_near("out", out, expected_out, unit)
    for name in NAMES:
        assert_near(name, getattr(actual, name), getattr(expected, name))


@given(
    call=calls(),
    reduce=st.sampled_from(["sum", "mean"]),
    per=st.sampled_from(["head", "group"]),
    rows=st.none() | st.tuples(st.none() | st.integers(-100, 100), st.none() | st.integers(-100, 100)),
)
@CHECK
def test_column_scores_are_the_references(call: dict[str, Any], reduce: Any, per: Any, rows: Any) -> None:
    for name in ("window", "prompt_lens"):
        del call[name]
    options = {"reduce": reduce, "per": per, "rows": rows}
    expected = column_scores(**doubled(call), **options, backend="reference")
    assert_near("scores", column_scores(**call, **options, backend="cpu"), expected)


NUMBERS = st.sampled_from(
    [-(2**63), -1, 0, 1, 2, 7, 2**31, 2**62, 2**63, 1.5, math.nan, math.inf, True, None, "1", b"1"]
)
ANY_SHAPE = st.lists(st.integers(0, 7), max_size=5)
ANY_DTYPE = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, INT, torch.int64, torch.bool])
ANY_TENSOR = st.builds(lambda shape, dtype: torch.zeros(shape, dtype=dtype), ANY_SHAPE, ANY_DTYPE)
OFFSETS = st.lists(st.integers(-2, 8), max_size=4).map(lambda bounds: torch.tensor([0, *bounds, 6], dtype=INT))
ODD = {
    "q": ANY_TENSOR,
    "k": ANY_TENSOR,
    "cu_seqlens": OFFSETS | ANY_TENSOR | NUMBERS,
    "prompt_lens": st.lists(st.integers(-1, 7) | NUMBERS, max_size=3) | ANY_TENSOR | NUMBERS,
    "scale": NUMBERS,
    "window": NUMBERS,
    "horizon": st.lists(NUMBERS, max_size=3).map(tuple) | st.tuples(st.integers(-1, 9), st.integers(-1, 9)) | NUMBERS,
    "lse": ANY_TENSOR | NUMBERS,
    "span": st.booleans(),
    "span_rows": NUMBERS,
}


def outcome(call: dict[str, Any], backend: str) -> Any:
    """The statistics, or the message of the ValueError; anything else that is raised fails the test."""
    try:
        return attention_statistics(**call, backend=backend)
    except ValueError as error:
        return str(error)


@given(
    change=st.lists(st.sampled_from(sorted(ODD)), min_size=1, max_size=3, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: ODD[name] for name in names})
    )
)
@CHECK
def test_whatever_is_passed_is_taken_or_refused_by_name(change: dict[str, Any]) -> None:
    call = {"q": normal(6, 4, 8, seed=1), "k": normal(6, 2, 8, seed=2)} | change
    actual, expected = outcome(call, "cpu"), outcome(call, "reference")
    assume(not (isinstance(actual, str) and "backend 'cpu' can't run: q has dtype" in actual))  # fp64
    if isinstance(expected, str):
        assert actual == expected
        return
    assert not isinstance(actual, str), actual
    if change.get("lse") is not None:  # backends agree on that of the scores, which rows of sum 1 have
        return
    for name in NAMES:
        torch.testing.assert_close(
            getattr(actual, name), getattr(expected, name), rtol=1e-2, atol=1e-2, equal_nan=True, msg=name
        )


NO_INTEGER = st.floats() | st.booleans() | st.text(max_size=3) | st.binary(max_size=3)
TOO_LOW_OR_HIGH = st.integers(max_value=-1) | st.integers(min_value=2**63)
NEVER = {
    "scale": st.sampled_from([math.nan, math.inf, -math.inf])
    | st.booleans()
    | st.text(max_size=3)
    | st.binary(max_size=3),
    "window": st.none() | NO_INTEGER | TOO_LOW_OR_HIGH | st.just(0),
    "horizon": st.none()
    | st.integers()
    | st.tuples(NO_INTEGER | TOO_LOW_OR_HIGH, st.integers(0, 9))
    | st.tuples(st.integers(0, 9), NO_INTEGER | TOO_LOW_OR_HIGH)
    | st.tuples(st.integers(0, 9), st.integers(1, 9)).map(lambda pair: (sum(pair), pair[0])),
    "prompt_lens": st.tuples(NO_INTEGER | TOO_LOW_OR_HIGH | st.integers(7)) | st.lists(st.integers(0, 6), min_size=2),
    "cu_seqlens": st.lists(st.integers(-9, 9))
    | st.just(torch.tensor([0, 6]))
    | st.integers(0, 5).map(lambda end: torch.tensor([0, end], dtype=INT)),
    "lse": ANY_TENSOR.filter(lambda x: x.shape != (4, 6)) | st.floats() | st.lists(st.floats()),
}


@pytest.mark.parametrize("name", NEVER)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@given(data=st.data())
@CHECK
def test_what_is_never_allowed_is_refused(backend: str, name: str, data: st.DataObject) -> None:
    call = {"q": normal(6, 4, 8, seed=1), "k": normal(6, 2, 8, seed=2), name: data.draw(NEVER[name])}
    message = outcome(call, backend)
    assert isinstance(message, str)
    assert message.startswith(name)
