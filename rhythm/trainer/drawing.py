"""Draws and scores the responses of a step, and replaces groups from which nothing can be learned.

Shape suffixes: B responses, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rhythm.credit.overlong import OverlongConfig, overlong_penalty
from rhythm.engines.batches import concatenate, take_rows, trim
from rhythm.engines.interfaces import Infer
from rhythm.seeds import derive_seed
from rhythm.tasks import Task
from rhythm.trainer.config import TrainConfig
from rhythm.trainer.metrics import Record
from rhythm.trainer.rollout import ScoredRollout, batch_instances, roll_out


@dataclass(frozen=True)
class Drawn:
    """The responses of a step.

    Attributes:
        scored: those to train on.
        rewards: fp32 [B], their scores with the overlong penalty.
        metrics: what drawing them took.
    """

    scored: ScoredRollout
    rewards: Tensor
    metrics: Record


def draw(
    infer: Infer,
    task: Task[Any],
    tokenizer: Any,
    config: TrainConfig,
    *,
    step: int,
    stop_asked: Callable[[], bool] = lambda: False,
) -> Drawn:
    """The responses to a step's prompts; with batch.extra_rounds, groups whose rewards all tie are replaced by groups
    of other prompts, in so many rounds at most or until `stop_asked`. What still ties then stays.

    The other prompts come from passes over the training set of their own, one for each round, so that a step's prompts
    and responses are a function of seed, step and weights alone.
    """

    def rolled(prompts: Sequence[Any], *seed_of: str | int) -> ScoredRollout:
        return roll_out(
            infer,
            task,
            tokenizer,
            prompts,
            responses_per_prompt=config.batch.responses_per_prompt,
            sampling=config.sampling,
            seed=derive_seed(config.seed, *seed_of),
        )

    count = config.batch.prompts_per_batch
    scored = rolled(batch_instances(task.train, count, seed=config.seed, step=step), "rollout", step)
    parts = [scored]
    while len(parts) <= config.batch.extra_rounds and not stop_asked():
        ties_G = tied_groups(shaped_rewards(scored, config), scored.rollout.group)
        if not len(ties_G):
            break
        again = len(parts)
        others = batch_instances(task.train, count, seed=derive_seed(config.seed, "extra round", again), step=step)
        parts.append(rolled(others[: len(ties_G)], "rollout", step, again))
        pad_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        scored = replace_groups(scored, ties_G, parts[-1], pad_id)
    rewards_B = shaped_rewards(scored, config)
    return Drawn(scored, rewards_B, _metrics(scored, parts, config))


def shaped_rewards(scored: ScoredRollout, config: TrainConfig) -> Tensor:
    """fp32 [B]: the task's scores, and the penalty of the overlong."""
    return scored.scores + _penalty(scored, config.overlong, config.sampling.max_new_tokens)


def tied_groups(rewards_B: Tensor, group_B: Tensor) -> Tensor:
    """int64, rising: the groups in which all rewards are equal, so that their advantages are 0."""
    groups = torch.unique(group_B)
    apart = [bool((rewards_B[group_B == group] != rewards_B[group_B == group][0]).any()) for group in groups]
    tied: Tensor = groups[~torch.tensor(apart, dtype=torch.bool, device=groups.device)]
    return tied


def zero_variance_share(rewards_B: Tensor, group_B: Tensor) -> float:
    """Share of the groups in which all rewards are equal: their advantages are 0. A group of one is such a group."""
    return len(tied_groups(rewards_B, group_B)) / len(torch.unique(group_B))


def replace_groups(scored: ScoredRollout, groups_G: Tensor, by: ScoredRollout, pad_id: int) -> ScoredRollout:
    """`scored` with the groups of `groups_G` replaced by groups 0, 1, … of `by`, in the places of the old ones."""
    stay_B = ~torch.isin(scored.rollout.group, groups_G)
    kept = take_rows(scored.rollout, stay_B.nonzero()[:, 0])
    joined = concatenate([kept, replace(by.rollout, group=groups_G[by.rollout.group])], pad_id)
    order_B = joined.group.argsort(stable=True)
    rollout = take_rows(joined, order_B)
    old = stay_B.nonzero()[:, 0].tolist()

    def ordered(name: str) -> list[Any]:
        both = [getattr(scored, name)[row] for row in old] + getattr(by, name)
        return [both[row] for row in order_B.tolist()]

    return ScoredRollout(
        rollout=trim(rollout, int(rollout.lens.max())),
        prompts=ordered("prompts"),
        responses=ordered("responses"),
        rewards=ordered("rewards"),
    )


def _penalty(scored: ScoredRollout, config: OverlongConfig, longest: int) -> Tensor:
    """fp32 [B], 0 without one."""
    if config.penalty_tokens is None:
        return torch.zeros_like(scored.scores)
    return overlong_penalty(scored.rollout.response_lens, config.max_tokens or longest, config.penalty_tokens)


def _metrics(scored: ScoredRollout, parts: Sequence[ScoredRollout], config: TrainConfig) -> Record:
    """extra_rounds, and of all responses drawn, those replaced among them: the share of correct ones and of groups that
    tie. Of those to train on: the mean penalty, and the share left out of the loss as overlong.
    """
    ties = sum(len(tied_groups(shaped_rewards(part, config), part.rollout.group)) for part in parts)
    groups = sum(len(torch.unique(part.rollout.group)) for part in parts)
    rewards = [reward for part in parts for reward in part.rewards]
    return {
        "extra_rounds": float(len(parts) - 1),
        "drawn_groups": float(groups),
        "drawn_zero_variance_share": ties / groups,
        "drawn_accuracy": sum(reward.correct for reward in rewards) / len(rewards),
        "overlong_penalty": float(_penalty(scored, config.overlong, config.sampling.max_new_tokens).double().mean()),
        "overlong_masked": float((~scored.rollout.finished).double().mean()) if config.overlong.mask else 0.0,
    }
