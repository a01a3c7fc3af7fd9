"""Computes estimates from a task's scored responses, and counts those that were late, faulty or cut off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rhythm.evaluation.estimators import Estimate, estimates
from rhythm.tasks.base import FaultKind
from rhythm.tasks.scoring import FAULTS


@dataclass(frozen=True)
class ScoredResponse:
    """One response. tokens: its length, its end token included; fault: why it has no reward of its own."""

    problem: int
    correct: bool
    format_ok: bool
    finished: bool
    tokens: int
    fault: str | None = None


@dataclass(frozen=True)
class TaskScores:
    """The results of one task.

    problems: how many; samples: responses to each; correct: of each problem, how many are right; left_out: problems
    whose prompt is too long; the shares and the mean length (tokens) are over responses. faults: responses without a
    reward of their own, which count as wrong; fault_kinds: how many of each kind.
    """

    task: str
    problems: int
    samples: int
    estimates: tuple[Estimate, ...]
    correct: tuple[int, ...]
    left_out: int
    finished_share: float
    format_share: float
    mean_tokens: float
    faults: int
    fault_kinds: dict[FaultKind, int]

    def estimate(self, name: str) -> Estimate:
        """The estimate of this name. Raises KeyError."""
        for estimate in self.estimates:
            if estimate.name == name:
                return estimate
        raise KeyError(name)


def score(
    task: str, responses: Sequence[ScoredResponse], samples: int, ks: Sequence[int], left_out: int = 0
) -> TaskScores:
    """The scores of a task of which every problem has `samples` responses."""
    correct: dict[int, int] = {}
    for response in responses:
        correct[response.problem] = correct.get(response.problem, 0) + response.correct
    counts = tuple(correct[problem] for problem in sorted(correct))
    n = len(responses)

    def share(count: float) -> float:
        return count / n if n else math.nan

    return TaskScores(
        task=task,
        problems=len(counts),
        samples=samples,
        estimates=tuple(estimates(counts, samples, ks)),
        correct=counts,
        left_out=left_out,
        finished_share=share(sum(response.finished for response in responses)),
        format_share=share(sum(response.format_ok for response in responses)),
        mean_tokens=share(sum(response.tokens for response in responses)),
        faults=sum(response.fault is not None for response in responses),
        fault_kinds={kind: sum(response.fault == kind for response in responses) for kind in FAULTS},
    )


def as_metrics(scores: TaskScores) -> dict[str, float]:
    """Metrics for a training step: `aime24/avg@16`, `aime24/pass@16`, …, the number of problems, and how many responses
    have no reward of their own (`aime24/rewards_late`, …).
    """
    named = {f"{scores.task}/{estimate.name}": estimate.value for estimate in scores.estimates}
    faults = {f"{scores.task}/rewards_{kind}": float(count) for kind, count in scores.fault_kinds.items()}
    return {**named, f"{scores.task}/problems": float(scores.problems), **faults}
