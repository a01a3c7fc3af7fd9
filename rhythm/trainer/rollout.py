"""Generates responses to prompts and scores them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rhythm.engines.batches import take_rows
from rhythm.engines.interfaces import Infer, Rollout, SamplingConfig
from rhythm.engines.stopping import cut_at_stop, response_texts
from rhythm.seeds import generator
from rhythm.tasks import Reward, Task
from rhythm.tasks.isolation import start_rewards
from rhythm.tasks.prompts import encode_prompt


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
    finite score, that response scores 0 and its Reward names the fault. An isolated task scores the responses that the
    engine hands over while it generates the others.
    """
    prompts, ids = zip(*(encode_prompt(tokenizer, task.prompt(instance)) for instance in instances), strict=True)
    begun = [0] * len(instances)  # responses to each prompt that are being scored
    pending: list[tuple[list[int], list[str], Callable[[], list[Reward]]]] = []

    def score(part: Rollout) -> None:
        groups = part.group.tolist()
        for group in groups:
            begun[group] += 1
        texts = response_texts(cut_at_stop(part, tokenizer, sampling.stop), tokenizer)
        pending.append((groups, texts, start_rewards(task, [instances[group] for group in groups], texts)))

    rollout = infer.generate(ids, responses_per_prompt, sampling, seed, score)
    groups = rollout.group.tolist()
    if rest := [row for row, group in enumerate(groups) if row % responses_per_prompt >= begun[group]]:
        score(take_rows(rollout, torch.tensor(rest)))
    scored: list[list[tuple[str, Reward]]] = [[] for _ in instances]
    for of_groups, texts, rewards in pending:
        for group, text, reward in zip(of_groups, texts, rewards(), strict=True):
            scored[group].append((text, reward))
    return ScoredRollout(
        rollout=cut_at_stop(rollout, tokenizer, sampling.stop),
        prompts=[prompts[group] for group in groups],
        responses=[text for of_prompt in scored for text, _ in of_prompt],
        rewards=[reward for of_prompt in scored for _, reward in of_prompt],
    )
