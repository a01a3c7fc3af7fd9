"""Which rows make micro-batches on real ranks: by a budget of tokens, and without rows that have no gradient.

Differences allowed are as in test_ranks.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron_case import OPTIONS, Case, assert_near, assert_weights, run_ranks, torch_engine
from transformers import AutoModelForCausalLM

from rhythm.credit.loss import LossConfig
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


def test_rows_without_a_gradient_go_through_no_rank(case: Case, tmp_path: Path) -> None:
    """One of the seven rows has advantages, so that the other data rank has none: its gradients add up all the same."""
    advantages = torch.zeros_like(case.batches[0].advantages)
    advantages[2] = case.batches[0].advantages[2]
    batch = replace(case.batches[0], advantages=advantages, reference_logprobs=None)
    options = OPTIONS | {"loss": LossConfig()}
    alone = torch_engine(AutoModelForCausalLM.from_pretrained(case.checkpoint, dtype=torch.float32), loss=LossConfig())
    expected = alone.step(batch)
    ranks = run_ranks(
        tmp_path,
        scenario="packed",
        parallel=ParallelConfig(data=2),
        checkpoint=case.checkpoint,
        options=options,
        rollout=case.rollout,
        batches=[batch],
    )
    for results in ranks:
        step = results["steps"][0]
        assert step.loss == pytest.approx(expected.loss, abs=1e-5)
        assert step.approx_kl == pytest.approx(expected.approx_kl, abs=1e-6)
        assert step.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
        assert_weights(results["weights"], alone.weights(), atol=2e-4)
    assert sorted(results["tokens"] for results in ranks) == [[], [int(case.rollout.lens[2])]]
