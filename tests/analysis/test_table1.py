from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import pytest

from rhythm.analysis.response import Trial
from rhythm.analysis.results import Table1
from rhythm.analysis.table1 import table1


def trial(group: Literal["top", "bottom"], jaccard: float) -> Trial:
    return Trial(group, 3, 0.5, 7, "a", 8, "b", 2, 0.1, jaccard, "text", True)


def trials(top: list[float], bottom: list[float]) -> list[Trial]:
    return [trial("top", x) for x in top] + [trial("bottom", x) for x in bottom]


def table(*of_responses: list[Trial]) -> Table1:
    return table1(iter(of_responses), resamples=2000, seed=0)


def test_means_are_over_trials_and_pr_over_responses() -> None:
    row = table(
        trials([0.2, 0.4], [0.5, 0.9]),
        trials([0.6], [0.8]),
        trials([0.9], [0.3]),
        trials([0.5], [0.5]),  # a tie is not lower
    )
    assert row.top == pytest.approx((0.2 + 0.4 + 0.6 + 0.9 + 0.5) / 5)
    assert row.bottom == pytest.approx((0.5 + 0.9 + 0.8 + 0.3 + 0.5) / 5)
    assert row.top_below_bottom == 2 / 4
    assert row.p_value == pytest.approx(4 / 8)  # at least 2 of 3 coins; the tie is no coin
    assert (row.problems, row.top_trials, row.bottom_trials) == (4, 5, 5)


def test_the_control_for_position_is_a_comparison_of_its_own() -> None:
    def at(position: int, group: Literal["top", "bottom", "matched"], jaccard: float) -> Trial:
        return replace(trial("top", jaccard), group=group, position=position)

    row = table(
        [at(2, "top", 0.4), at(9, "bottom", 0.9), at(3, "matched", 0.3)],
        [at(4, "top", 0.5), at(11, "bottom", 0.8), at(5, "matched", 0.6), at(7, "matched", math.nan)],
        [at(0, "top", 0.1), at(1, "matched", 0.5)],
    )
    assert row.matched == pytest.approx((0.3 + 0.6 + 0.5) / 3)
    assert (row.top_below_bottom, row.top_below_matched) == (1, 2 / 3)
    assert (row.p_value, row.matched_p_value) == pytest.approx((1 / 4, 1 / 2))
    assert (row.problems, row.matched_trials) == (2, 3)
    assert (row.top_position, row.bottom_position, row.matched_position) == (2, 10, 3)
    assert row.matched_interval.low <= row.matched <= row.matched_interval.high


def test_the_undefined_is_left_out() -> None:
    row = table(trials([math.nan, 0.2], [0.4]), trials([math.nan], [math.nan]))
    assert (row.top, row.bottom, row.top_below_bottom) == (0.2, 0.4, 1)
    assert (row.problems, row.top_trials, row.bottom_trials) == (1, 1, 1)


@pytest.mark.parametrize("of_responses", [[], [[]], [trials([math.nan], [math.nan])]])
def test_without_trials_all_is_undefined(of_responses: list[list[Trial]]) -> None:
    row = table(*of_responses)
    assert (row.problems, row.top_trials, row.bottom_trials) == (0, 0, 0)
    assert all(math.isnan(x) for x in (row.top, row.bottom, row.top_below_bottom, row.p_value))


def test_the_papers_share_is_61_of_70_problems() -> None:
    row = table(*[trials([0.4], [0.5] if i < 61 else [0.3]) for i in range(70)])
    assert round(100 * row.top_below_bottom, 2) == 87.14
    assert row.p_value < 1e-9


def test_intervals_are_those_of_the_bootstrap_over_responses() -> None:
    # Means of the responses are 0 or 1, 50 of 100 each: the resampled mean is binomial, 0.5 ± 1.96 · 0.05.
    of_responses = [trials([float(i % 2)] * 3, [0.5]) for i in range(100)]
    row = table(*of_responses)
    assert row.top_interval.low == pytest.approx(0.402, abs=0.02)
    assert row.top_interval.high == pytest.approx(0.598, abs=0.02)
    assert (row.bottom_interval.low, row.bottom_interval.high) == (0.5, 0.5)
    assert repr(table(*of_responses)) == repr(row)  # NaN is not equal to itself
