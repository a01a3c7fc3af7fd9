from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from tensors import assert_same

import rhythm
from rhythm.credit.config import CreditConfig
from rhythm.credit.gamma import batch_credit_weights
from rhythm.credit.heads import HeadGroups, select_heads
from rhythm.credit.loss import LossConfig
from rhythm.engines.interfaces import Rollout
from rhythm.engines.local.attn import ObserveAttn
from rhythm.engines.local.train import OptimizerConfig, TorchTrain
from rhythm.ops.arguments import Request
from rhythm.ops.backends.cpu import CpuBackend
from rhythm.tap.signals_config import SignalsConfig

MakeRollout = Callable[..., Rollout]
Grouping = Literal["sequence", "batch", "calibrated"]


def tap(grouping: Grouping = "sequence") -> SignalsConfig:
    return SignalsConfig(layers=2, horizon=(2, 6), window=4, grouping=grouping)


def trainer(model: Any, tokenizer: Any, micro_batch_size: int = 2) -> TorchTrain:
    return TorchTrain(
        model,
        tokenizer,
        optimizer=OptimizerConfig(),
        loss=LossConfig(),
        temperature=1.0,
        micro_batch_size=micro_batch_size,
    )


@pytest.mark.parametrize("grouping", ["sequence", "batch", "calibrated"])
def test_separate_and_inline_give_the_same_gamma(
    model: Any, tokenizer: Any, make_rollout: MakeRollout, grouping: Grouping
) -> None:
    rollout = make_rollout()
    _, inline = trainer(model, tokenizer).log_probs(rollout, tap(grouping))
    separate = ObserveAttn(copy.deepcopy(model), tap(grouping), micro_batch_size=2).signals(rollout)
    assert inline is not None
    assert_same(separate, inline)
    config = CreditConfig(strategy="coupled")
    gammas = [batch_credit_weights(s, rollout.response_mask, config) for s in (separate, inline)]
    assert gammas[0].equal(gammas[1])
    assert (gammas[0] > 1).any()


def test_signals_are_those_of_observe(model: Any, make_rollout: MakeRollout) -> None:
    """Rows in other micro-batches, cut to other widths, put back where they belong."""
    rollout = make_rollout()
    expected = rhythm.observe(
        model,
        rollout.input_ids,
        attention_mask=rollout.attention_mask,
        prompt_lens=rollout.prompt_lens,
        signals=SignalsConfig(layers=rhythm.sampled_layers(3, 2), window=4, horizon=(2, 6)),
    )
    for size in (1, 3, 4):
        actual = ObserveAttn(model, tap(), micro_batch_size=size).signals(rollout)
        assert_same(actual, expected, rtol=1e-5, atol=1e-5)
    assert expected.waad[rollout.response_mask].isfinite().all()


@pytest.mark.parametrize("grouping", ["batch", "calibrated"])
def test_shared_groups_come_from_all_rows(model: Any, make_rollout: MakeRollout, grouping: Grouping) -> None:
    rollout = make_rollout(prompt_lens=(2, 2, 2, 2), response_lens=(20, 15, 10, 5), seed=3)
    own = ObserveAttn(model, tap(), micro_batch_size=1).signals(rollout)
    shared = ObserveAttn(model, tap(grouping), micro_batch_size=1).signals(rollout)
    assert shared.groups.local.equal(select_heads(own.span, 0.3, per="batch").local)
    assert shared.groups.global_.equal(select_heads(own.span, 0.3, per="batch").global_)
    assert not own.groups.local.equal(shared.groups.local) or not own.groups.global_.equal(shared.groups.global_)


def test_fixed_groups_override_the_grouping(model: Any, make_rollout: MakeRollout) -> None:
    rollout = make_rollout()
    heads = ObserveAttn(model, tap(), micro_batch_size=4).signals(rollout).span.shape[1]
    local, global_ = torch.zeros(2, 1, heads, dtype=torch.bool)
    local[0, 1] = global_[0, 2] = True
    fixed = HeadGroups(local=local, global_=global_)
    for grouping in ("sequence", "batch", "calibrated"):
        actual = ObserveAttn(model, tap(grouping), micro_batch_size=2).signals(rollout, fixed)
        assert actual.groups.local.equal(local.expand(4, -1))
        assert actual.groups.global_.equal(global_.expand(4, -1))


def test_it_sees_the_weights_it_was_given(model: Any, make_rollout: MakeRollout) -> None:
    rollout = make_rollout()
    engine = ObserveAttn(copy.deepcopy(model), tap(), micro_batch_size=4)
    before = engine.signals(rollout)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(-2)
    inside = rollout.response_mask
    assert engine.signals(rollout).waad[inside].equal(before.waad[inside])
    engine.update_weights(model.state_dict(), version=1)
    after = engine.signals(rollout)
    assert not after.waad[inside].equal(before.waad[inside])
    assert_same(after, ObserveAttn(model, tap(), micro_batch_size=4).signals(rollout))
    with pytest.raises(ValueError, match="version is 0"):
        engine.update_weights(model.state_dict(), version=0)


@pytest.mark.parametrize("grouping", ["sequence", "batch", "calibrated"])
def test_one_pass_over_the_batch(model: Any, tokenizer: Any, make_rollout: MakeRollout, grouping: Grouping) -> None:
    """The heads of all rows are chosen without a second pass, and the signals are those of these heads held fixed."""
    rollout = make_rollout(prompt_lens=(2, 3, 4, 5), response_lens=(20, 15, 10, 5), seed=3)
    train = trainer(model, tokenizer)  # runs the model on two rows to check its head
    passes: list[int] = []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    separate = ObserveAttn(model, tap(grouping), micro_batch_size=2).signals(rollout)
    _, inline = train.log_probs(rollout, tap(grouping))
    hook.remove()
    assert passes == [2, 2, 2, 2]
    assert inline is not None
    assert_same(separate, inline)
    assert separate.heads == inline.heads == tuple((layer, head) for layer in (1, 2) for head in range(4))
    if grouping != "sequence":
        # As with the groups known beforehand, to the last bit.
        chosen = select_heads(separate.span, 0.3, per="batch")
        fixed = HeadGroups(local=chosen.local[:1], global_=chosen.global_[:1])
        known = ObserveAttn(model, tap(), micro_batch_size=2).signals(rollout, fixed)
        assert_same(separate, replace(known, span=separate.span))


@pytest.mark.parametrize("packed", [False, True])
def test_with_fixed_groups_only_the_middle_micro_batch_is_swept(
    model: Any, tokenizer: Any, make_rollout: MakeRollout, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    """The others by the lse of the model's own attention, which is torch's in sequences of more than 48 tokens."""
    rollout = make_rollout(prompt_lens=(2, 3, 4, 5), response_lens=(80, 60, 70, 50), seed=3)
    train = trainer(model, tokenizer, 1)
    if packed:
        train = TorchTrain(
            model, tokenizer, optimizer=OptimizerConfig(), loss=LossConfig(), temperature=1.0, micro_batch_size=1,
            max_tokens=85,
        )  # fmt: skip
    attn = ObserveAttn(model, tap(), micro_batch_size=1)
    free = attn.signals(rollout)
    chosen = select_heads(free.span, 0.3, per="batch")
    fixed = HeadGroups(local=chosen.local[:1], global_=chosen.global_[:1])
    expected = ObserveAttn(model, tap("batch"), micro_batch_size=1).signals(rollout)
    assert expected.groups.local.equal(chosen.local)
    swept: list[bool] = []
    run = CpuBackend.run

    def noted(self: CpuBackend, request: Request) -> Any:
        swept.append(request.lse_HT is None)
        return run(self, request)

    monkeypatch.setattr(CpuBackend, "run", noted)
    for read in (attn.signals, lambda *given: train.log_probs(given[0], tap("calibrated"), given[1])[1]):
        signals = read(rollout, fixed)
        assert signals is not None
        assert swept == [False] * 4 + [True] * 2 + [False] * 2  # rows 0, 2, 1, 3, with two layers each
        assert_same(signals.waad, expected.waad, atol=1e-5)
        assert_same(signals.fai, expected.fai, atol=1e-5)
        assert signals.span.isfinite().all(dim=1).tolist() == [False, True, False, False]
        assert_same(signals.span[1], free.span[1], rtol=1e-5)
        swept.clear()
