from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rhythm.credit.loss import LossConfig
from rhythm.engines.interfaces import Rollout, SamplingConfig
from rhythm.engines.local.attn import ObserveAttn
from rhythm.engines.local.infer import GenerateInfer
from rhythm.engines.local.train import OptimizerConfig, TorchTrain
from rhythm.engines.local.weights import LocalWeightSync, load_weights
from rhythm.tap.signals_config import SignalsConfig


def test_weights_are_copied_and_converted(model: Any) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        model.model.norm.weight.fill_(3.0)
    assert load_weights(half, model.state_dict(), 4, 1) == 4
    assert half.model.norm.weight.dtype == torch.bfloat16
    assert (half.model.norm.weight == 3).all()
    with torch.no_grad():
        model.model.norm.weight.fill_(5.0)
    assert (half.model.norm.weight == 3).all()


def test_own_tensors_are_left_alone(model: Any) -> None:
    versions = {name: tensor._version for name, tensor in model.state_dict().items()}
    assert load_weights(model, model.state_dict(), 0, 0) == 0
    assert {name: tensor._version for name, tensor in model.state_dict().items()} == versions


def test_what_is_refused(model: Any) -> None:
    weights = model.state_dict()
    with pytest.raises(ValueError, match=r"version is 1: must not be lower than 2"):
        load_weights(model, weights, 1, 2)
    with pytest.raises(ValueError, match=r"names are not in both .*model\.norm\.weight"):
        load_weights(model, {k: v for k, v in weights.items() if k != "model.norm.weight"}, 1, 0)
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \(3,\)"):
        load_weights(model, weights | {"model.norm.weight": torch.zeros(3)}, 1, 0)


def test_a_sync_gives_the_trainers_weights_to_every_engine(
    model: Any, tokenizer: Any, make_rollout: Callable[..., Rollout]
) -> None:
    train = TorchTrain(
        model, tokenizer, optimizer=OptimizerConfig(), loss=LossConfig(), temperature=1.0, micro_batch_size=4
    )
    infer = GenerateInfer(copy.deepcopy(model), end_ids=[tokenizer.eos_token_id], pad_id=tokenizer.pad_token_id)
    tap = SignalsConfig(layers=2, horizon=(2, 6), backend="reference")
    attn = ObserveAttn(copy.deepcopy(model), tap, micro_batch_size=4)
    sync = LocalWeightSync(train, infer, attn)
    rollout, sampling = make_rollout(), SamplingConfig(max_new_tokens=8, temperature=0)
    before = attn.signals(rollout)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(-2)
    assert attn.signals(rollout).waad.nan_to_num().equal(before.waad.nan_to_num())

    sync.sync(3)
    signals = train.log_probs(rollout, tap)[1]
    assert signals is not None
    assert not signals.waad.nan_to_num().equal(before.waad.nan_to_num())
    assert attn.signals(rollout).waad.nan_to_num().equal(signals.waad.nan_to_num())
    drawn = infer.generate([[1, 10, 20], [1, 30]], 1, sampling, seed=0)
    logprobs = train.log_probs(drawn)[0].logprobs
    inside = drawn.response_mask
    torch.testing.assert_close(drawn.logprobs[inside], logprobs[inside], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="version is 2: must not be lower than 3"):
        sync.sync(2)


def test_the_trainers_weights_come_one_at_a_time_under_the_names_of_its_checkpoint(model: Any, tokenizer: Any) -> None:
    train = TorchTrain(
        model, tokenizer, optimizer=OptimizerConfig(), loss=LossConfig(), temperature=1.0, micro_batch_size=4
    )
    streamed = dict(train.weights_stream())
    assert streamed.keys() == model.state_dict().keys()
    assert all(streamed[name].data_ptr() == tensor.data_ptr() for name, tensor in train.weights().items())
