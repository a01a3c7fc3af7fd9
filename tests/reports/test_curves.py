"""The running-peak average of a curve, by hand."""

from __future__ import annotations

import math

import pytest

from rhythm.reports.curves import running_peak_average


def test_running_peak_average_by_hand() -> None:
    # 0.5 → ½·1 + ½·0.5 = 0.75 → 0.2 is below and changes nothing → ½·0.9 + ½·0.75 = 0.825
    assert running_peak_average([0.5, 1.0, 0.2, 0.9], alpha=0.5) == pytest.approx([0.5, 0.75, 0.75, 0.825])
    assert running_peak_average([0.2, 0.6], alpha=0.25) == pytest.approx([0.2, 0.3])
    assert running_peak_average([], alpha=0.5) == []


def test_running_peak_average_steps_over_undefined_values() -> None:
    averages = running_peak_average([math.nan, 1.0, math.nan, 2.0], alpha=0.5)
    assert [math.isnan(value) for value in averages] == [True, False, True, False]
    assert averages[1] == 1.0
    assert averages[3] == 1.5


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.1, math.nan])
def test_running_peak_average_names_a_bad_alpha(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha is"):
        running_peak_average([1.0], alpha)
