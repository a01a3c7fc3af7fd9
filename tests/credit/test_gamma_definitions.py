"""γ on random batches against its definitions (eqs. 13 to 18), restated token by token in plain Python."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch

from rhythm.credit.config import CreditConfig
from rhythm.credit.gamma import batch_credit_weights
from rhythm.credit.heads import HeadGroups
from rhythm.credit.signals import RhythmSignals

NAN = math.nan


def top_q(values: dict[int, float], q: Fraction, sign: int = 1) -> set[int]:
    """The ⌈q·n⌉ largest of n defined entries, ties to the earlier position; sign −1: the smallest."""
    ordered = sorted(values, key=lambda t: (-sign * values[t], t))
    return set(ordered[: math.ceil(q * len(values))])


def level(threshold: dict[str, float], values: dict[int, float]) -> float:
    if "value" in threshold:
        return threshold["value"]
    if not values:
        return NAN
    ordered = sorted(values.values())
    place = Fraction(str(threshold["quantile"])) * (len(ordered) - 1)
    below = math.floor(place)
    if place == below:
        return ordered[below]
    return ordered[below] + float(place - below) * (ordered[below + 1] - ordered[below])


def restated(
    waad: list[float],
    fai: list[float],
    entropy: list[float],
    strategy: str,
    q: str,
    select: str,
    k: int,
    alpha: float,
    tau_waad: dict[str, float],
    tau_delta: dict[str, float] | None,
) -> list[float]:
    """γ of one response, with b = 1/2, from the definitions as they are written."""
    n, share, sign, b = len(waad), Fraction(q), 1 if select == "top" else -1, 0.5
    delta = {t: abs(waad[t] - waad[t + 1]) for t in range(n - 1)}
    delta = {t: value for t, value in delta.items() if not math.isnan(value)}
    defined_waad = {t: value for t, value in enumerate(waad) if not math.isnan(value)}
    T_glob = top_q({t: value for t, value in enumerate(fai) if not math.isnan(value)}, share, sign)
    if strategy == "local_chunk":
        T_loc = top_q(delta, share, sign)
        return [1 + b * (t in T_loc) for t in range(n)]
    if strategy == "global_anchor":
        return [1 + b * (t in T_glob) for t in range(n)]
    if strategy == "entropy":
        uncertain = top_q({t: value for t, value in enumerate(entropy) if not math.isnan(value)}, share, sign)
        return [1 + b * (t in uncertain) for t in range(n)]

    highest = level(tau_waad, defined_waad)
    if tau_delta is None:
        least = min((delta[t] for t in top_q(delta, share)), default=math.inf)
    else:
        least = level(tau_delta, delta)
    dominated, introducing = set(), set()
    for t in T_glob:
        before = [u for u in range(t - k, t) if u in delta]
        if not before or not waad[t] <= highest:
            continue
        largest = max(delta[u] for u in before)
        if largest >= least:
            dominated.add(t)
            introducing.add(max(u for u in before if delta[u] == largest))
    return [
        1 + b * (t in T_glob - dominated) + (1 - alpha) * b * (t in dominated) + alpha * b * (t in introducing)
        for t in range(n)
    ]


def draw_response(rng: random.Random, n: int) -> dict[str, list[float]]:
    """Signals on a coarse grid, so that ties abound, with undefined entries and a horizon's tail."""
    spread, holes = rng.choice([2, 5, 40]), rng.choice([0.0, 0.0, 0.2])
    response = {
        name: [NAN if rng.random() < holes else rng.randrange(spread) / 4 for _ in range(n)]
        for name in ("waad", "fai", "entropy")
    }
    tail = rng.choice([0, 0, 3, n])
    response["fai"] = [NAN if t >= n - tail else value for t, value in enumerate(response["fai"])]
    return response


@pytest.mark.parametrize("strategy", ["local_chunk", "global_anchor", "entropy", "coupled"])
@pytest.mark.parametrize("select", ["top", "bottom"])
def test_batches_equal_the_definitions(strategy: str, select: str) -> None:
    rng = random.Random(f"{strategy} {select}")
    dominated = 0
    for _ in range(60):
        options = {
            "q": rng.choice(["0.4", "0.1", "0.25", "0.8", "1.0"]),
            "k": rng.choice([1, 2, 3, 7, 40]),
            "alpha": rng.choice([0.0, 0.25, 0.5, 1.0]),
            "tau_waad": rng.choice([{"quantile": 0.5}, {"quantile": 0.7}, {"value": 0.5}]),
            "tau_delta": rng.choice([None, None, {"quantile": 0.25}, {"value": 0.25}]),
        }
        B, T = rng.randint(1, 6), rng.randint(1, 30)
        tensors = {name: torch.empty(B, T) for name in ("waad", "fai", "entropy")}
        for tensor in tensors.values():  # noise outside the responses, which must not matter
            tensor.uniform_(-9, 9, generator=torch.Generator().manual_seed(T))
        mask = torch.zeros(B, T, dtype=torch.bool)
        expected = torch.ones(B, T)
        for row in range(B):
            n = rng.randint(0, T)
            start = rng.randint(0, T - n)
            response = draw_response(rng, n)
            mask[row, start : start + n] = True
            for name, tensor in tensors.items():
                tensor[row, start : start + n] = torch.tensor(response[name])
            weights = restated(**response, strategy=strategy, select=select, **options)
            expected[row, start : start + n] = torch.tensor(weights)
            dominated += sum(1 < weight < 1.5 for weight in weights)
        config = CreditConfig(
            strategy=strategy,
            select=select,
            top_fraction=float(options["q"]),
            neighborhood=options["k"],
            alpha=options["alpha"],
            tau_waad=options["tau_waad"],
            tau_delta=options["tau_delta"],
        )
        no_heads = torch.zeros(B, 1, dtype=torch.bool)
        signals = RhythmSignals(**tensors, span=no_heads.float(), groups=HeadGroups(no_heads, no_heads))
        actual = batch_credit_weights(signals, mask, config)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    assert dominated > 100 or strategy != "coupled"
