"""Prompts as tokens: which instances fit into the model's context."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel

from rhythm.tasks import Reward, Task
from rhythm.tasks.prompts import PromptLimit, encode_prompt

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FittedTask:
    """A task without the instances whose prompts are too long."""

    config_class: ClassVar[type[BaseModel]] = BaseModel  # of the task within: this one is made from another

    task: Task[Any]
    train: Sequence[Any]
    test: Sequence[Any]

    def prompt(self, instance: Any) -> str:
        """See rhythm.tasks.base.Task."""
        return self.task.prompt(instance)

    def solution(self, instance: Any) -> str:
        """See rhythm.tasks.base.Task."""
        return self.task.solution(instance)

    def reward(self, instance: Any, response: str) -> Reward:
        """See rhythm.tasks.base.Task."""
        return self.task.reward(instance, response)


def fit_prompts(task: Task[Any], tokenizer: Any, limit: PromptLimit) -> tuple[Task[Any], int]:
    """The task with the instances whose prompts keep within `limit`, and the tokens of the longest of these; what is
    left out is counted in the log.

    Raises ValueError, beginning with the setting that is the limit, where none of a set that had some is left, and
    NoChatTemplateError where a chat template is asked for and the tokenizer has none.
    """
    train, most = _fitting(task, tokenizer, limit, task.train, "training")
    test, most_held_out = _fitting(task, tokenizer, limit, task.test, "held-out")
    most = max(most, most_held_out)
    if len(train) == len(task.train) and len(test) == len(task.test):
        return task, most
    return FittedTask(task, train, test), most


def fit_held_out(task: Task[Any], tokenizer: Any, limit: PromptLimit, *, title: str, problems: int | None) -> Task[Any]:
    """The task, which is only evaluated, with those of its first `problems` held-out instances (None: of all) whose
    prompts keep within `limit`; what is left out is counted in the log, under `title`.

    Raises as `fit_prompts` does.
    """
    fitting, _ = _fitting(task, tokenizer, limit, task.test[:problems], "held-out", f"{title}: ")
    return task if len(fitting) == len(task.test) else FittedTask(task, task.train, fitting)


def _fitting(
    task: Task[Any], tokenizer: Any, limit: PromptLimit, instances: Sequence[Any], name: str, logged_as: str = ""
) -> tuple[list[Any], int]:
    """The instances whose prompts keep within `limit`, and the tokens of the longest of these, 0 for none."""
    lens = [len(encode_prompt(tokenizer, task.prompt(instance))[1]) for instance in instances]
    fitting = [instance for instance, tokens in zip(instances, lens, strict=True) if tokens <= limit.longest]
    if lens and not fitting:
        raise ValueError(
            f"{limit.why}: no {name} prompt has at most {limit.longest} tokens; the shortest has {min(lens)}"
        )
    if left_out := len(lens) - len(fitting):
        log.warning(
            "%s%d of %d %s prompts have more than %d tokens, up to %d: left out (%s)",
            logged_as, left_out, len(lens), name, limit.longest, max(lens), limit.why,
        )  # fmt: skip
    return fitting, max([0, *(tokens for tokens in lens if tokens <= limit.longest)])
