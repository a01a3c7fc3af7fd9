"""Rows whose advantages are all 0 have no gradient: a step without them is the step with them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tensors import assert_same

from rhythm.credit.loss import LossConfig, policy_loss
from rhythm.engines.interfaces import Rollout, TrainBatch
from rhythm.engines.local.logprobs import response_logprobs
from rhythm.engines.local.train import OptimizerConfig, TorchTrain
from rhythm.tap.signals_config import SignalsConfig

LR, DECAY, EPS = 1e-2, 0.1, 1e-2  # of AdamW; a large eps makes its first step smooth in the gradient
ADVANTAGES = torch.tensor([0.0, 0.0, 1.2, -0.9])
Make = Callable[..., TorchTrain]


@pytest.fixture
def make(tokenizer: Any) -> Make:
    def make(model: Any, loss: LossConfig | None = None) -> TorchTrain:
        optimizer = OptimizerConfig(lr=LR, weight_decay=DECAY, eps=EPS)
        return TorchTrain(
            model, tokenizer, optimizer=optimizer, loss=loss or LossConfig(), temperature=1.0, micro_batch_size=3
        )

    return make


@pytest.fixture
def batch(model: Any, make_rollout: Callable[..., Rollout]) -> TrainBatch:
    """Its first prompt's responses had the same reward. Old log-probs are off by as much as some gradient steps do."""
    rollout = make_rollout()
    with torch.no_grad():
        now = response_logprobs(model, rollout, temperature=1.0, chunk=100).logprobs
    noise = torch.randn(now.shape, generator=torch.Generator().manual_seed(1))
    # Outside the responses advantages have no meaning.
    advantages = torch.where(rollout.response_mask, ADVANTAGES[:, None], 7.0)
    return TrainBatch(rollout, now + 0.3 * noise, advantages)


def optimizer_of(model: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY, eps=EPS)


def tokens_and_gradients(model: Any) -> list[tuple[int, bool]]:
    """Filled at each forward pass: its rows, and whether gradients were on."""
    passes: list[tuple[int, bool]] = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append((len(kwargs["input_ids"]), torch.is_grad_enabled())),
        with_kwargs=True,
    )
    return passes


@pytest.mark.parametrize("normalization", ["sequence", "token", "dr_grpo"])
def test_they_are_left_out_and_the_step_is_the_same(
    model: Any, make: Make, batch: TrainBatch, normalization: Any
) -> None:
    loss = LossConfig(normalization=normalization, max_tokens=20)
    by_hand = copy.deepcopy(model).train()
    optimizer = optimizer_of(by_hand)
    now = response_logprobs(by_hand, batch.rollout, temperature=1.0, chunk=100).logprobs
    mask = batch.rollout.response_mask
    assert batch.old_logprobs is not None
    out = policy_loss(now, batch.old_logprobs, batch.advantages, mask, loss)
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
    optimizer.step()
    # The mean over the tokens of the others alone.
    log_ratio = (now - batch.old_logprobs).detach()[2:][mask[2:]]
    approx_kl = (log_ratio.exp() - 1 - log_ratio).mean().item()

    train = make(model, loss)
    passes = tokens_and_gradients(model)
    metrics = train.step(batch)
    assert passes == [(2, True)]
    assert_same(model.state_dict(), by_hand.state_dict(), rtol=1e-4, atol=1e-5)
    assert metrics.loss == pytest.approx(out.loss.item(), abs=1e-5)
    assert metrics.clip_share == pytest.approx(out.clip_share.item(), abs=1e-6)
    assert metrics.clip_share > 0
    assert metrics.approx_kl == pytest.approx(approx_kl, rel=1e-4)


def test_a_step_that_reads_leaves_them_out_too(model: Any, make: Make, batch: TrainBatch) -> None:
    """No pass at all for the sake of their signals."""
    tap = SignalsConfig(horizon=(2, 6))
    plain = copy.deepcopy(model)
    make(plain).step(batch)
    log_probs, signals = make(copy.deepcopy(model)).log_probs(batch.rollout, tap)
    train = make(model)
    passes = tokens_and_gradients(model)
    step = train.tapped_step(batch, tap, lambda micro, entropy, signals: micro.advantages)
    assert passes == [(2, True)]
    assert_same(model.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)
    mask = batch.rollout.response_mask.clone()
    mask[:2] = False
    torch.testing.assert_close(step.log_probs.logprobs[mask], log_probs.logprobs[mask], rtol=1e-4, atol=1e-5)
    assert step.log_probs.logprobs[~mask].isnan().all()
    assert step.log_probs.entropy[~mask].isnan().all()
    assert step.signals is not None
    assert signals is not None
    assert signals.groups.local.any(dim=1).all()
    for read, expected in ((step.signals.waad, signals.waad), (step.signals.fai, signals.fai)):
        expected[:2] = torch.nan
        torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(step.signals.span[2:], signals.span[2:], rtol=1e-4, atol=1e-4)
    assert step.signals.span[:2].isnan().all()
    for chosen, of_all in (
        (step.signals.groups.local, signals.groups.local),
        (step.signals.groups.global_, signals.groups.global_),
    ):
        assert torch.equal(chosen[2:], of_all[2:])
        assert not chosen[:2].any()


def test_the_optimizer_goes_on_where_no_row_has_an_advantage(model: Any, make: Make, batch: TrainBatch) -> None:
    """As with gradients of 0: weights decay, and AdamW's moments move them on."""
    by_hand = copy.deepcopy(model)
    train, optimizer = make(model), optimizer_of(by_hand)
    train.step(batch)
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        theirs.grad = ours.grad.clone()  # already clipped
    optimizer.step()
    passes = tokens_and_gradients(model)
    metrics = train.step(replace(batch, advantages=torch.zeros_like(batch.advantages)))
    assert passes == [(1, True)]
    for parameter in by_hand.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = copy.deepcopy(by_hand.state_dict())
    optimizer.step()
    assert any(not torch.equal(x, before[name]) for name, x in by_hand.state_dict().items())
    assert_same(model.state_dict(), by_hand.state_dict(), rtol=1e-5, atol=1e-6)
    assert metrics.grad_norm == 0


def test_a_reference_pulls_them_too(model: Any, make: Make, batch: TrainBatch) -> None:
    """Or only measures their distance."""
    pulled, spread = make(model, LossConfig(kl_coef=0.1)), make(model, LossConfig(entropy_coef=0.1))
    measured, referred = make(model), replace(batch, reference_logprobs=torch.full_like(batch.advantages, -3.0))
    passes = tokens_and_gradients(model)
    pulled.step(referred)
    spread.step(batch)
    measured.step(referred)
    assert [rows for rows, _ in passes] == [3, 1, 3, 1, 3, 1]
