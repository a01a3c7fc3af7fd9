from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensors import assert_same
from transformers import AutoModelForCausalLM, AutoTokenizer

from rhythm.credit.heads import HeadGroups
from rhythm.credit.loss import LossConfig, policy_loss
from rhythm.engines.interfaces import NonFiniteError, Rollout, TrainBatch
from rhythm.engines.local.logprobs import response_logprobs
from rhythm.engines.local.train import OptimizerConfig, TorchTrain
from rhythm.tap.signals_config import SignalsConfig

TAP = SignalsConfig(horizon=(2, 6))
# A large eps makes AdamW's first step smooth in the gradient: without it a rounding error may turn its sign.
OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.1, max_grad_norm=0.5, eps=1e-2)
Make = Callable[..., TorchTrain]


@pytest.fixture
def make(tokenizer: Any) -> Make:
    def make(model: Any, micro_batch_size: int = 2, **options: Any) -> TorchTrain:
        defaults: dict[str, Any] = {"optimizer": OPTIMIZER, "loss": LossConfig(), "temperature": 0.8}
        return TorchTrain(model, tokenizer, micro_batch_size=micro_batch_size, **(defaults | options))

    return make


@pytest.fixture
def batch(model: Any, make_rollout: Callable[..., Rollout]) -> TrainBatch:
    """Off-policy enough for some ratios to be clipped, with advantages of both signs and unequal lengths."""
    rollout = make_rollout()
    with torch.no_grad():
        now = response_logprobs(model, rollout, temperature=0.8, chunk=100).logprobs
    noise = torch.randn(now.shape, generator=torch.Generator().manual_seed(1))
    advantages = torch.tensor([1.2, -0.7, 0.4, -0.9])[:, None].expand(now.shape) * rollout.response_mask
    return TrainBatch(rollout, now + 0.3 * noise, advantages)


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_step_is_the_loss_the_clip_and_adamw(model: Any, make: Make, batch: TrainBatch) -> None:
    """Written out once more: all rows in one pass, plain autograd, torch's own clip and AdamW."""
    by_hand = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-2)
    logits = by_hand(batch.rollout.input_ids, attention_mask=batch.rollout.attention_mask.long()).logits / 0.8
    logprobs = torch.zeros(batch.rollout.input_ids.shape)
    logprobs[:, 1:] = logits.log_softmax(-1)[:, :-1].gather(2, batch.rollout.input_ids[:, 1:, None])[..., 0]
    out = policy_loss(logprobs, batch.old_logprobs, batch.advantages, batch.rollout.response_mask, LossConfig())
    out.loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
    optimizer.step()

    metrics = make(model, micro_batch_size=2).step(batch)
    assert_same(state(model), state(by_hand), rtol=1e-4, atol=1e-5)
    assert metrics.loss == pytest.approx(out.loss.item(), abs=1e-5)
    assert metrics.clip_share == pytest.approx(out.clip_share.item(), abs=1e-6)
    assert 0 < metrics.clip_share < 1
    assert metrics.approx_kl == pytest.approx(out.approx_kl.item(), rel=1e-4)
    assert metrics.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    assert norm > 0.5  # the clip had something to do
    assert math.isnan(metrics.kl)


@pytest.mark.parametrize("loss", [LossConfig(dual_clip=1.25), LossConfig(objective="cispo", clip_low=1)])
def test_a_step_has_the_objective_asked_for(model: Any, make: Make, batch: TrainBatch, loss: LossConfig) -> None:
    by_hand = copy.deepcopy(model).train()
    now = response_logprobs(by_hand, batch.rollout, temperature=0.8, chunk=100).logprobs
    out = policy_loss(now, batch.old_logprobs, batch.advantages, batch.rollout.response_mask, loss)
    out.loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(by_hand.parameters(), math.inf)
    metrics = make(model, micro_batch_size=1, loss=loss).step(batch)
    assert metrics.loss == pytest.approx(out.loss.item(), abs=1e-5)
    assert metrics.clip_share == pytest.approx(out.clip_share.item(), abs=1e-6)
    assert metrics.dual_clip_share == pytest.approx(out.dual_clip_share.item(), abs=1e-6)
    assert (metrics.dual_clip_share > 0) == (loss.dual_clip is not None)
    assert metrics.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    plain = policy_loss(now, batch.old_logprobs, batch.advantages, batch.rollout.response_mask)
    assert metrics.loss != pytest.approx(plain.loss.item(), abs=1e-4)


@pytest.mark.parametrize("normalization", ["sequence", "token", "dr_grpo"])
def test_micro_batches_add_up(model: Any, make: Make, batch: TrainBatch, normalization: Any) -> None:
    loss = LossConfig(normalization=normalization, max_tokens=20)
    one, many = copy.deepcopy(model), copy.deepcopy(model)
    whole = make(one, micro_batch_size=4, loss=loss).step(batch)
    parts = make(many, micro_batch_size=1, loss=loss).step(batch)
    assert whole.loss == pytest.approx(parts.loss, abs=1e-5)
    assert whole.grad_norm == pytest.approx(parts.grad_norm, rel=1e-4)
    assert whole.clip_share == pytest.approx(parts.clip_share, abs=1e-6)
    assert_same(state(one), state(many), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tapped", [False, True])
def test_gradient_checkpointing_keeps_less_and_gives_the_same(
    tapped: bool, model: Any, make: Make, batch: TrainBatch
) -> None:
    """In a plain step, and in one whose forward pass is tapped: the pass that computes activations again is not."""
    batch = replace(batch, old_logprobs=None) if tapped else batch
    kept, signals, models = [], [], []
    for checkpointing in (False, True):
        models.append(copy.deepcopy(model))
        train = make(models[-1], gradient_checkpointing=checkpointing)
        saved: list[int] = []

        def note(x: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            saved.append(x.nbytes)
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            if tapped:
                step = train.tapped_step(batch, TAP, lambda micro, entropy, signals: micro.advantages)
                assert step.signals is not None
                signals.append(step.signals)
            else:
                train.step(batch)
        kept.append(sum(saved))
    assert kept[1] < kept[0] / 2
    # Not bit for bit: rhythm's attention of short rows is not used where the backward pass computes it again.
    assert_same(state(models[0]), state(models[1]), rtol=1e-4, atol=1e-6)
    if tapped:
        torch.testing.assert_close(signals[0].waad, signals[1].waad, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_log_probs_do_not_depend_on_micro_batches(model: Any, make: Make, make_rollout: Callable[..., Rollout]) -> None:
    rollout = make_rollout()
    whole, _ = make(model, micro_batch_size=4).log_probs(rollout)
    parts, _ = make(model, micro_batch_size=1).log_probs(rollout)
    with torch.no_grad():
        expected = response_logprobs(model, rollout, temperature=0.8, chunk=10_000)
    for actual in (whole, parts):
        torch.testing.assert_close(actual.logprobs, expected.logprobs, equal_nan=True, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(actual.entropy, expected.entropy, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_the_tap_leaves_log_probs_as_they_are(model: Any, make: Make, make_rollout: Callable[..., Rollout]) -> None:
    train, rollout = make(model), make_rollout()
    plain, nothing = train.log_probs(rollout)
    tapped, signals = train.log_probs(rollout, TAP)
    assert nothing is None
    assert signals is not None
    inside = rollout.response_mask
    assert tapped.logprobs[inside].equal(plain.logprobs[inside])
    assert signals.entropy is not None
    assert signals.entropy[inside].equal(plain.entropy[inside])
    assert signals.waad[inside].isfinite().all()
    assert signals.waad[~inside].isnan().all()


def test_fixed_groups_are_used(model: Any, make: Make, make_rollout: Callable[..., Rollout]) -> None:
    train, rollout = make(model), make_rollout()
    _, free = train.log_probs(rollout, TAP)
    assert free is not None
    heads = free.span.shape[1]
    first, last = torch.zeros(2, 1, heads, dtype=torch.bool)
    first[0, 0] = last[0, -1] = True
    _, fixed = train.log_probs(rollout, TAP, HeadGroups(local=first, global_=last))
    assert fixed is not None
    assert fixed.groups.local.equal(first.expand(4, -1))
    assert fixed.groups.global_.equal(last.expand(4, -1))
    inside = rollout.response_mask
    assert not fixed.waad[inside].equal(free.waad[inside])


def test_nan_in_the_loss_changes_no_weight(model: Any, make: Make, batch: TrainBatch) -> None:
    train = make(model, micro_batch_size=1)
    train.step(batch)  # so that the optimizer has moments with which it could move
    before = state(model)
    advantages = batch.advantages.clone()
    advantages[1] = math.inf  # a short row: its micro-batch comes after others have left gradients
    broken = TrainBatch(batch.rollout, batch.old_logprobs, advantages)
    with pytest.raises(NonFiniteError, match="the loss is") as caught:
        train.step(broken)
    assert caught.value.batch is broken
    assert_same(state(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_infinite_gradient_changes_no_weight(model: Any, make: Make, batch: TrainBatch) -> None:
    train = make(model)
    before = state(model)
    hook = model.model.layers[0].mlp.up_proj.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteError, match="the gradient norm is"):
        train.step(batch)
    assert_same(state(model), before)
    hook.remove()
    assert math.isfinite(train.step(batch).grad_norm)


def test_learning_rate_rises_then_stays(model: Any, make: Make, batch: TrainBatch) -> None:
    optimizer = OptimizerConfig(lr=0.3, warmup_steps=2)
    assert [optimizer.learning_rate(n) for n in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3])
    train = make(model, optimizer=OptimizerConfig(lr=1e-4, warmup_steps=1))
    assert [train.step(batch).lr for _ in range(3)] == pytest.approx([5e-5, 1e-4, 1e-4])


def test_the_learning_rate_is_applied(model: Any, make: Make, batch: TrainBatch) -> None:
    """AdamW's first step moves each weight with a gradient by the learning rate."""
    before = state(model)
    make(model, optimizer=OptimizerConfig(lr=3e-3, warmup_steps=2)).step(batch)
    moved = (model.state_dict()["model.norm.weight"] - before["model.norm.weight"]).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), rtol=1e-2, atol=0)


def test_what_is_saved_continues_bit_for_bit(model: Any, make: Make, batch: TrainBatch, tmp_path: Path) -> None:
    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=5)
    train = make(model, optimizer=optimizer)
    train.step(batch)
    train.step(batch)
    train.save(tmp_path)
    saved = state(model)
    expected = train.step(batch)

    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    other = make(fresh, optimizer=optimizer)
    other.load(tmp_path)
    assert_same(state(fresh), saved)
    assert repr(other.step(batch)) == repr(expected)
    assert_same(state(fresh), state(model))


def test_the_saved_weights_are_an_ordinary_checkpoint(model: Any, make: Make, tmp_path: Path) -> None:
    make(model).save(tmp_path)
    assert_same(state(AutoModelForCausalLM.from_pretrained(tmp_path)), state(model))
    assert AutoTokenizer.from_pretrained(tmp_path).encode("1+2") == [1, 22, 16, 23]


def test_the_reference_pulls(model: Any, make: Make, batch: TrainBatch) -> None:
    reference = copy.deepcopy(model)
    train = make(model, loss=LossConfig(kl_coef=50.0), reference=reference)
    known = train.reference_log_probs(batch.rollout)
    now, _ = train.log_probs(batch.rollout)
    inside = batch.rollout.response_mask
    assert known[inside].equal(now.logprobs[inside])
    batch = TrainBatch(batch.rollout, batch.old_logprobs, batch.advantages, known)
    first = train.step(batch)
    assert first.kl == pytest.approx(0, abs=1e-6)
    assert train.step(batch).kl > 1e-4
    assert train.reference_log_probs(batch.rollout)[inside].equal(known[inside])


def test_no_reference_no_kl(model: Any, make: Make, make_rollout: Callable[..., Rollout]) -> None:
    with pytest.raises(RuntimeError, match="without a reference"):
        make(model).reference_log_probs(make_rollout())
