"""Generates responses to prompts and scores them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rhythm.engines.interfaces import Infer, Rollout, SamplingConfig
from rhythm.seeds import generator
from rhythm.tasks import Reward, Task
from rhythm.tasks.prompts import encode_prompt
from rhythm.tasks.scoring import score_response
from rhythm.trainer.prompts import cut_at_stop


@dataclass(frozen=True)
class ScoredRollout:
    """B responses and their rewards.

    rollout: the responses as tokens; prompts: the prompt text of each response (so a prompt appears once per
    response); responses: their texts; rewards: one per response.
    """

    rollout: Rollout
    prompts: list[str]
    responses: list[str]
    rewards: list[Reward]

    @property
    def scores(self) -> Tensor:
        """The rewards' scores, fp32 [B]."""
        return torch.tensor([r.score for r in self.rewards], device=self.rollout.input_ids.device)

    @property
    def accuracy(self) -> float:
        """Fraction of responses that are correct."""
        return sum(r.correct for r in self.rewards) / len(self.rewards)

    @property
    def format_share(self) -> float:
        """Fraction of responses whose answer could be read."""
        return sum(r.format_ok for r in self.rewards) / len(self.rewards)


def batch_instances(train: Sequence[Any], count: int, *, seed: int, step: int) -> list[Any]:
    """The `count` training instances of `step` (from 1). The steps go through shuffled epochs of the training set.

    The order of epoch e is seeded by (seed, e), so a step's instances do not depend on the steps before it.
    """
    first, end = (step - 1) * count, step * count
    epochs = range(first // len(train), -(-end // len(train)))
    order = {e: torch.randperm(len(train), generator=generator(seed, "order", e)).tolist() for e in epochs}
    return [train[order[at // len(train)][at % len(train)]] for at in range(first, end)]


def roll_out(
    infer: Infer,
    task: Task[Any],
    tokenizer: Any,
    instances: Sequence[Any],
    *,
    responses_per_prompt: int,
    sampling: SamplingConfig,
    seed: int,
) -> ScoredRollout:
    """Generate `responses_per_prompt` responses per instance and score them by the task's reward.

    The reward gets the response text without special tokens. If it raises, or returns anything but a Reward with a
    finite score, that response scores 0 and its Reward names the fault.
    """
    prompts, ids = zip(*(encode_prompt(tokenizer, task.prompt(instance)) for instance in instances), strict=True)
    rollout = cut_at_stop(infer.generate(ids, responses_per_prompt, sampling, seed), tokenizer, sampling.stop)
    rows = zip(rollout.input_ids.tolist(), rollout.response_mask.tolist(), strict=True)
    responses = [
        tokenizer.decode([i for i, inside in zip(ids, mask, strict=True) if inside], skip_special_tokens=True)
        for ids, mask in rows
    ]
    groups = rollout.group.tolist()
    return ScoredRollout(
        rollout=rollout,
        prompts=[prompts[g] for g in groups],
        responses=responses,
        rewards=[
            score_response(task, instances[g], prompts[g], text) for g, text in zip(groups, responses, strict=True)
        ],
    )
