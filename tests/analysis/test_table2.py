"""Table 2: hand-computed cases, and p-values on noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import kstest

from rhythm.analysis.config import Table2Config
from rhythm.analysis.response import Peaks, Tokens
from rhythm.analysis.results import Table2Row
from rhythm.analysis.table2 import couplings, permuted_sums, table2
from rhythm.credit.peaks import Coupling, PeaksConfig, find_peaks

nan = float("nan")
PEAKS = PeaksConfig(prominence=0)


def response(
    waad: list[float], fai: list[float], fai_receiver: list[float], entropy: list[float]
) -> tuple[Tokens, Peaks]:
    n = len(waad)
    curves = [tuple(float(x) for x in curve) for curve in (waad, fai, fai_receiver, entropy)]
    tokens = Tokens((0,) * n, ("a",) * n, *curves, curves[3], (1.0,) * n)
    return tokens, Peaks(*(find_peaks(curve, PEAKS) for curve in curves))


def rows(*responses: tuple[Tokens, Peaks], permutations: int = 99, null: str = "rotate") -> tuple[Table2Row, ...]:
    config = Table2Config.model_validate({"permutations": permutations, "null": null, "resamples": 50})
    return table2(iter(responses), config, follow=1, seed=0)


GOLDEN = response(
    waad=[0, 1, 0, 1, 0, 0, 0, 1, 0, 0],  # peaks 1, 3, 7
    fai=[0, 0, 1, 0, 0, 0, 1, 0, nan, nan],  # peaks 2, 6: one right after a peak of WAAD
    fai_receiver=[0, 0, 1, 0, 1, 0, 1, 0, nan, nan],  # peaks 2, 4, 6: two are the global heads' too
    entropy=[1, 2, 0, 2, 0, 0, 0, 5, 0, 0],
)


def test_golden() -> None:
    entropy, cooccurrence, follows = rows(GOLDEN)
    assert (entropy.observed, entropy.random, entropy.peaks) == (3, 1, 3)
    assert entropy.lift == 2
    assert (cooccurrence.observed, cooccurrence.random, cooccurrence.peaks) == (pytest.approx(2 / 3), 0.2, 3)
    assert (follows.observed, follows.random, follows.peaks) == (0.5, 0.6, 2)  # tokens 1, 2, 3, 4, 7, 8 of ten
    assert math.isnan(entropy.interval.low)  # one response has no spread


def test_statistics_are_over_all_peaks_together() -> None:
    other = response([0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 7, 0, 1])
    entropy, cooccurrence, follows = rows(GOLDEN, other)
    assert (entropy.observed, entropy.random) == (pytest.approx((9 + 7) / 4), pytest.approx((10 + 8) / 14))
    assert (cooccurrence.observed, cooccurrence.random) == (pytest.approx(2 / 3), 3 / 14)
    assert (cooccurrence.responses, entropy.responses) == (1, 2)
    assert (follows.observed, follows.random) == (pytest.approx(2 / 3), pytest.approx((6 + 2) / 14))
    assert entropy.interval.low <= entropy.observed <= entropy.interval.high


def test_places_where_a_peak_could_be() -> None:
    of = couplings(*GOLDEN, follow=1)
    assert of["entropy"].places.tolist() == list(range(1, 9))
    assert of["follows"].places.tolist() == list(range(1, 7))  # FAI is undefined from 8 on
    assert of["follows"].value.tolist() == [0, 1, 1, 1, 1, 0, 0, 1, 1, 0]
    assert couplings(*GOLDEN, follow=0)["follows"].value.tolist() == [0, 1, 0, 1, 0, 0, 0, 1, 0, 0]


def test_rotations_keep_distances_and_shuffles_numbers() -> None:
    # Peaks at distance 2 on a ring of four: a hit each, whatever the rotation, but two or none when shuffled.
    coupling = Coupling(np.array([nan, 1, 1, 0, 0, nan]), np.arange(1, 5), np.array([1, 3]))
    rng = np.random.default_rng(0)
    rotated = permuted_sums(coupling, Table2Config(permutations=200), rng)
    assert (rotated == 1).all()
    shuffled = permuted_sums(coupling, Table2Config(permutations=600, null="shuffle"), rng)
    shares = [float((shuffled == hits).mean()) for hits in range(3)]
    assert shares == pytest.approx([1 / 6, 4 / 6, 1 / 6], abs=0.06)


@pytest.mark.parametrize("null", ["rotate", "shuffle"])
def test_certain_couplings_have_the_least_p_value(null: str) -> None:
    rng = np.random.default_rng(1)
    of_all = []
    for _ in range(10):
        waad = rng.standard_normal(60)
        fai = np.roll(waad, 1).tolist()
        of_all.append(response(waad.tolist(), fai, fai, np.exp(waad).tolist()))
    for row in rows(*of_all, permutations=199, null=null):
        assert row.p_value == 1 / 200
        assert row.lift > 0.3
        assert row.permuted_lift > 0.3
        assert row.lift_interval.low > 0


def noise(rng: np.random.Generator, n: int) -> tuple[Tokens, Peaks]:
    curves = rng.standard_normal((4, n))
    curves[1:3, -3:] = nan
    curves[3] = np.exp(curves[3])
    return response(*curves.tolist())


def p_values(draws: int, lengths: tuple[int, ...]) -> dict[str, list[float]]:
    rng = np.random.default_rng(2)
    values_by_key: dict[str, list[float]] = {}
    for _ in range(draws):
        for row in rows(*(noise(rng, n) for n in lengths), permutations=199):
            values_by_key.setdefault(row.key, []).append(row.p_value)
    return values_by_key


def test_p_values_are_uniform_on_noise() -> None:
    for key, values in p_values(500, (900, 700)).items():
        assert kstest(values, "uniform").pvalue > 0.01, key
        assert np.mean(np.array(values) <= 0.05) == pytest.approx(0.05, abs=0.03), key


def test_p_values_of_few_peaks_are_never_too_small() -> None:
    # Counts of few peaks tie with those of permutations, which raises p-values; entropies don't tie.
    values_by_key = p_values(300, (30, 45, 60))
    for key, values in values_by_key.items():
        assert kstest(values, "uniform", alternative="greater").pvalue > 0.01, key
    assert kstest(values_by_key["entropy"], "uniform").pvalue > 0.01


def test_nothing_is_found_in_nothing() -> None:
    level = response([1.0] * 5, [nan] * 5, [nan] * 5, [0.5] * 5)
    for row in rows(level):
        assert row.peaks == row.responses == 0
        assert all(math.isnan(x) for x in (row.observed, row.lift, row.permuted, row.p_value))
