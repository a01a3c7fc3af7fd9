"""Asking a task for a reward: what it answers is checked, and a fault is that reward's alone, not the run's."""

from __future__ import annotations

import logging
import reprlib
import traceback
from dataclasses import dataclass
from typing import Any, Literal, SupportsFloat

from rhythm.tasks.base import Reward, Task

log = logging.getLogger(__name__)

LARGEST_SCORE = 3.4028234663852886e38  # of float32, in which advantages are computed

_HAPPENED = {"late": "took too long", "raised": "raised", "invalid": "is no judgement"}


class JudgeError(RuntimeError):
    """There is no judge to ask: the end of the run, unlike a fault of one reward."""


@dataclass(frozen=True)
class Fault:
    """Why there is no judgement of a response; `why` is for people to read."""

    kind: Literal["late", "raised", "invalid"]
    why: str


def checked(found: object) -> Reward | Fault:
    """`found` as a Reward of plain Python values, or what is wrong with it: it must be a Reward, its score a finite
    number, correct and format_ok true or false.
    """
    if not isinstance(found, Reward):
        return Fault("invalid", f"reward returned {reprlib.repr(found)}: must be a rhythm.tasks.Reward")
    try:
        score = float(found.score) if isinstance(found.score, SupportsFloat) else None
        flags = [bool(flag) if flag in (True, False) else None for flag in (found.correct, found.format_ok)]
        fault = found.fault if found.fault in (None, *_HAPPENED) else None
    except Exception as error:  # whatever a judge's own types do when they are looked at
        return Fault("invalid", f"reward returned a Reward that can't be read: {type(error).__name__}: {error}")
    if score is None or not abs(score) <= LARGEST_SCORE:  # NaN compares false
        return Fault("invalid", f"score is {reprlib.repr(found.score)}: must be a finite number")
    correct, format_ok = flags
    if correct is None or format_ok is None:
        return Fault(
            "invalid",
            f"correct is {reprlib.repr(found.correct)}, format_ok {reprlib.repr(found.format_ok)}: "
            "must be True or False",
        )
    return Reward(score, correct, format_ok, fault)


def ask(task: Task[Any], instance: Any, response: str) -> Reward | Fault:
    """The task's checked judgement, or the fault where it raised or made none.

    Raises KeyboardInterrupt and JudgeError.
    """
    try:
        found = task.reward(instance, response)
    except (KeyboardInterrupt, JudgeError):
        raise
    except (Exception, SystemExit):
        return Fault("raised", traceback.format_exc())
    return checked(found)


def settled(answer: Reward | Fault, prompt: str, response: str) -> Reward:
    """The judgement; a fault is logged with its prompt and response, shortened, and is a score of 0."""
    if isinstance(answer, Reward):
        return answer
    log.warning(
        "a reward %s: its score is 0; prompt %.200r, response %.200r: %s",
        _HAPPENED[answer.kind],
        prompt,
        response,
        answer.why,
    )
    return Reward(0.0, correct=False, format_ok=False, fault=answer.kind)


def judge(task: Task[Any], instance: Any, prompt: str, response: str) -> Reward:
    """The judgement of `response` to `prompt`; whatever the task's reward does, a Reward that can be trained on."""
    return settled(ask(task, instance, response), prompt, response)
