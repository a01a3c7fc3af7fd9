from __future__ import annotations

from collections.abc import Callable

import torch

from rhythm.engines.batches import micro_batches, take_rows, trim
from rhythm.engines.interfaces import Rollout, TrainBatch


def test_take_rows_reaches_every_field(make_rollout: Callable[..., Rollout]) -> None:
    rollout = make_rollout()
    values = torch.arange(rollout.input_ids.numel(), dtype=torch.float32).reshape(rollout.input_ids.shape)
    batch = TrainBatch(rollout, values, -values)
    result = take_rows(batch, torch.tensor([2, 0]))
    assert result.old_logprobs.equal(values[[2, 0]])
    assert result.advantages.equal(-values[[2, 0]])
    assert result.rollout.input_ids.equal(rollout.input_ids[[2, 0]])
    assert result.rollout.prompt_lens.tolist() == [1, 4]
    assert result.rollout.group.tolist() == [1, 0]
    assert result.reference_logprobs is None


def test_trim_cuts_positions_only(make_rollout: Callable[..., Rollout]) -> None:
    rollout = make_rollout()  # 16, 10, 21 and 6 tokens
    batch = TrainBatch(rollout, rollout.logprobs, rollout.logprobs, rollout.logprobs + 1)
    result = trim(take_rows(batch, torch.tensor([1, 3])), 10)
    assert result.rollout.input_ids.equal(rollout.input_ids[[1, 3], :10])
    assert result.reference_logprobs is not None
    assert result.reference_logprobs.shape == (2, 10)
    assert result.rollout.prompt_lens.tolist() == [7, 5]


def test_micro_batches_are_of_about_equal_length(make_rollout: Callable[..., Rollout]) -> None:
    result = [(index.tolist(), width) for index, width in micro_batches(make_rollout(), 3)]
    assert result == [([2, 0, 1], 21), ([3], 6)]
    equal = make_rollout(prompt_lens=(2, 2, 2), response_lens=(3, 3, 3))
    assert [(index.tolist(), width) for index, width in micro_batches(equal, 2)] == [([0, 1], 5), ([2], 5)]
