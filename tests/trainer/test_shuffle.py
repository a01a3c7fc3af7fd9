"""Which responses make the mini-batches of a step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rhythm.engines.batches import assemble
from rhythm.engines.interfaces import TrainBatch
from rhythm.trainer.config import TrainConfig
from rhythm.trainer.step import mini_batches

PROMPTS, RESPONSES = 4, 4


@pytest.fixture
def batch() -> TrainBatch:
    group = [prompt for prompt in range(PROMPTS) for _ in range(RESPONSES)]
    rows = range(len(group))
    rollout = assemble(
        [[7]] * len(group), [[row] for row in rows], [[0.0]] * len(group), group=group, finished=[True] * 16, pad_id=0
    )
    return TrainBatch(rollout, torch.zeros(16, 2), torch.zeros(16, 2), None)


def drawn(batch: TrainBatch, config: TrainConfig, step: int) -> list[list[int]]:
    return [part.rollout.input_ids[:, 1].tolist() for part in mini_batches(batch, config, step)]


@pytest.mark.parametrize("shuffle", ["responses", "prompts"])
def test_every_response_is_in_one_mini_batch_of_each_step(
    small_config: Callable[..., TrainConfig], batch: TrainBatch, shuffle: str
) -> None:
    config = small_config(f"batch.shuffle={shuffle}")
    steps = [drawn(batch, config, step) for step in range(6)]
    for parts in steps:
        assert [len(part) for part in parts] == [8, 8]
        assert sorted(row for part in parts for row in part) == list(range(16))
    assert len({str(parts) for parts in steps}) > 3
    assert drawn(batch, config, 3) == steps[3]


def test_the_responses_of_a_prompt_stay_together(small_config: Callable[..., TrainConfig], batch: TrainBatch) -> None:
    def prompts(part: list[int]) -> list[int]:
        return [row // RESPONSES for row in part]

    for step in range(6):
        for part in drawn(batch, small_config("batch.shuffle=prompts"), step):
            first, second = prompts(part)[:RESPONSES], prompts(part)[RESPONSES:]
            assert len({*first}) == len({*second}) == 1
            assert first != second
    assert len({*prompts(drawn(batch, small_config(), 0)[0])}) > 2


@pytest.mark.parametrize(
    ("overrides", "refusal"),
    [
        (
            ("batch.mini_batch_size=2", "batch.micro_batch_size=2", "batch.shuffle=prompts"),
            "mini_batch_size is 2: must be a multiple of responses_per_prompt = 4 where shuffle is prompts",
        ),
        (
            ("batch.share_prompts=true", "cluster.gpus=8"),
            "batch.share_prompts is true: must be false with cluster.train.engine = megatron",
        ),
        (
            ("batch.log_prob_micro_batch_size=64", "cluster.gpus=8"),
            "batch.log_prob_micro_batch_size is 64: must be null with cluster.train.engine = megatron",
        ),
        (
            ("model.gradient_checkpointing=true", "cluster.gpus=8"),
            "model.gradient_checkpointing is true: with cluster.train.engine = megatron it is cluster.train.recompute",
        ),
    ],
)
def test_what_does_not_go_together(
    small_config: Callable[..., TrainConfig], overrides: tuple[str, ...], refusal: str
) -> None:
    with pytest.raises(ValueError, match=refusal):
        small_config(*overrides)
