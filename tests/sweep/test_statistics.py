"""Paired differences over seeds against values worked by hand and by scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import permutation_test, ttest_1samp

from rhythm.sweep.statistics import area_under_curve, bootstrap, detectable, differences, holm, sign_flip


def test_differences_are_paired_by_seed() -> None:
    values = {
        "grpo": {1: 0.30, 2: 0.40, 3: 0.50, 9: 0.9},
        "coupled": {1: 0.32, 2: 0.44, 3: 0.56},
        "random": {2: 0.40, 3: 0.50, 1: 0.30},
    }
    coupled, random = differences(values, "grpo")
    assert coupled.method == "coupled"
    assert coupled.seeds == (1, 2, 3)
    assert coupled.mean == pytest.approx(0.04)
    # s = 0.02, t(0.975, 2) = 4.302653: ± 0.0496828
    assert coupled.t == pytest.approx((0.04 - 0.0496828, 0.04 + 0.0496828), abs=1e-6)
    # All three have one sign: 2 of 8 patterns are as far out.
    assert (coupled.p, coupled.least_p) == (0.25, 0.25)
    assert random.mean == pytest.approx(0.0, abs=1e-12)
    assert random.p == 1.0
    assert (coupled.holm, random.holm) == (0.5, 1.0)


def test_a_baseline_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="baseline is 'ppo': must be one of grpo"):
        differences({"grpo": {1: 0.0}}, "ppo")


def test_sign_flips_as_scipy_counts_them() -> None:
    paired = [0.03, -0.01, 0.05, 0.02, 0.04]
    # Sums as far from 0 as 0.13: all signs as seen, or −0.01 turned (0.15), and their mirror images: 4 of 32.
    assert sign_flip(paired) == 4 / 32
    expected = permutation_test((paired,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert sign_flip(paired) == pytest.approx(expected)
    many = list(np.random.default_rng(1).normal(0.3, 1.0, 40))
    assert sign_flip(many) == pytest.approx(ttest_1samp(many, 0).pvalue, abs=0.02)
    assert math.isnan(sign_flip([0.1]))


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.03, 0.04: times 3, 2, 1 is 0.03, 0.06, 0.04, which may not fall: 0.06.
    assert holm([0.04, 0.01, math.nan, 0.03])[:2] == pytest.approx([0.06, 0.03])
    assert math.isnan(holm([0.04, 0.01, math.nan, 0.03])[2])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_detectable_difference_has_that_power() -> None:
    paired = [-0.01, 0.01, 0.03]  # s = 0.02
    effect = detectable(paired)
    drawn = np.random.default_rng(0).normal(effect, 0.02, (20_000, 3))
    found = ttest_1samp(drawn, 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.01)
    assert detectable([0.02, 0.02]) == 0.0
    assert math.isnan(detectable([0.02]))


def test_the_bootstrap_resamples_seeds() -> None:
    low, high = bootstrap([0.0, 1.0])
    assert (low, high) == (0.0, 1.0)  # means 0, ½, 1 with ¼, ½, ¼
    assert bootstrap([0.2, 0.2, 0.2]) == pytest.approx((0.2, 0.2))
    # Sums of 0 … 9 drawn ten times, almost normal: 4.5 ± 1.96 √(8.25 / 10), and steps of 0.1.
    assert bootstrap([float(value) for value in range(10)]) == pytest.approx((2.72, 6.28), abs=0.11)


def test_area_under_the_curve_by_trapezoids() -> None:
    assert area_under_curve([0, 10, 40], [0.0, 0.2, 0.4]) == pytest.approx((10 * 0.1 + 30 * 0.3) / 40)
    assert area_under_curve([10, 40], [0.2, 0.4]) == pytest.approx(0.3)
    assert math.isnan(area_under_curve([0], [0.1]))
