"""A step's rates, against hand-computed values."""

from __future__ import annotations

import math

from rhythm.cluster.roles import Role
from rhythm.cluster.utilization import Rates


def test_a_steps_numbers_by_hand() -> None:
    rates = Rates({Role.TRAIN: 2, Role.INFER: 1})
    rates.worked(Role.TRAIN, 3.0)
    rates.worked(Role.TRAIN, 5.0)
    rates.worked(Role.INFER, 1.0)
    rates.processed(Role.INFER, 600, 1.5)
    rates.processed(Role.INFER, 200, 0.5)
    rates.statistics += 0.2
    assert rates.restarted(Role.INFER) == 1
    metrics = rates.pop_metrics(10.0)
    assert metrics["idle_share_train"] == 1 - 8 / 20
    assert metrics["idle_share_infer"] == 0.9
    assert metrics["tokens_per_second_infer"] == 400
    assert math.isnan(metrics["tokens_per_second_train"])  # it got through none
    assert metrics["attention_share"] == 0.2 / 10
    assert (metrics["restarts_infer"], metrics["restarts_train"]) == (1, 0)


def test_a_step_starts_from_zero_but_for_the_restarts() -> None:
    rates = Rates({Role.INFER: 1})
    rates.worked(Role.INFER, 1.0)
    rates.processed(Role.INFER, 10, 1.0)
    rates.restarted(Role.INFER)
    rates.pop_metrics(2.0)
    metrics = rates.pop_metrics(2.0)
    assert metrics["idle_share_infer"] == 1
    assert math.isnan(metrics["tokens_per_second_infer"])
    assert metrics["restarts_infer"] == 1
