"""The reference against its definitions: triple loops, and hand-computed cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rhythm.ops.reference import attention_statistics, attention_weights, sequence_statistics


def by_the_definition(
    weights: Tensor, prompt_len: int, window: int, lo: int, hi: int | None
) -> tuple[list, list, list]:
    """The definitions of docs/numbers.md, one head, one index at a time."""
    n = len(weights)
    a = weights.tolist()
    rows = range(prompt_len, n)
    span = sum(a[t][s] * (t - s) for t in rows for s in range(t + 1)) / max(1, len(rows)) if len(rows) else math.nan
    waad = [math.nan] * n
    for t in rows:
        waad[t] = sum(a[t][s] * min(t - s, window) for s in range(t + 1))
    fai = [math.nan] * n
    for s in range(n):
        last = n - 1 if hi is None else min(n - 1, s + hi)
        reached = [t for t in rows if s + lo <= t <= last]
        if reached:
            fai[s] = sum(a[t][s] for t in reached) / len(reached)
    return span, waad, fai


@pytest.mark.parametrize(
    ("n", "prompt_len", "window", "horizon"),
    [
        (1, 0, 1, (0, 0)),
        (1, 1, 10, (0, None)),
        (7, 3, 2, (1, 3)),
        (23, 0, 5, (4, None)),
        (23, 22, 10, (10, 50)),
    ],
)
def test_equals_the_definition(n: int, prompt_len: int, window: int, horizon: tuple[int, int | None]) -> None:
    torch.manual_seed(n)
    q, k = torch.randn(n, 2, 8, dtype=torch.float64), torch.randn(n, 1, 8, dtype=torch.float64)
    weights, _ = attention_weights(q, k, 0.7)
    span, waad, fai = sequence_statistics(weights, prompt_len=prompt_len, window=window, horizon=horizon)
    for head in range(2):
        expected = by_the_definition(weights[head], prompt_len, window, *horizon)
        for actual, wanted in zip((span[head], waad[head], fai[head]), expected, strict=True):
            torch.testing.assert_close(actual, torch.tensor(wanted, dtype=torch.float64), equal_nan=True)


def test_uniform_attention_by_hand() -> None:
    """q = 0 attends to all of its past evenly: A[t, s] = 1/(t + 1). N = 4, P = 1, W = 2, horizon (1, 2)."""
    q, k = torch.zeros(4, 1, 16, dtype=torch.float64), torch.randn(4, 1, 16, dtype=torch.float64)
    span, waad, fai, lse, _ = attention_statistics(
        q, k, bounds=[0, 4], prompt_lens=[1], scale=0.25, window=2, horizon=(1, 2)
    )
    nan = math.nan
    # Row t looks back t/2 on average: rows 1, 2, 3 give ½, 1, 3⁄2, their mean is 1.
    torch.testing.assert_close(span, torch.tensor([[1.0]], dtype=torch.float64))
    # Row 1: (1 + 0)/2; row 2: (2 + 1 + 0)/3; row 3: (2 + 2 + 1 + 0)/4, the 3 cut to W = 2.
    torch.testing.assert_close(waad, torch.tensor([[nan, 0.5, 1.0, 1.25]], dtype=torch.float64), equal_nan=True)
    # s = 0: rows 1, 2 give ½, ⅓. s = 1: rows 2, 3 give ⅓, ¼. s = 2: row 3 gives ¼. s = 3: no row after it.
    torch.testing.assert_close(fai, torch.tensor([[5 / 12, 7 / 24, 1 / 4, nan]], dtype=torch.float64), equal_nan=True)
    expected_lse = torch.tensor([[nan, math.log(2), math.log(3), math.log(4)]], dtype=torch.float64)
    torch.testing.assert_close(lse, expected_lse, equal_nan=True)


def test_weights_are_causal_softmax() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(9, 4, 8, dtype=torch.float64), torch.randn(9, 2, 8, dtype=torch.float64)
    weights, lse = attention_weights(q, k, 8**-0.5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 9, dtype=torch.float64))
    assert (weights.triu(1) == 0).all()
    score = q[5, 3] @ k[:6, 1].T * 8**-0.5  # head 3 of 4 reads key head 1 of 2
    torch.testing.assert_close(weights[3, 5, :6], score.softmax(-1))
    torch.testing.assert_close(lse[3, 5], score.logsumexp(-1))


def test_sliding_window_and_softcap() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(6, 1, 8, dtype=torch.float64), torch.randn(6, 1, 8, dtype=torch.float64)
    weights, _ = attention_weights(q, k, 1.0, sliding_window=3, softcap=2.0)
    score = 2.0 * torch.tanh(q[5, 0] @ k[3:6, 0].T / 2.0)  # keys 3, 4, 5 are at distances 2, 1, 0
    torch.testing.assert_close(weights[0, 5, 3:], score.softmax(-1))
    assert (weights[0, 5, :3] == 0).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_undefined_rows_are_nan(poison: float) -> None:
    """A NaN or +inf among a row's scores makes that row NaN; a lone −inf is a weight of 0."""
    q, k = torch.ones(5, 1, 4, dtype=torch.float64), torch.ones(5, 1, 4, dtype=torch.float64)
    k[2, 0, 0] = poison
    weights, lse = attention_weights(q, k, 1.0)
    assert weights[0, :2].isfinite().all()
    if poison == -math.inf:
        assert (weights[0, 2:, 2] == 0).all()
        assert lse.isfinite().all()
    else:
        assert weights[0, 2:].tril(2).isnan()[:, :3].all()
        assert lse[0, 2:].isnan().all()
