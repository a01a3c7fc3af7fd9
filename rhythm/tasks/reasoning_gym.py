"""Any of reasoning-gym's generators as a task: `reasoning_gym:chain_sum`, `reasoning_gym:gsm_symbolic` …

A response is scored by the generator's own scorer, which sees the answer block alone. Scorers that run the answer as
Python, by `eval` or by sympy, which evaluates what it parses, are refused: a model's answer is hostile input.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from pydantic import Field

from rhythm.system.extras import needs
from rhythm.tasks.answers import Which, find_answer
from rhythm.tasks.base import Reward
from rhythm.tasks.prompts import PromptConfig

UNSAFE = frozenset(
    {
        "binary_matrix",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)
"""Generators whose scorer evaluates the answer as Python code."""
MAX_SIZE = 1_000_000
_DRAWS_PER_INSTANCE = 20


class ReasoningGymConfig(PromptConfig, frozen=True):
    """Which instances there are, and how they are asked."""

    template: str = Field(
        default="{prompt}\nThink step by step, then write the answer alone between <answer> and </answer>.",
        description="what the model is asked; {prompt} stands for the question",
    )
    train_size: int = Field(default=10_000, ge=1, le=MAX_SIZE, description="training instances")
    test_size: int = Field(default=512, ge=1, le=MAX_SIZE, description="held-out instances, none in the training set")
    seed: int = Field(default=0, ge=0, description="seed of the instances")
    parameters: dict[str, Any] = Field(default={}, description="the generator's own parameters, but for size and seed")
    answer_block: Which = Field(
        default="first", description="which answer of a response counts; after the first, models invent new problems"
    )


@dataclass(frozen=True)
class Entry:
    """One instance as reasoning-gym makes it: question, answer, and the generator's notes."""

    question: str
    answer: str
    metadata: Mapping[str, Any]


class ReasoningGym:
    """The task (see `rhythm.tasks.base.Task`); a subclass for each generator is an attribute of this module."""

    config_class: ClassVar[type[ReasoningGymConfig]] = ReasoningGymConfig
    generator: ClassVar[str]

    def __init__(self, config: ReasoningGymConfig) -> None:
        """Draws the instances. Raises ValueError for parameters that the generator doesn't take, and where it has too
        few different questions.
        """
        self._prepare(config)
        entries = self._draw(config.test_size + config.train_size)
        self.test: Sequence[Entry] = entries[: config.test_size]
        self.train: Sequence[Entry] = entries[config.test_size :]

    @classmethod
    def for_rewards(cls, config: ReasoningGymConfig) -> ReasoningGym:
        """The task without instances: all that a reward needs."""
        task = cls.__new__(cls)
        task._prepare(config)
        task.train = task.test = ()
        return task

    def prompt(self, instance: Entry) -> str:
        """What the model reads."""
        return self.config.ask(instance.question)

    def solution(self, instance: Entry) -> str:
        """The answer in a block, after the worked steps where the generator's notes tell of them."""
        worked = _WORKED.get(self.generator, _nothing)(instance)
        return f"{worked}<answer>{instance.answer}</answer>"

    def reward(self, instance: Entry, response: str) -> Reward:
        """The generator's own score, from 0 to 1; correct is a score of 1."""
        answer = find_answer(response, self.config.answer_block)
        if answer is None:
            return Reward(0.0, correct=False, format_ok=False)
        entry = {"question": instance.question, "answer": instance.answer, "metadata": instance.metadata}
        score = float(self._scorer(answer, entry))
        return Reward(score, correct=score >= 1.0, format_ok=True)

    def _prepare(self, config: ReasoningGymConfig) -> None:
        self.config = config
        self._scorer: Callable[[str, dict[str, Any]], float] = self._dataset(seed=0, size=1).score_answer

    def _dataset(self, seed: int, size: int) -> Any:
        from reasoning_gym import create_dataset

        if own := {"seed", "size"} & set(self.config.parameters):
            raise ValueError(f"parameters has {', '.join(sorted(own))}: use seed, train_size and test_size")
        try:
            return create_dataset(self.generator, seed=seed, size=size, **self.config.parameters)
        except (TypeError, AssertionError, ValueError) as error:  # its dataclasses check by assertions
            raise ValueError(f"parameters of {self.generator}: {str(error) or 'not allowed'}") from error

    def _draw(self, wanted: int) -> list[Entry]:
        """So many different questions, in the order drawn; what a question is asked twice with counts once."""
        # Generators seed an instance by seed + index: another seed must not come near. Few take more than 32 bits.
        seed = int(random.Random(self.config.seed).random() * 2**30)
        entries: dict[str, Entry] = {}
        for first in range(seed, seed + _DRAWS_PER_INSTANCE * wanted, wanted):
            dataset = self._dataset(first, wanted)
            for index in range(wanted):
                drawn = dataset[index]
                entry = Entry(drawn["question"], str(drawn["answer"]), drawn["metadata"])
                entries.setdefault(entry.question, entry)
                if len(entries) == wanted:
                    return list(entries.values())
        raise ValueError(
            f"train_size + test_size is {wanted}, but only {len(entries)} different questions of {self.generator} were "
            "found: ask for fewer, or widen its parameters"
        )


def _nothing(entry: Entry) -> str:
    return ""


def _running_sum(entry: Entry) -> str:
    """chain_sum: a line `total + term = new total` for each term."""
    first, *rest = entry.metadata["expression"].split()
    total, lines = int(first), []
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        before, total = total, total + int(term) if operator == "+" else total - int(term)
        lines.append(f"{before} {operator} {term} = {total}\n")
    return "".join(lines)


def _told(entry: Entry) -> str:
    """gsm_symbolic: its own chain of thought, without the answer at its end."""
    return str(entry.metadata["answer_cot"]).rpartition("####")[0]


_WORKED: dict[str, Callable[[Entry], str]] = {"chain_sum": _running_sum, "gsm_symbolic": _told}


def __getattr__(name: str) -> type[ReasoningGym]:
    """The task class of the generator `name`.

    Raises AttributeError for an unknown one, naming the nearest, and for an unsafe one; ModuleNotFoundError, naming the
    extra, without reasoning-gym.
    """
    if name.startswith("_"):
        raise AttributeError(name)
    return _task_class(name)


@cache
def _task_class(name: str) -> type[ReasoningGym]:
    with needs(f"task reasoning_gym:{name}"):
        from reasoning_gym.factory import DATASETS
    if name in UNSAFE:
        raise AttributeError(f"generator {name} evaluates a response as Python code to score it, so it can't be a task")
    if name not in DATASETS or name == "composite":
        near = difflib.get_close_matches(name, DATASETS, n=1)
        raise AttributeError(f"reasoning-gym has no generator {name}{f'; did you mean {near[0]}?' if near else ''}")
    return type(name, (ReasoningGym,), {"generator": name, "__module__": __name__})
