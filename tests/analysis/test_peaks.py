"""Peaks worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rhythm.analysis.config import PeaksConfig
from rhythm.analysis.peaks import eligible, find_peaks

ALL = PeaksConfig(prominence=0)
nan = float("nan")


def test_entries_above_both_neighbours() -> None:
    assert find_peaks([5, 1, 3, 2, 4, 4, 4, 1, 9], ALL) == (2, 5)  # the ends are none; of a plateau the middle


def test_the_undefined_parts_a_curve() -> None:
    assert find_peaks([1, 2, nan, 3, 1, 2, 1, nan], ALL) == (5,)
    assert find_peaks([nan, nan], ALL) == ()
    assert find_peaks([], ALL) == ()


def test_prominence_is_in_standard_deviations() -> None:
    curve = [0, 10, 8, 9, 0]  # standard deviation 4.45; the peak of 9 stands out by 1
    assert find_peaks(curve, PeaksConfig(prominence=0.22)) == (1, 3)
    assert find_peaks(curve, PeaksConfig(prominence=0.23)) == (1,)
    assert find_peaks([x * 1e-3 for x in curve], PeaksConfig(prominence=0.22)) == (1, 3)


def test_of_close_peaks_the_higher_stays() -> None:
    assert find_peaks([0, 2, 1, 3, 0], PeaksConfig(prominence=0, distance=3)) == (3,)


def test_a_level_curve_has_no_peaks() -> None:
    rounded = 2 + 1e-7 * np.random.default_rng(0).standard_normal(50)
    assert find_peaks(rounded.tolist(), ALL) == ()
    assert find_peaks([0.0] * 9, ALL) == ()


@pytest.mark.parametrize("values", [[1, 2, 3], [nan, 1, 2, 3, nan, 1, 2, nan]])
def test_a_peak_could_be_inside_a_run(values: list[float]) -> None:
    expected = [i for i in range(1, len(values) - 1) if not np.isnan(values[i - 1 : i + 2]).any()]
    assert np.flatnonzero(eligible(values)).tolist() == expected
