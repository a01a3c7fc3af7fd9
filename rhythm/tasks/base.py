"""The interface of a task, and the lookup of tasks by name.

Your own task is a class with a pydantic `config_class` and the other members of `Task`. This one asks
for a word spelled backwards:

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

If it is in `mypackage/reverse.py`, a run's configuration names it `mypackage.reverse:Reverse`. The tasks included
in rhythm have short names, the keys of `TASKS`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from pydantic import BaseModel

Instance = TypeVar("Instance")

TASKS: dict[str, str] = {
    "countdown": "rhythm.tasks.countdown:Countdown",
    "jsonl": "rhythm.tasks.jsonl:Jsonl",
    "gsm8k": "rhythm.tasks.presets:Gsm8k",
    "dapo_math_17k": "rhythm.tasks.presets:DapoMath",
    "crossthink_qa": "rhythm.tasks.presets:CrossThink",
    "aime24": "rhythm.tasks.presets:Aime24",
    "aime25": "rhythm.tasks.presets:Aime25",
    "amc23": "rhythm.tasks.presets:Amc23",
    "math500": "rhythm.tasks.presets:Math500",
    "olympiadbench": "rhythm.tasks.presets:OlympiadBench",
}
"""Short name → `module:Class`."""
FAMILIES: dict[str, str] = {"reasoning_gym": "rhythm.tasks.reasoning_gym"}
"""First part of names such as `reasoning_gym:chain_sum`, and the module whose attribute the second part is."""


FaultKind = Literal["late", "raised", "memory", "invalid"]


@dataclass(frozen=True)
class Reward:
    """The reward of one response.

    score: what GRPO maximizes; correct: counted by accuracy; format_ok: the answer could be read. fault: set, with a
    score of 0, where the reward function missed its deadline ("late"), raised, ran out of memory, or returned anything
    but a Reward with a finite score ("invalid").
    """

    score: float
    correct: bool
    format_ok: bool
    fault: FaultKind | None = None


class Task(Protocol[Instance]):
    """Problems in a fixed train and test set, their prompts, and the reward of a response.

    Two tasks built from equal configurations must have equal instances, on any machine and in any process.
    """

    config_class: ClassVar[type[BaseModel]]

    @property
    def train(self) -> Sequence[Instance]: ...

    @property
    def test(self) -> Sequence[Instance]:
        """Held-out instances; none is in `train`."""

    def prompt(self, instance: Instance) -> str:
        """The text given to the model."""

    def solution(self, instance: Instance) -> str:
        """A correct response, for the supervised warm start: `reward(instance, solution(instance)).correct` is true."""

    def reward(self, instance: Instance, response: str) -> Reward:
        """The reward of `response`. Must be fast, and must not raise whatever the text."""


def task_class(name: str) -> type[Any]:
    """The class for a short name of `TASKS` or for `module:Class`.

    Raises ValueError for an unknown short name or a class without `config_class`; ImportError and
    AttributeError from the module propagate.
    """
    path = TASKS.get(name, name)
    module, separator, attribute = path.partition(":")
    module = FAMILIES.get(module, module)
    if not (separator and module and attribute):
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"task is {name!r}: must be one of {sorted(TASKS)}, 'reasoning_gym:…', or 'module:Class'{hint}"
        )
    task = getattr(importlib.import_module(module), attribute)
    if not (isinstance(task, type) and hasattr(task, "config_class")):
        raise ValueError(f"task is {name!r}: must name a class with a config_class (see rhythm.tasks.base)")
    return task


def load_task(name: str, options: Mapping[str, object] | None = None) -> Task[Any]:
    """The task `name`, configured by `options`.

    Raises pydantic.ValidationError (a ValueError) for options that the task doesn't have, or values it doesn't allow.
    """
    class_ = task_class(name)
    task: Task[Any] = class_(class_.config_class.model_validate(dict(options or {})))
    return task


def load_for_rewards(name: str, options: Mapping[str, object] | None = None) -> Task[Any]:
    """The task for rewards alone. A class with a `for_rewards(config)` gives what that returns, which needs no
    instances and reads no files; any other is loaded by `load_task`.
    """
    class_ = task_class(name)
    build: Callable[[Any], Task[Any]] = getattr(class_, "for_rewards", class_)
    return build(class_.config_class.model_validate(dict(options or {})))
