"""Micro-batches by a budget of tokens on real ranks. Differences allowed are as in test_ranks.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from megatron_case import OPTIONS, Case, assert_near, assert_weights, run_ranks

from rhythm.engines.megatron.layout import ParallelConfig

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1800)]


def test_steps_are_those_of_micro_batches_by_rows(case: Case, tmp_path: Path) -> None:
    """On two stages of two data ranks: the seven rows of up to 40 tokens are dealt first and then cut."""
    batches = case.batches[:3]
    ranks = run_ranks(
        tmp_path,
        scenario="packed",
        parallel=ParallelConfig(pipeline=2, data=2),
        checkpoint=case.checkpoint,
        options=OPTIONS | {"max_tokens": 64},
        rollout=case.rollout,
        batches=batches,
    )
    for results in ranks:
        assert_near(results["log_probs"].logprobs, case.results["log_probs"].logprobs, atol=1e-5)
        for step, expected in zip(results["steps"], case.results["steps"], strict=True):
            assert step.loss == pytest.approx(expected.loss, abs=1e-4)
            assert step.kl == pytest.approx(expected.kl, abs=1e-4)
        assert results["steps"][0].grad_norm == pytest.approx(case.results["steps"][0].grad_norm, rel=1e-5)
        assert_weights(results["weights"], case.results["weights"], atol=2e-4)
    # Rows of 39, 36, 33, 30, 24, 20 and 19 tokens; both stages of a data rank run the same micro-batches.
    assert sorted(results["tokens"] for results in ranks) == 2 * [[36, 33, 39]] + 2 * [[39, 54]]
