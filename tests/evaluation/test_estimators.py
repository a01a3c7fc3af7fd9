"""pass@k, avg@n and their intervals against values worked by hand."""

from __future__ import annotations

import itertools
import math

import pytest

from rhythm.evaluation.estimators import estimates, pass_at_k, usual_k
from rhythm.evaluation.scores import ScoredResponse, as_metrics, score
from rhythm.reports.intervals import over_problems, over_seeds, wilson


def test_pass_at_k_by_hand() -> None:
    # n = 4, c = 1: C(3, 2) / C(4, 2) = 3/6; n = 5, c = 2: C(3, 3) / C(5, 3) = 1/10
    assert pass_at_k(4, 1, 2) == pytest.approx(1 - 3 / 6)
    assert pass_at_k(5, 2, 3) == pytest.approx(1 - 1 / 10)
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 3, 2) == 1  # of two responses one has to be right
    assert pass_at_k(4, 0, 4) == 0
    assert pass_at_k(1000, 1, 500) == pytest.approx(0.5)  # whole numbers: no overflow


@pytest.mark.parametrize(("n", "c", "k"), [(6, 2, 3), (7, 5, 2), (5, 1, 4)])
def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_one(n: int, c: int, k: int) -> None:
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(
    ("n", "c", "k", "named"), [(4, 1, 0, "k is 0"), (4, 1, 5, "k is 5"), (4, 5, 1, "correct is 5")]
)
def test_what_is_not_allowed_is_named(n: int, c: int, k: int, named: str) -> None:
    with pytest.raises(ValueError, match=f"{named}: must be from"):
        pass_at_k(n, c, k)


def test_estimates_of_a_task_by_hand() -> None:
    # Three problems of four responses: 0, 1 and 4 right. avg@4 = (0 + 1/4 + 1) / 3; pass@2 = (0 + 1/2 + 1) / 3.
    found = {each.name: each for each in estimates([0, 1, 4], 4, [2, 4])}
    assert list(found) == ["pass@1", "pass@2", "pass@4", "avg@4"]
    assert found["avg@4"].value == pytest.approx(5 / 12)
    assert found["pass@1"].value == found["avg@4"].value
    assert found["pass@2"].value == pytest.approx(1 / 2)
    assert found["pass@4"].value == pytest.approx(2 / 3)
    for each in found.values():
        assert 0 <= each.low < each.value < each.high <= 1
    assert math.isnan(estimates([], 4, [1])[0].value)
    assert [usual_k(n) for n in (1, 2, 6, 16)] == [(1,), (1, 2), (1, 2, 4, 6), (1, 2, 4, 8, 16)]


def test_interval_over_problems_by_hand() -> None:
    # The mean of 4 problems, half of them 1, has the percentiles of a binomial of 4 halves: P(0) = P(4) = 1/16 > 2.5 %.
    assert over_problems([0.0, 1.0, 0.0, 1.0]) == (0.0, 1.0)
    # 400 problems, a quarter 1: the binomial's normal, 0.25 ± 1.96·√(0.25·0.75/400), to a step of 1/400 or two.
    low, high = over_problems([1.0] * 100 + [0.0] * 300)
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert (low, high) == (pytest.approx(0.25 - half, abs=0.005), pytest.approx(0.25 + half, abs=0.005))
    # Values between: the spread of the problems, 0.1, counts, not that of a binomial.
    low, high = over_problems([0.4] * 200 + [0.6] * 200)
    assert (low, high) == (
        pytest.approx(0.5 - 1.96 * 0.1 / 20, abs=0.002),
        pytest.approx(0.5 + 1.96 * 0.1 / 20, abs=0.002),
    )
    assert over_problems([0.0] * 30) == wilson(0.0, 30)
    assert over_problems([0.0] * 30)[1] == pytest.approx(0.1135, abs=1e-4)  # z²/(n + z²)
    assert math.isnan(over_problems([])[0])
    assert over_problems([0.1, 0.5, 0.9]) == over_problems([0.9, 0.1, 0.5])


def test_interval_over_seeds_by_hand() -> None:
    # 1, 2, 3: mean 2, s = 1, t(0.975, 2) = 4.302653: 2 ± 4.302653/√3
    assert over_seeds([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)
    # two values a distance d apart: t(0.975, 1) = 12.7062 times d/2
    assert over_seeds([0.1, 0.3]) == pytest.approx((0.2 - 1.27062, 0.2 + 1.27062), abs=1e-4)
    assert all(math.isnan(each) for each in over_seeds([0.3]))


def test_scores_count_per_problem() -> None:
    responses = [
        ScoredResponse(0, True, True, True, 4),
        ScoredResponse(0, False, True, False, 8),
        ScoredResponse(7, False, False, True, 6, fault="late"),
        ScoredResponse(7, False, True, True, 6),
    ]
    found = score("aime", responses, 2, [1, 2], left_out=3)
    assert (found.problems, found.correct, found.left_out, found.faults) == (2, (1, 0), 3, 1)
    assert (found.finished_share, found.format_share, found.mean_tokens) == (0.75, 0.75, 6)
    assert as_metrics(found) == {
        "aime/pass@1": 0.25,
        "aime/pass@2": 0.5,
        "aime/avg@2": 0.25,
        "aime/problems": 2,
        "aime/rewards_late": 1,
        "aime/rewards_raised": 0,
        "aime/rewards_memory": 0,
        "aime/rewards_invalid": 0,
    }
    with pytest.raises(KeyError):
        found.estimate("pass@3")
