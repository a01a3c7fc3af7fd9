"""Prompts as tokens: which instances fit into the model's context."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel

from rhythm.tasks import Reward, Task
from rhythm.tasks.prompts import encode_prompt

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


def fit_prompts(task: Task[Any], tokenizer: Any, longest: int) -> tuple[Task[Any], int]:
    """The task with the instances whose prompts have at most `longest` tokens, and the tokens of the longest of these;
    what is left out is counted in the log.

    Raises ValueError where none of a set that had some is left, and where a chat template is asked for and the
    tokenizer has none.
    """
    sets = {"training": task.train, "held-out": task.test}
    fitting, most = {}, 0
    for name, instances in sets.items():
        lens = [len(encode_prompt(tokenizer, task.prompt(instance))[1]) for instance in instances]
        fitting[name] = [instance for instance, tokens in zip(instances, lens, strict=True) if tokens <= longest]
        if lens and not fitting[name]:
            raise ValueError(f"no {name} prompt has at most {longest} tokens; the shortest has {min(lens)}")
        most = max([most, *(tokens for tokens in lens if tokens <= longest)])
        if left_out := len(lens) - len(fitting[name]):
            log.warning(
                "%d of %d %s prompts have more than %d tokens, up to %d: left out",
                left_out, len(lens), name, longest, max(lens),
            )  # fmt: skip
    if all(len(fitting[name]) == len(instances) for name, instances in sets.items()):
        return task, most
    return FittedTask(task, fitting["training"], fitting["held-out"]), most
