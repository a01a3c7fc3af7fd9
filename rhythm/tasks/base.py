"""What a task is, and how the trainer finds one by name.

A task of your own is a class with a pydantic `config_class` and the other members of `Task`. This one asks
for a word backwards:

    class ReverseConfig(BaseModel, extra="forbid", frozen=True):
        length: int = Field(default=6, ge=1, description="letters per word")

    class Reverse:
        config_class = ReverseConfig

        def __init__(self, config: ReverseConfig) -> None:
            rng = random.Random(0)
            words = ["".join(rng.choices("abcdef", k=config.length)) for _ in range(1100)]
            self.train, self.test = words[:1000], words[1000:]

        def prompt(self, instance: str) -> str:
            return f"{instance}>"

        def solution(self, instance: str) -> str:
            return instance[::-1]

        def reward(self, instance: str, response: str) -> Reward:
            correct = response == instance[::-1]
            return Reward(score=float(correct), correct=correct, format_ok=len(response) == len(instance))

In `mypackage/reverse.py` it goes by `mypackage.reverse:Reverse` in a run's configuration; the tasks that come
with rhythm go by the short names of `TASKS`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from pydantic import BaseModel

Instance = TypeVar("Instance")

TASKS: dict[str, str] = {"countdown": "rhythm.tasks.countdown:Countdown"}
"""Short names, and the `module:Class` each stands for."""


@dataclass(frozen=True)
class Reward:
    """The judgement of one response.

    score: what GRPO maximises; correct: what accuracy counts; format_ok: the answer could be read at all. fault:
    why there is no judgement, where the judge raised, missed its deadline, or returned something else than a Reward
    with a finite score; the score is 0 then.
    """

    score: float
    correct: bool
    format_ok: bool
    fault: Literal["late", "raised", "invalid"] | None = None


class Task(Protocol[Instance]):
    """Problems in a fixed train and test set, their text, and the judge of a response.

    Two tasks built from equal configurations hold equal instances, on any machine and in any process.
    """

    config_class: ClassVar[type[BaseModel]]

    @property
    def train(self) -> Sequence[Instance]: ...

    @property
    def test(self) -> Sequence[Instance]:
        """Held out: shares no instance with `train`."""

    def prompt(self, instance: Instance) -> str:
        """What the model reads."""

    def solution(self, instance: Instance) -> str:
        """A response with `reward(instance, response).correct`, for the supervised warm start."""

    def reward(self, instance: Instance, response: str) -> Reward:
        """The judgement of `response`: never raises, whatever the text, and costs little."""


def task_class(name: str) -> type[Any]:
    """The class behind a short name of `TASKS` or behind `module:Class`.

    Raises ValueError for an unknown short name or a class without `config_class`; ImportError and
    AttributeError from the module propagate.
    """
    path = TASKS.get(name, name)
    module, separator, attribute = path.partition(":")
    if not (separator and module and attribute):
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"task is {name!r}: must be one of {sorted(TASKS)}, or 'module:Class'{hint}")
    found = getattr(importlib.import_module(module), attribute)
    if not (isinstance(found, type) and hasattr(found, "config_class")):
        raise ValueError(f"task is {name!r}: must name a class with a config_class (see rhythm.tasks.base)")
    return found


def load_task(name: str, options: Mapping[str, object] | None = None) -> Task[Any]:
    """The task `name`, configured by `options`.

    Raises pydantic.ValidationError (a ValueError) for options that the task does not know or allow.
    """
    found = task_class(name)
    task: Task[Any] = found(found.config_class.model_validate(dict(options or {})))
    return task
