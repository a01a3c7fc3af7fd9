"""Held-out accuracy on the run's own task, and pass@1, avg@n and pass@k on others.

Shape suffixes: B responses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field, model_validator

from rhythm.engines.interfaces import Infer, SamplingConfig
from rhythm.evaluation.config import TASKS_ARE, EvalTasks, Plan
from rhythm.evaluation.scores import ScoredResponse, TaskScores, score
from rhythm.seeds import derive_seed
from rhythm.tasks import Task
from rhythm.tasks.isolation import IsolatedTask, RewardConfig
from rhythm.trainer.rollout import ScoredRollout, roll_out


class EvalConfig(BaseModel, extra="forbid", frozen=True):
    """When and how held-out accuracy is measured. It is always measured before the first and after the last step."""

    every_steps: int = Field(default=20, ge=1, description="training steps between evaluations")
    instances: int | None = Field(
        default=None, ge=1, description="evaluate the first so many test instances; null: all"
    )
    temperature: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="sampling temperature; 0: the most likely token (greedy)"
    )
    samples: int = Field(
        default=4,
        ge=0,
        description="responses per evaluation that are written to samples/ with WAAD, FAI, γ and entropy per token",
    )
    rhythm_responses: int = Field(
        default=32,
        ge=0,
        description="responses in which the rhythm is watched (rhythm_* in the metrics); 0: none",
    )
    tasks: EvalTasks = Field(
        default=(),
        description=f"further {TASKS_ARE}; where they name none: one response, and instances and temperature as above",
    )

    @model_validator(mode="after")
    def _can_be_done(self) -> EvalConfig:
        self.plans(SamplingConfig())
        return self

    def plans(self, sampling: SamplingConfig) -> list[Plan]:
        """Of the further tasks; `sampling`: the run's own, but for the temperature."""
        drawn = sampling.model_copy(update={"temperature": self.temperature})
        return [task.resolved(1, None, self.instances, drawn) for task in self.tasks]


@dataclass(frozen=True)
class FurtherTask:
    """A task beside the run's own: how it is evaluated, and the task itself."""

    plan: Plan
    task: Task[Any]


def load_further_tasks(config: EvalConfig, sampling: SamplingConfig) -> list[FurtherTask]:
    """The tasks of `config.tasks`.

    Raises ValueError naming the task for options that it refuses, and where it has no test instances.
    """
    return [FurtherTask(plan, plan.load_task("evaluation.tasks, ")) for plan in config.plans(sampling)]


@contextmanager
def isolated_rewards(tasks: Sequence[FurtherTask], reward: RewardConfig) -> Iterator[list[FurtherTask]]:
    """The same tasks, their rewards computed in processes of their own; until the block is left."""
    with ExitStack() as stack:
        further = []
        for item in tasks:
            name, options = item.plan.task.name, item.plan.task.options.model_dump()
            task = IsolatedTask(item.task, name, options, **reward.model_dump())
            further.append(FurtherTask(item.plan, stack.enter_context(task)))
        yield further


def evaluate_further(
    infer: Infer, tasks: Sequence[FurtherTask], tokenizer: Any, *, seed: int, step: int
) -> list[TaskScores]:
    """The scores of every task, estimated as rhythm-eval does; (seed, task, step) seeds the sampling."""
    scores = []
    for item in tasks:
        plan = item.plan
        scored = roll_out(
            infer,
            item.task,
            tokenizer,
            item.task.test[: plan.problems],
            responses_per_prompt=plan.samples,
            sampling=plan.sampling,
            seed=derive_seed(seed, "evaluation", plan.title, step),
        )
        group_B, rollout = scored.rollout.group.tolist(), scored.rollout
        responses = [
            ScoredResponse(problem, reward.correct, reward.format_ok, finished, tokens, reward.fault)
            for problem, reward, finished, tokens in zip(
                group_B, scored.rewards, rollout.finished.tolist(), rollout.response_lens.tolist(), strict=True
            )
        ]
        scores.append(score(plan.title, responses, plan.samples, plan.ks))
    return scores


def evaluate(
    infer: Infer,
    task: Task[Any],
    tokenizer: Any,
    config: EvalConfig,
    sampling: SamplingConfig,
    *,
    seed: int,
    step: int,
) -> ScoredRollout:
    """One scored response per test instance. `step` seeds the sampling if the temperature is positive."""
    instances = task.test[: config.instances]
    return roll_out(
        infer,
        task,
        tokenizer,
        instances,
        responses_per_prompt=1,
        sampling=sampling.model_copy(update={"temperature": config.temperature}),
        seed=derive_seed(seed, "evaluation", step),
    )
