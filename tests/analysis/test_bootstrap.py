"""Bootstrap intervals against known bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rhythm.analysis import bootstrap as module
from rhythm.analysis.bootstrap import bootstrap, ratio


def test_the_mean_of_coins() -> None:
    # 400 responses, half of them 1: the resampled mean is 0.5 ± 1.96 · 0.025.
    sums = np.stack([np.arange(400) % 2, np.ones(400)], axis=1)
    interval = bootstrap(sums, ratio(0, 1), 20_000, np.random.default_rng(0))
    assert (interval.low, interval.high) == (pytest.approx(0.451, abs=0.003), pytest.approx(0.549, abs=0.003))


def test_responses_count_by_their_peaks() -> None:
    # One response has nine of ten peaks: resamples are of 0, 1 or 2 of it.
    sums = np.array([[9.0, 9.0], [0.0, 1.0]])
    interval = bootstrap(sums, ratio(0, 1), 1000, np.random.default_rng(0))
    assert (interval.low, interval.high) == (0, 1)


def test_what_has_no_spread_is_undefined() -> None:
    rng = np.random.default_rng(0)
    for sums in (np.zeros((0, 2)), np.ones((1, 2)), np.zeros((5, 2))):
        interval = bootstrap(sums, ratio(0, 1), 10, rng)
        assert math.isnan(interval.low)
        assert math.isnan(interval.high)


def test_resamples_are_drawn_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = np.stack([np.arange(10.0), np.ones(10)], axis=1)
    whole = bootstrap(sums, ratio(0, 1), 100, np.random.default_rng(0))
    monkeypatch.setattr(module, "ELEMENTS", 70)
    sizes: list[int] = []

    def mean(drawn: np.ndarray) -> np.ndarray:
        sizes.append(len(drawn))
        return np.asarray(drawn[:, 0] / drawn[:, 1])

    assert bootstrap(sums, mean, 100, np.random.default_rng(0)) == whole
    assert sizes == [7] * 14 + [2]
