"""Micro-batches by a budget of tokens, and prompts that go through the model once: the step, the log-probs and the
signals stay the same.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tensors import assert_same
from torch import Tensor

from rhythm.credit.config import CreditConfig
from rhythm.credit.gamma import batch_credit_weights
from rhythm.credit.heads import sampled_layers
from rhythm.credit.loss import LossConfig
from rhythm.credit.signals import RhythmSignals
from rhythm.engines.interfaces import Rollout, TrainBatch
from rhythm.engines.local.attn import ObserveAttn
from rhythm.engines.local.train import CHECKED_EVERY, OptimizerConfig, TorchTrain
from rhythm.tap.signals_config import SignalsConfig

TAP = SignalsConfig(horizon=(2, 6))
LENS = ((4, 4, 7, 7, 2, 2), (12, 3, 20, 1, 9, 9))
BUDGETS = [28, 48, 1000]  # of 80 tokens: three micro-batches, two, one
PACKED = [  # and the tokens that go through the model in each pass: 67 where no prompt does twice
    ({"max_tokens": 28}, [27, 27, 26]),
    ({"max_tokens": 48}, [43, 37]),
    ({"max_tokens": 1000}, [80]),
    ({"share_prompts": True}, [19, 28, 20]),
    ({"share_prompts": True, "max_tokens": 48}, [19, 27, 28]),
    ({"share_prompts": True, "max_tokens": 1000}, [67]),
]
OPTIONS = [options for options, _ in PACKED]
Options = dict[str, Any]
Parts = list[tuple[int, int]]


def make(model: Any, tokenizer: Any, loss: LossConfig | None = None, **packed: Any) -> TorchTrain:
    return TorchTrain(
        model,
        tokenizer,
        # A large eps makes AdamW's first step smooth in the gradient: without it a rounding error may turn its sign.
        optimizer=OptimizerConfig(lr=1e-2, max_grad_norm=0.5, eps=1e-2),
        loss=loss or LossConfig(),
        temperature=0.8,
        micro_batch_size=2,
        reference=copy.deepcopy(model),
        **packed,
    )


def watched(model: Any) -> Parts:
    """The shapes of input_ids in each forward pass from here on."""
    seen: Parts = []
    model.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return seen


@pytest.fixture
def rollout(make_rollout: Callable[..., Rollout]) -> Rollout:
    """Two responses to each prompt, whatever the order of their lengths."""
    rollout = make_rollout(*LENS)
    prompt_BT = torch.arange(rollout.input_ids.shape[1]) < rollout.prompt_lens[:, None]
    first_B = 2 * rollout.group
    return replace(rollout, input_ids=torch.where(prompt_BT, rollout.input_ids[first_B], rollout.input_ids))


def make_batch(rollout: Rollout, old: Tensor, reference: Tensor | None = None) -> TrainBatch:
    """Off-policy enough for some ratios to be clipped, with advantages of both signs."""
    random = torch.Generator().manual_seed(1)
    noise = torch.randn(old.shape, generator=random)
    return TrainBatch(rollout, old + 0.3 * noise, torch.randn(old.shape, generator=random), reference)


@pytest.mark.parametrize("normalization", ["sequence", "token", "dr_grpo"])
@pytest.mark.parametrize(("packed", "tokens"), PACKED)
def test_a_step_is_that_of_micro_batches_by_rows(
    model: Any, tokenizer: Any, rollout: Rollout, packed: Options, tokens: list[int], normalization: Any
) -> None:
    loss = LossConfig(normalization=normalization, max_tokens=20, kl_coef=0.1, entropy_coef=0.01)
    packed_model = copy.deepcopy(model)
    by_rows, engine = make(model, tokenizer, loss), make(packed_model, tokenizer, loss, **packed)
    batch = make_batch(rollout, by_rows.log_probs(rollout)[0].logprobs, by_rows.reference_log_probs(rollout))
    passes = watched(packed_model)
    expected, actual = by_rows.step(batch), engine.step(batch)
    assert passes == [(1, of) for of in tokens]
    assert 0 < expected.clip_share < 1
    for name, value in vars(expected).items():
        assert getattr(actual, name) == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert_same(packed_model.state_dict(), model.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", OPTIONS)
def test_log_probs_are_those_of_micro_batches_by_rows(
    model: Any, tokenizer: Any, rollout: Rollout, packed: Options
) -> None:
    by_rows, engine = make(model, tokenizer), make(copy.deepcopy(model), tokenizer, **packed)
    expected, actual = by_rows.log_probs(rollout)[0], engine.log_probs(rollout)[0]
    torch.testing.assert_close(actual.logprobs, expected.logprobs, equal_nan=True, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.entropy, expected.entropy, equal_nan=True, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        engine.reference_log_probs(rollout), expected.logprobs, equal_nan=True, rtol=1e-4, atol=1e-5
    )


def test_passes_without_gradients_have_micro_batches_of_their_own(model: Any, tokenizer: Any, rollout: Rollout) -> None:
    engine = make(model, tokenizer, log_prob_micro_batch_size=4)
    passes = watched(model)
    old = engine.log_probs(rollout)[0].logprobs
    assert [rows for rows, _ in passes] == [4, 2]
    passes.clear()
    engine.step(make_batch(rollout, old))
    assert [rows for rows, _ in passes] == [2, 2, 2]


def test_one_of_many_taps_checks_the_attentions_output(
    model: Any, tokenizer: Any, rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks: list[int] = []
    monkeypatch.setattr("rhythm.tap.attention_tap.check_output", lambda call, *_, **__: checks.append(call.layer))
    engine = make(model, tokenizer)  # three micro-batches to a pass
    layers = sampled_layers(model.config.num_hidden_layers)
    engine.log_probs(rollout, TAP)
    assert checks == layers
    for _ in range(CHECKED_EVERY // 3):
        engine.log_probs(rollout, TAP)
    assert checks == 2 * layers


def assert_same_signals(actual: RhythmSignals | None, expected: RhythmSignals | None, mask: Tensor) -> None:
    assert actual is not None
    assert expected is not None
    assert actual.groups.local.equal(expected.groups.local)
    assert actual.groups.global_.equal(expected.groups.global_)
    for name in ("span", "waad", "fai"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), equal_nan=True, rtol=1e-4, atol=1e-4)
    credit = CreditConfig(strategy="coupled")
    gamma = batch_credit_weights(actual, mask, credit)
    assert gamma[mask].unique().numel() > 1
    assert gamma.equal(batch_credit_weights(expected, mask, credit))


@pytest.mark.parametrize("packed", OPTIONS)
@pytest.mark.parametrize("grouping", ["sequence", "batch", "calibrated"])
def test_inline_signals_and_gamma(model: Any, tokenizer: Any, rollout: Rollout, grouping: Any, packed: Options) -> None:
    tap = TAP.model_copy(update={"grouping": grouping})
    expected = make(model, tokenizer).log_probs(rollout, tap)[1]
    engine = make(copy.deepcopy(model), tokenizer, **packed)
    assert_same_signals(engine.log_probs(rollout, tap)[1], expected, rollout.response_mask)
    assert engine.statistics_seconds > 0


@pytest.mark.parametrize("max_tokens", BUDGETS)
def test_signals_of_a_pass_of_their_own(model: Any, rollout: Rollout, max_tokens: int) -> None:
    """These rows are padded, and the padding counts."""
    expected = ObserveAttn(copy.deepcopy(model), TAP, micro_batch_size=2).signals(rollout)
    passes = watched(model)
    actual = ObserveAttn(model, TAP, micro_batch_size=2, max_tokens=max_tokens).signals(rollout)
    assert len(passes) > 1 or max_tokens == 1000
    assert all(rows * width <= max_tokens for rows, width in passes)
    assert_same_signals(actual, expected, rollout.response_mask)


@pytest.mark.parametrize("packed", OPTIONS)
def test_gamma_of_the_training_pass(model: Any, tokenizer: Any, rollout: Rollout, packed: Options) -> None:
    """tap → γ → loss in one pass over packed rows, against signals of the pass before it."""
    credit = CreditConfig(strategy="coupled")
    packed_model = copy.deepcopy(model)
    by_rows, engine = make(model, tokenizer), make(packed_model, tokenizer, **packed)
    log_probs, signals = by_rows.log_probs(rollout, TAP)
    batch = make_batch(rollout, log_probs.logprobs)
    gamma = batch_credit_weights(signals, rollout.response_mask, credit, entropy=log_probs.entropy)
    expected = by_rows.step(replace(batch, advantages=batch.advantages * gamma))

    def shape(micro: TrainBatch, entropy: Tensor, own: RhythmSignals | None) -> Tensor:
        return micro.advantages * batch_credit_weights(own, micro.rollout.response_mask, credit, entropy=entropy)

    taken = engine.tapped_step(batch, TAP, shape)
    assert_same_signals(taken.signals, signals, rollout.response_mask)
    torch.testing.assert_close(taken.log_probs.logprobs, log_probs.logprobs, equal_nan=True, rtol=1e-4, atol=1e-5)
    assert taken.metrics.loss == pytest.approx(expected.loss, abs=1e-5)
    assert taken.metrics.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    assert_same(packed_model.state_dict(), model.state_dict(), rtol=1e-4, atol=1e-5)


def test_a_model_whose_rows_mix_is_padded_and_the_padding_counts(
    model: Any, tokenizer: Any, rollout: Rollout, caplog: pytest.LogCaptureFixture
) -> None:
    model.gradient_checkpointing_enable()
    by_rows = make(copy.deepcopy(model), tokenizer)
    with caplog.at_level(logging.WARNING):
        padded = make(model, tokenizer, max_tokens=40)
    assert "rows are padded, and the padding counts in max_tokens" in caplog.text
    passes = watched(model)
    assert padded.step(make_batch(rollout, by_rows.log_probs(rollout)[0].logprobs)).loss == pytest.approx(
        by_rows.step(make_batch(rollout, by_rows.log_probs(rollout)[0].logprobs)).loss, abs=1e-5
    )
    assert max(rows for rows, _ in passes) > 1
    assert all(rows * width <= 40 for rows, width in passes)


def test_a_row_beyond_the_budget_is_refused(model: Any, tokenizer: Any, rollout: Rollout) -> None:
    with pytest.raises(ValueError, match="max_tokens is 20: a row has 27 tokens"):
        make(model, tokenizer, max_tokens=20).log_probs(rollout)


def test_prompts_are_shared_where_the_loss_leaves_out_responses(model: Any, tokenizer: Any, rollout: Rollout) -> None:
    counted = (
        rollout.response_mask & (torch.arange(6) % 3 > 0)[:, None]
    )  # not the first of one prompt, nor the last of another
    batch = make_batch(replace(rollout, response_mask=counted), torch.full(rollout.input_ids.shape, -3.0))
    by_rows, engine = make(copy.deepcopy(model), tokenizer), make(model, tokenizer, share_prompts=True)
    expected, actual = by_rows.step(batch), engine.step(batch)
    assert actual.grad_norm > 0
    assert actual.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)


def test_rows_of_a_group_with_other_prompts_are_refused(model: Any, tokenizer: Any, rollout: Rollout) -> None:
    rollout.input_ids[1, 2] += 1
    with pytest.raises(ValueError, match=r"rollout\.group: rows of the same group have different prompts"):
        make(model, tokenizer, share_prompts=True).log_probs(rollout)
    rollout.input_ids[1, 2] -= 1
    rollout.prompt_lens[1] -= 1
    with pytest.raises(ValueError, match="different prompts"):
        make(model, tokenizer, share_prompts=True).log_probs(rollout)
