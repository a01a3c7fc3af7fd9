"""Leaving the GPU between steps: nothing computed afterwards changes, and states really move."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensors import assert_same

from rhythm.credit.loss import LossConfig
from rhythm.engines.interfaces import Rollout, TrainBatch
from rhythm.engines.local.train import OptimizerConfig, TorchTrain
from rhythm.engines.offload import Offloaded


def trainer(model: Any, tokenizer: Any) -> TorchTrain:
    return TorchTrain(
        model, tokenizer, optimizer=OptimizerConfig(lr=1e-3), loss=LossConfig(), temperature=1.0, micro_batch_size=2
    )


@pytest.fixture
def batch(model: Any, tokenizer: Any, make_rollout: Callable[..., Rollout]) -> TrainBatch:
    rollout = make_rollout()
    logprobs = trainer(copy.deepcopy(model), tokenizer).log_probs(rollout)[0].logprobs
    advantages = torch.linspace(-1, 1, len(rollout.lens))[:, None].expand(logprobs.shape)
    return TrainBatch(rollout, logprobs, advantages * rollout.response_mask)


@pytest.mark.parametrize("offload", [False, True])
def test_steps_and_checkpoints_are_those_of_a_trainer_that_stayed(
    model: Any, tokenizer: Any, batch: TrainBatch, tmp_path: Path, offload: bool
) -> None:
    other = copy.deepcopy(model)
    stays, leaves = trainer(model, tokenizer), trainer(other, tokenizer)
    for _ in range(2):
        assert stays.step(batch) == leaves.step(batch)
        assert leaves._offloaded is None  # the states are back
        leaves.leave_gpu(offload=offload)
        leaves.leave_gpu(offload=offload)
        assert all(parameter.grad is None for parameter in other.parameters())
    leaves.save(tmp_path)
    leaves.leave_gpu(offload=offload)
    leaves.load(tmp_path)
    assert stays.step(batch) == leaves.step(batch)
    assert_same(other.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_states_and_masters_move_and_come_back() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.tensor([1.0, 2.0, 3.0])
    optimizer.step()
    state = optimizer.state[weight]
    before = {name: value.clone() for name, value in state.items()}
    moment, address, step = state["exp_avg"], weight.data_ptr(), state["step"]
    away = Offloaded([optimizer], [weight])
    assert state["exp_avg"] is not moment  # nothing of the optimizer's refers to what was on the GPU
    assert weight.data_ptr() != address
    assert state["step"] is step
    away.restore()
    for name, value in before.items():
        assert state[name].equal(value), name
    away.restore()
    optimizer.step()
