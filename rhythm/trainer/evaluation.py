"""Measures held-out accuracy."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from rhythm.engines.interfaces import Infer, SamplingConfig
from rhythm.seeds import derive_seed
from rhythm.tasks import Task
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
