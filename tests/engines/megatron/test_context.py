"""Context parallel ranks with tensor ranks, in threes, and with few tokens to predict, against the one-machine engine.

Two of them go through all of test_ranks.py, with pipeline stages through test_tapped.py. Differences allowed are as in
test_ranks.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron_case import OPTIONS, TAP, Case, assert_near, assert_weights, make_batches, run_ranks, torch_engine
from transformers import AutoModelForCausalLM

from rhythm.engines.megatron.layout import ParallelConfig

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize(
    ("parallel", "last"),
    [(ParallelConfig(tensor=2, context=2), None), (ParallelConfig(context=3, distributed_optimizer=False), 2)],
    ids=["tensor", "three"],
)
def test_steps_follow_one_machine(case: Case, tmp_path: Path, parallel: ParallelConfig, last: int | None) -> None:
    """`last`: responses are so many tokens, which not every rank has one of to predict, nor a row of."""
    rollout, t = case.rollout, torch.arange(case.rollout.input_ids.shape[1])
    if last is not None:
        prompt_lens = rollout.lens - last
        mask = rollout.attention_mask & (t >= prompt_lens[:, None])
        rollout = replace(rollout, prompt_lens=prompt_lens, response_mask=mask)
    engine = torch_engine(AutoModelForCausalLM.from_pretrained(case.checkpoint, dtype=torch.float32))
    log_probs, signals = engine.log_probs(rollout, TAP)
    batches = make_batches(rollout, log_probs.logprobs, engine.reference_log_probs(rollout), count=2)
    steps = [engine.step(batch) for batch in batches]
    for results in run_ranks(
        tmp_path,
        scenario="scores",
        parallel=parallel,
        checkpoint=case.checkpoint,
        options=OPTIONS,
        rollout=rollout,
        batches=batches,
        tap=TAP,
    ):
        assert_near(results["log_probs"].logprobs, log_probs.logprobs, atol=1e-5)
        assert_near(results["log_probs"].entropy, log_probs.entropy, atol=1e-5)
        assert torch.equal(results["signals"].groups.local, signals.groups.local)
        assert torch.equal(results["signals"].groups.global_, signals.groups.global_)
        assert_near(results["signals"].waad, signals.waad, atol=1e-4)
        assert_near(results["signals"].fai, signals.fai, atol=1e-5)
        for step, expected in zip(results["steps"], steps, strict=True):
            assert step.loss == pytest.approx(expected.loss, abs=1e-4)
            assert step.kl == pytest.approx(expected.kl, abs=1e-4)
        assert results["steps"][0].grad_norm == pytest.approx(steps[0].grad_norm, rel=1e-5)
        assert_weights(results["weights"], engine.weights(), atol=2e-4)
