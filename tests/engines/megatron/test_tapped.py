"""signals.source=training on real ranks: tap → γ → loss, wherever the sampled layers and heads are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_case import LAYOUTS, OPTIONS, TAP, Case, assert_near, assert_weights, run_ranks, torch_engine
from transformers import AutoModelForCausalLM

from rhythm.credit.advantages import token_advantages
from rhythm.credit.config import CreditConfig
from rhythm.credit.correction import CorrectionConfig
from rhythm.credit.gamma import batch_credit_weights
from rhythm.engines.megatron.layout import ParallelConfig
from rhythm.trainer.tapped import MicroBatchCredit

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1800)]


COUPLED = MicroBatchCredit(CreditConfig(strategy="coupled"), CorrectionConfig())
ENTROPY = MicroBatchCredit(CreditConfig(strategy="entropy"), CorrectionConfig())
PIPELINE = ParallelConfig(pipeline=2, data=2)
CONTEXT = ParallelConfig(pipeline=2, context=2, recompute=True)


@pytest.mark.parametrize(
    ("parallel", "max_tokens"),
    [(LAYOUTS["pipeline"], None), (LAYOUTS["both"], 64), (PIPELINE, 64), (CONTEXT, None)],
    ids=["recompute", "tensor", "data", "context"],
)
def test_a_step_is_that_of_inline_signals(
    case: Case, tmp_path: Path, parallel: ParallelConfig, max_tokens: int | None
) -> None:
    mask, signals = case.rollout.response_mask, case.results["signals"]
    batch = replace(case.batches[0], old_logprobs=None)
    gamma = batch_credit_weights(signals, mask, COUPLED.credit)
    assert gamma[mask].unique().numel() > 1
    engine = torch_engine(AutoModelForCausalLM.from_pretrained(case.checkpoint, dtype=torch.float32))
    expected = engine.step(replace(batch, advantages=token_advantages(batch.advantages, gamma, mask, "nonnegative")))
    weights = {name: tensor.clone() for name, tensor in engine.weights().items()}
    without = engine.tapped_step(batch, None, ENTROPY)
    for results in run_ranks(
        tmp_path,
        scenario="tapped",
        parallel=parallel,
        checkpoint=case.checkpoint,
        options=OPTIONS | {"max_tokens": max_tokens},
        batch=batch,
        tap=TAP,
        shapes=(COUPLED, ENTROPY),
    ):
        taken = results["taken"]
        assert_same_signals(taken.signals, signals)
        assert torch.equal(batch_credit_weights(taken.signals, mask, COUPLED.credit), gamma)
        assert_near(taken.log_probs.logprobs, case.results["log_probs"].logprobs, atol=1e-5)
        assert_near(taken.log_probs.entropy, case.results["log_probs"].entropy, atol=1e-5)
        assert taken.metrics.loss == pytest.approx(expected.loss, abs=1e-4)
        assert taken.metrics.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
        assert_weights(results["weights"], weights, atol=2e-4)
        assert results["seconds"] > 0
        assert results["without"].signals is None
        assert results["without"].metrics.loss == pytest.approx(without.metrics.loss, abs=1e-4)
        assert_near(results["without"].log_probs.logprobs, without.log_probs.logprobs, atol=1e-3)
        assert "grouping is 'batch': must be 'sequence'" in results["refused"]


def assert_same_signals(actual: Any, expected: Any) -> None:
    assert actual.heads == expected.heads
    assert torch.equal(actual.groups.local, expected.groups.local)
    assert torch.equal(actual.groups.global_, expected.groups.global_)
    assert_near(actual.span, expected.span, atol=1e-4)
    assert_near(actual.waad, expected.waad, atol=1e-4)
    assert_near(actual.fai, expected.fai, atol=1e-5)
