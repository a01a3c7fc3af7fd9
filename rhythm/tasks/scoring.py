"""Calls a task's reward function and checks what it returns; a fault costs that response its score, not the run."""

from __future__ import annotations

import logging
import reprlib
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, SupportsFloat

from rhythm.tasks.base import FaultKind, Reward, Task

log = logging.getLogger(__name__)

LARGEST_SCORE = 3.4028234663852886e38  # the largest float32, the type in which advantages are computed

FAULTS: Mapping[FaultKind, str] = {
    "late": "took too long",
    "raised": "raised",
    "memory": "ran out of memory",
    "invalid": "is not valid",
}
"""Kind of fault → what the log says that the reward did."""


class RewardWorkerError(RuntimeError):
    """The process that computes rewards can't be started. Unlike a fault of one reward, this ends the run."""


@dataclass(frozen=True)
class Fault:
    """Why a response has no valid reward; `why` is a message for people."""

    kind: FaultKind
    why: str


def check_reward(returned: object) -> Reward | Fault:
    """`returned` as a Reward of plain Python values, or what is wrong with it: it must be a Reward whose score is a
    finite number and whose correct and format_ok are true or false.
    """
    if not isinstance(returned, Reward):
        return Fault("invalid", f"reward returned {reprlib.repr(returned)}: must be a rhythm.tasks.Reward")
    try:
        score = float(returned.score) if isinstance(returned.score, SupportsFloat) else None
        flags = [bool(flag) if flag in (True, False) else None for flag in (returned.correct, returned.format_ok)]
        fault = returned.fault if returned.fault in (None, *FAULTS) else None
    except Exception as error:  # the values may be of any type, whose methods may raise
        return Fault("invalid", f"reward returned a Reward that can't be read: {type(error).__name__}: {error}")
    if score is None or not abs(score) <= LARGEST_SCORE:  # NaN compares false
        return Fault("invalid", f"score is {reprlib.repr(returned.score)}: must be a finite number")
    correct, format_ok = flags
    if correct is None or format_ok is None:
        return Fault(
            "invalid",
            f"correct is {reprlib.repr(returned.correct)}, format_ok is {reprlib.repr(returned.format_ok)}: "
            "must be True or False",
        )
    return Reward(score, correct, format_ok, fault)


def call_reward(task: Task[Any], instance: Any, response: str) -> Reward | Fault:
    """The task's reward, checked, or the fault if it raised, ran out of memory or returned something invalid.

    Raises KeyboardInterrupt and RewardWorkerError.
    """
    try:
        returned = task.reward(instance, response)
    except (KeyboardInterrupt, RewardWorkerError):
        raise
    except MemoryError as error:  # without its traceback, for which there may be no memory either
        return Fault("memory", repr(error))
    except (Exception, SystemExit):
        return Fault("raised", traceback.format_exc())
    return check_reward(returned)


def reward_or_zero(answer: Reward | Fault, prompt: str, response: str) -> Reward:
    """The Reward itself; a Fault is logged with the prompt and response, shortened, and becomes a score of 0."""
    if isinstance(answer, Reward):
        return answer
    log.warning(
        "a reward %s: its score is 0; prompt %.200r, response %.200r: %s",
        FAULTS[answer.kind],
        prompt,
        response,
        answer.why,
    )
    return Reward(0.0, correct=False, format_ok=False, fault=answer.kind)


def score_response(task: Task[Any], instance: Any, prompt: str, response: str) -> Reward:
    """The reward of `response` to `prompt`: always a valid Reward, whatever the task's reward function does."""
    return reward_or_zero(call_reward(task, instance, response), prompt, response)
