"""Held-out accuracy."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from rhythm.engines.interfaces import Infer, SamplingConfig
from rhythm.seeds import derive_seed
from rhythm.tasks import Task
from rhythm.trainer.rollout import ScoredRollout, roll_out


class EvalConfig(BaseModel, extra="forbid", frozen=True):
    """When and how held-out accuracy is measured; always before the first step and after the last."""

    every_steps: int = Field(default=20, ge=1, description="training steps between evaluations")
    instances: int | None = Field(
        default=None, ge=1, description="test instances used, from the first on; null for all"
    )
    temperature: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="of the responses; 0 takes the likeliest token"
    )
    samples: int = Field(
        default=4, ge=0, description="responses written to samples/ with their WAAD, FAI, γ and entropy"
    )


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
    """One response to each test instance, judged; `step` seeds the sampling, where there is any."""
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
