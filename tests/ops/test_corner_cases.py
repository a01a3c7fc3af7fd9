"""The table of unusual inputs, with the C++ kernels; tests/kernels runs it with Triton's."""

from __future__ import annotations

import math

import pytest
import torch
from corner_cases import CASES, FORM_CASES, Case, assert_agrees, by_name, qkv
from torch import Tensor

from rhythm import _C, attention_statistics, attention_with_statistics, column_scores
from rhythm.ops import reference


def test_every_case_has_a_name_of_its_own() -> None:
    assert len({case.name for case in (*CASES, *FORM_CASES)}) == len(CASES) + len(FORM_CASES)


@pytest.mark.parametrize("case", [*CASES, *FORM_CASES], ids=by_name)
def test_the_kernels_agree_with_the_reference(case: Case) -> None:
    assert_agrees(case, "cpu")


ODDEST = (
    "all forms",
    "softcap 1",
    "sinks that",
    "sinks and",
    "scale 0",
    "scale 10^30",
    "scores of 10^18",
    "window 1000000000",
    "nan in v",
    "lse inf",
    "lse -inf",
)


@pytest.mark.parametrize("isa", _C.available_isas()[1:])
@pytest.mark.parametrize("case", [case for case in (*CASES, *FORM_CASES) if case.name.startswith(ODDEST)], ids=by_name)
def test_every_instruction_set_agrees(case: Case, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHYTHM_CPU_ISA", isa)
    assert_agrees(case, "cpu")


def test_windows_beyond_the_sequence_are_one() -> None:
    """Bit for bit the window of the sequence, in the sweep, beside an output and in the bands; and close to fp64."""
    q, k, v = qkv(200, 2, 1, 64)
    lse = attention_statistics(q, k).lse
    exact = attention_statistics(q.double(), k.double(), window=10**9).waad

    def waad(window: int) -> list[Tensor]:
        alone = attention_statistics(q, k, window=window, backend="cpu")
        _, beside = attention_with_statistics(q, k, v, window=window, backend="cpu")
        bands = attention_statistics(q, k, window=window, lse=lse, span=False, backend="cpu")
        return [alone.waad, beside.waad, bands.waad]

    for window in (201, 10**6, 10**9, 2**31 - 1, 2**31, 2**63 - 1):
        for actual, expected in zip(waad(window), waad(200), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
            torch.testing.assert_close(actual.double(), exact, rtol=5e-6, atol=1e-5)


def test_a_wide_window_loses_no_digits_in_a_long_sequence() -> None:
    q, k, _ = qkv(3000, 1, 1, 16)
    for window in (2500, 10**9):
        exact = attention_statistics(q.double(), k.double(), window=window, backend="reference")
        bands = attention_statistics(q, k, window=window, lse=exact.lse.float(), span=False).waad
        for waad in (attention_statistics(q, k, window=window).waad, bands):
            atol = 4e-6 * 2500 if window == 2500 else 1e-4
            torch.testing.assert_close(waad.double(), exact.waad, rtol=5e-6, atol=atol)


def test_huge_scores_keep_the_attention_of_later_rows() -> None:
    """FAI where an fp32 lse has no digits left for it: scores of 10^9, two keys of one score in each row."""
    q, k = torch.full((20, 1, 4), 1e5), torch.full((20, 1, 4), 1e4)
    k[2:] = -1e4
    fai = attention_statistics(q, k, scale=1.0, horizon=(0, None), backend="cpu").fai[0]
    expected = torch.tensor([(1 + 19 / 2) / 20, 1 / 2] + [0.0] * 18)
    torch.testing.assert_close(fai, expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_before_a_key_do_not_see_its_value(backend: str, value: float) -> None:
    q, k, v = qkv(60)
    v[33, 1, 5] = value
    expected, _ = attention_with_statistics(q, k, v.nan_to_num(0, 0, 0), backend=backend)
    out, _ = attention_with_statistics(q, k, v, backend=backend)
    touched = torch.zeros_like(out, dtype=torch.bool)
    touched[33:, 2:, 5] = True
    assert torch.equal(~out.isfinite(), touched)
    assert torch.equal(out[touched].isnan(), torch.full((touched.sum(),), math.isnan(value)))
    torch.testing.assert_close(out[~touched], expected[~touched])


def test_values_out_of_a_sliding_window_are_not_seen() -> None:
    q, k, v = (x.double() for x in qkv(20, 2, 2, 4))
    v[7] = math.nan
    options = {"bounds": [0, 20], "prompt_lens": [0], "scale": 0.5, "sliding_window": 5}
    out = reference.attention_statistics(q, k, v_TGD=v, **options)[4]
    clean = reference.attention_statistics(q, k, v_TGD=v.nan_to_num(), **options)[4]
    assert out[7:12].isnan().all()
    torch.testing.assert_close(out[[*range(7), *range(12, 20)]], clean[[*range(7), *range(12, 20)]])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_leaves_the_statistics_alone(backend: str) -> None:
    q, k, v = qkv()
    lse = attention_statistics(q, k, backend=backend).lse

    def everything() -> list[Tensor]:
        out, beside = attention_with_statistics(q, k, v, backend=backend)
        sampled = attention_statistics(q, k, lse=lse, span_rows=7, backend=backend)
        return [out, beside.span, beside.waad, beside.lse, sampled.span, column_scores(q, k, backend=backend)]

    expected = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = everything()
        assert (q[:, 0] @ q[:, 0].T).dtype == torch.bfloat16  # it is in force again
    for x, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(("batch", "tokens"), [(0, 9), (3, 0), (0, 0), (None, 0)])
def test_empty_batches_compile(batch: int | None, tokens: int) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        out, beside = attention_with_statistics(q, k, v, attention="sdpa_flash")
        alone = attention_statistics(q, k)
        return [out, beside.waad, alone.span, alone.fai, column_scores(q, k, per="group")]

    torch._dynamo.reset()
    q, k, v = qkv(tokens, batch=batch)
    expected = call(q, k, v)
    before = () if batch is None else (batch,)
    assert [tuple(x.shape) for x in expected] == [
        tuple(q.shape), (*before, 4, tokens), (1 if batch is None else batch, 4), (*before, 4, tokens),
        (*before, 2, tokens),
    ]  # fmt: skip
    actual = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v)
    for x, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, wanted, rtol=0, atol=0, equal_nan=True)
