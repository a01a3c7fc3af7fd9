"""What is known of a task once its responses are judged: estimates, and counts of what went otherwise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rhythm.evaluation.estimators import Estimate, estimates


@dataclass(frozen=True)
class Judged:
    """A response's judgement. tokens: of the response, its end token included; fault: why there is no judgement."""

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
    whose prompt leaves no room for a response; the shares and the mean length (tokens) are over responses.
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

    def estimate(self, name: str) -> Estimate:
        """By its name. Raises KeyError."""
        for each in self.estimates:
            if each.name == name:
                return each
        raise KeyError(name)


def score(task: str, judged: Sequence[Judged], samples: int, ks: Sequence[int], left_out: int = 0) -> TaskScores:
    """The scores of a task of which every problem has `samples` responses."""
    correct: dict[int, int] = {}
    for each in judged:
        correct[each.problem] = correct.get(each.problem, 0) + each.correct
    counts = tuple(correct[problem] for problem in sorted(correct))
    n = len(judged)

    def share(count: float) -> float:
        return count / n if n else math.nan

    return TaskScores(
        task=task,
        problems=len(counts),
        samples=samples,
        estimates=tuple(estimates(counts, samples, ks)),
        correct=counts,
        left_out=left_out,
        finished_share=share(sum(each.finished for each in judged)),
        format_share=share(sum(each.format_ok for each in judged)),
        mean_tokens=share(sum(each.tokens for each in judged)),
        faults=sum(each.fault is not None for each in judged),
    )


def as_metrics(scores: TaskScores) -> dict[str, float]:
    """As numbers of a training step: `aime24/avg@16`, `aime24/pass@16`, …, and of how many problems."""
    named = {f"{scores.task}/{each.name}": each.value for each in scores.estimates}
    return {**named, f"{scores.task}/problems": float(scores.problems)}
