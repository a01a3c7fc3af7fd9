"""Wilson's interval and Newcombe's, against values from the literature and from scipy."""

from __future__ import annotations

import math

import pytest

from rhythm.reports.intervals import difference, wilson


@pytest.mark.parametrize(("correct", "count"), [(0, 10), (1, 10), (15, 148), (50, 100), (81, 263), (10, 10)])
def test_wilson_is_scipys(correct: int, count: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(correct, count).proportion_ci(method="wilson")
    assert wilson(correct / count, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_of_81_in_263() -> None:
    """Newcombe (1998), Two-sided confidence intervals for the single proportion, table I: 0.2553 to 0.3662."""
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_difference_of_56_in_70_and_48_in_80() -> None:
    """Newcombe (1998), Interval estimation for the difference, table II, method 10: 0.0524 to 0.3339."""
    assert difference(48 / 80, 56 / 70, 80, 70) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert difference(56 / 70, 48 / 80, 70, 80) == pytest.approx((-0.3339, -0.0524), abs=5e-5)


@pytest.mark.parametrize(("share", "count"), [(math.nan, 10), (0.5, 0), (0.5, math.nan)])
def test_undefined_shares_have_undefined_intervals(share: float, count: float) -> None:
    assert all(map(math.isnan, wilson(share, count)))
    assert all(map(math.isnan, difference(share, 0.5, count, 10)))
