"""Peaks against hand-computed ones."""

from __future__ import annotations

import numpy as np
import pytest

from rhythm.credit.peaks import PeaksConfig, coupling, eligible, find_peaks, rotated_lift, within_reach

ALL = PeaksConfig(prominence=0)
nan = float("nan")


def test_entries_above_both_neighbors() -> None:
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


def test_a_lift_over_rotated_peaks_by_hand() -> None:
    """Peaks at 1 and 3, where values are 4 and 2; a peak could be at 1, 2, 3, 4 (mean 2), so that chance gives 4."""
    curve, value = [0, 2, 1, 3, 2, 0.0], np.array([9, 4, 1, 2, 1, 9.0])
    one = coupling(value, tuple(curve), find_peaks(curve, ALL))
    assert one.peaks.tolist() == [1, 3]
    assert one.places.tolist() == [1, 2, 3, 4]
    assert rotated_lift([one]) == pytest.approx(6 / 4 - 1)
    # Over all responses together: (6 + 1)/(4 + 2) for one more, whose one peak is at a 1, and the mean of its places 2.
    other = coupling(np.array([9, 3, 1, 2, 9.0]), (0, 1, 5, 1, 0), (2,))
    assert rotated_lift([one, other]) == pytest.approx(7 / 6 - 1)
    assert np.isnan(rotated_lift([]))
    assert within_reach([0, 3], 6, 1).tolist() == [1, 1, 0, 1, 1, 0]
    assert within_reach([5], 6, 2).tolist() == [0, 0, 0, 0, 0, 1]
    assert within_reach([1], 4, 0).tolist() == [0, 1, 0, 0]
    assert within_reach([1], 4, 10**12).tolist() == [0, 1, 1, 1]
