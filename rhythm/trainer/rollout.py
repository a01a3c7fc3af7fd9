"""Prompts → judged responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rhythm.engines.interfaces import Infer, Rollout, SamplingConfig
from rhythm.seeds import generator
from rhythm.tasks import Reward, Task
from rhythm.tasks.judging import judge


@dataclass(frozen=True)
class ScoredRollout:
    """Responses and what the task says of them.

    rollout: B responses; prompts: the text each of them answers; responses: their texts; rewards: their
    judgements.
    """

    rollout: Rollout
    prompts: list[str]
    responses: list[str]
    rewards: list[Reward]

    @property
    def scores(self) -> Tensor:
        """fp32 [B]."""
        return torch.tensor([r.score for r in self.rewards], device=self.rollout.input_ids.device)

    @property
    def accuracy(self) -> float:
        """Share of correct responses."""
        return sum(r.correct for r in self.rewards) / len(self.rewards)

    @property
    def format_share(self) -> float:
        """Share of responses whose answer could be read."""
        return sum(r.format_ok for r in self.rewards) / len(self.rewards)


def batch_instances(train: Sequence[Any], count: int, *, seed: int, step: int) -> list[Any]:
    """The `count` training instances of step 1, 2, …: shuffled passes over the whole set, without a gap.

    Pass e is a permutation seeded by (seed, e), so a step's instances do not depend on the steps before it.
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
    """Answers to each instance, judged by the task, which sees their text without special tokens.

    A reward that raises, or returns something else than a Reward with a finite score, is a fault of that one.
    """
    prompts = [task.prompt(instance) for instance in instances]
    rollout = infer.generate([tokenizer.encode(p) for p in prompts], responses_per_prompt, sampling, seed)
    rows = zip(rollout.input_ids.tolist(), rollout.response_mask.tolist(), strict=True)
    responses = [
        tokenizer.decode([i for i, inside in zip(ids, mask, strict=True) if inside], skip_special_tokens=True)
        for ids, mask in rows
    ]
    asked = rollout.group.tolist()
    return ScoredRollout(
        rollout=rollout,
        prompts=[prompts[g] for g in asked],
        responses=responses,
        rewards=[judge(task, instances[g], prompts[g], text) for g, text in zip(asked, responses, strict=True)],
    )
