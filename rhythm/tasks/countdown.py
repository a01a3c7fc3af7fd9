"""Countdown: combine all the given numbers with + - * / to make the target (TinyZero's protocol).

Prompts and responses have one of two formats:

`answer`, for language models: an English prompt, in words of our own or TinyZero's, and a response that ends in
`<answer>(25-3)*4</answer>`.

`steps`, for a model with a million parameters that has never seen English. Prompt `25,3,4>88:`, response
`25-3=22,22*4=88`: each step combines two numbers that are still unused, either given or the result of an
earlier step; the last step makes the target. All its numbers are non-negative integers.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from rhythm.tasks import expression
from rhythm.tasks.answers import Which, find_tagged
from rhythm.tasks.base import Reward
from rhythm.tasks.prompts import PromptConfig

_OPEN, _CLOSE = "<answer>", "</answer>"
_STEP = re.compile(r"(0|[1-9][0-9]*)([-+*/])(0|[1-9][0-9]*)=(0|[1-9][0-9]*)")
_DRAWS_PER_INSTANCE = 50
MAX_SIZE = 1_000_000
"""Largest training or test set. All instances are drawn before the run begins, which takes a minute at this size."""


# Question, and what stands before and after it where no chat template does. {numbers} and {target} are filled in.
_WORDINGS = {
    "rhythm": (
        "Make {target} from the numbers {numbers}: use each of them exactly once, with +, -, *, / and brackets. Think "
        "between <think> and </think>, then write the expression alone between <answer> and </answer>, for example "
        "<answer>(1 + 2) / 3</answer>.",
        "",
        "\n<think>",
    ),
    "tinyzero": (
        "Using the numbers [{numbers}], create an equation that equals {target}. You can use basic arithmetic "
        "operations (+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags. And "
        "return the final answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>.",
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
        "assistant first thinks about the reasoning process in the mind and then provides the user with the answer.\n"
        "User: ",
        "\nAssistant: Let me solve this step by step.\n<think>",
    ),
}


class CountdownConfig(PromptConfig, frozen=True):
    """Which instances are drawn, and how they are written and scored."""

    train_size: int = Field(default=20_000, ge=1, le=MAX_SIZE, description="training instances")
    test_size: int = Field(default=512, ge=1, le=MAX_SIZE, description="held-out instances, none in the training set")
    seed: int = Field(default=0, ge=0, description="seed of the instances")
    numbers: int | tuple[int, int] = Field(
        default=4, description="how many numbers each instance has: a count, or [fewest, most]"
    )
    max_number: int = Field(default=99, ge=1, description="largest given number; the smallest is 1")
    max_target: int = Field(default=100, ge=1, description="largest target; the smallest is 1")
    format: Literal["answer", "steps"] = Field(
        default="answer", description="format of prompts and responses: answer (language models), steps (tiny model)"
    )
    wording: Literal["rhythm", "tinyzero"] = Field(
        default="rhythm", description="words of the prompt in format answer: our own, or those of TinyZero"
    )
    format_score: float = Field(
        default=0.0, ge=0, lt=1, description="score of a wrong answer in the right format (0.1 in TinyZero)"
    )
    answer_block: Which = Field(
        default="first",
        description="which <answer> of a response counts in format answer; after the first, models invent new problems",
    )

    @model_validator(mode="after")
    def _check_numbers(self) -> CountdownConfig:
        fewest, most = self.counts
        if not 2 <= fewest <= most <= 8:
            raise ValueError(f"numbers is {self.numbers}: must be a count from 2 to 8, or [fewest, most] in that range")
        return self

    @property
    def counts(self) -> tuple[int, int]:
        """(fewest, most) numbers in an instance."""
        return (self.numbers, self.numbers) if isinstance(self.numbers, int) else self.numbers


@dataclass(frozen=True)
class Step:
    """One equation, `left operator right = result`, between whole numbers."""

    left: int
    operator: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left}{self.operator}{self.right}={self.result}"


@dataclass(frozen=True)
class CountdownInstance:
    """The numbers in the order shown, the target, and one solution, which has one step fewer than there are numbers."""

    numbers: tuple[int, ...]
    target: int
    solution: tuple[Step, ...]


class Countdown:
    """The task (see `rhythm.tasks.base.Task`)."""

    config_class: ClassVar[type[BaseModel]] = CountdownConfig

    def __init__(self, config: CountdownConfig) -> None:
        """Draws the instances. Raises ValueError where too few different ones are found."""
        self.config = config
        instances = make_instances(config)
        self.test: Sequence[CountdownInstance] = instances[: config.test_size]
        self.train: Sequence[CountdownInstance] = instances[config.test_size :]

    def prompt(self, instance: CountdownInstance) -> str:
        """The numbers and the target, in the configured format and words; with `chat` for the model's chat template."""
        if self.config.format == "steps":
            return self.config.ask(f"{','.join(map(str, instance.numbers))}>{instance.target}:")
        question, before, after = _WORDINGS[self.config.wording]
        numbers = ", ".join(map(str, instance.numbers))
        prompt = self.config.ask(question.format(numbers=numbers, target=instance.target))
        return prompt if self.config.chat else f"{before}{prompt}{after}"

    def solution(self, instance: CountdownInstance) -> str:
        """The instance's own solution as a response."""
        steps = ",".join(map(str, instance.solution))
        if self.config.format == "steps":
            return steps
        return f"{steps}</think>\n{_OPEN}{as_expression(instance)}{_CLOSE}"

    def reward(self, instance: CountdownInstance, response: str) -> Reward:
        """1 for a right answer, `format_score` for a wrong one that can be read, else 0. Never raises."""
        if self.config.format == "steps":
            readable, correct = grade_steps(instance, response)
        else:
            readable, correct = grade_answer(instance, response, self.config.answer_block)
        return Reward(1.0 if correct else self.config.format_score * readable, correct, readable)


def grade_answer(instance: CountdownInstance, response: str, which: Which = "first") -> tuple[bool, bool]:
    """(readable, correct) for the first or last `<answer>…</answer>` outside the thoughts of the response.

    `last` is TinyZero's rule, which looks for it on the last line only. Takes time linear in the response's length.
    """
    answer = find_tagged(response, which)
    if answer is None:
        return False, False
    try:
        parsed = expression.parse(answer)
        used_once = sorted(parsed.literals) == sorted(instance.numbers)
        return True, used_once and parsed.value() == instance.target
    except expression.ExpressionError:
        return False, False


def grade_steps(instance: CountdownInstance, response: str) -> tuple[bool, bool]:
    """(readable, correct) for a response of comma-separated steps.

    Readable: one step fewer than there are numbers, each of the form `a+b=c`. Correct: each equation is true and uses
    numbers that are still unused, and the last result is the target.
    """
    if len(response) > expression.MAX_LENGTH:
        return False, False
    matches = [_STEP.fullmatch(part) for part in response.split(",")]
    if len(matches) != len(instance.numbers) - 1 or None in matches:
        return False, False
    unused = list(instance.numbers)
    result = None
    for match in matches:
        assert match is not None
        left, right, result = int(match[1]), int(match[3]), int(match[4])
        for number in (left, right):
            if number not in unused:
                return True, False
            unused.remove(number)
        if not _holds(left, match[2], right, result):
            return True, False
        unused.append(result)
    return True, result == instance.target


def _holds(left: int, operator: str, right: int, result: int) -> bool:
    if operator == "/" and right == 0:
        return False
    return expression.apply(Fraction(left), operator, Fraction(right)) == result


def as_expression(instance: CountdownInstance) -> str:
    """The instance's solution as one expression, with every compound operand in brackets: `(25-3)*4`."""
    texts = [(number, str(number)) for number in instance.numbers]
    for step in instance.solution:
        operands = []
        for value in (step.left, step.right):
            operand = next(pair for pair in texts if pair[0] == value)
            texts.remove(operand)
            operands.append(operand[1] if operand[1].isdigit() else f"({operand[1]})")
        texts.append((step.result, step.operator.join(operands)))
    return texts[0][1]


def make_instances(config: CountdownConfig) -> tuple[CountdownInstance, ...]:
    """`test_size + train_size` instances, no two with the same numbers (in any order) and target.

    They are shuffled after drawing: instances with many solutions tend to be drawn early, so splitting in drawing
    order would not be a random split. Raises ValueError where too few are found.
    """
    # Only Random.random() is guaranteed to return the same sequence in every version of Python.
    rng = random.Random(config.seed)
    wanted = config.test_size + config.train_size
    instances: dict[tuple[tuple[int, ...], int], CountdownInstance] = {}
    for _ in range(_DRAWS_PER_INSTANCE * min(wanted, _most_instances(config))):
        instance = _draw(rng, config)
        if instance is not None:
            instances.setdefault((tuple(sorted(instance.numbers)), instance.target), instance)
            if len(instances) == wanted:
                return _shuffled(rng, list(instances.values()))
    raise ValueError(
        f"train_size + test_size is {wanted}, but only {len(instances)} different instances were found with "
        f"numbers={config.numbers}, max_number={config.max_number}, max_target={config.max_target}: ask for "
        "fewer, or increase these limits"
    )


def _most_instances(config: CountdownConfig) -> int:
    """No more instances than this are different from each other: n numbers in any order, each with one of
    C(n, 2) · 4 · C(n − 1, 2) · 4 · … results, and no more than max_target.
    """
    most = 0
    for count in range(config.counts[0], config.counts[1] + 1):
        results = math.prod(4 * math.comb(left, 2) for left in range(2, count + 1))
        most += math.comb(config.max_number + count - 1, count) * min(config.max_target, results)
    return most


def _draw(rng: random.Random, config: CountdownConfig) -> CountdownInstance | None:
    """Random numbers, combined in a random order; None where the result exceeds max_target."""
    fewest, most = config.counts
    count = fewest + _below(rng, most - fewest + 1)
    numbers = tuple(1 + _below(rng, config.max_number) for _ in range(count))
    pool = list(numbers)
    steps = []
    while len(pool) > 1:
        right = pool.pop(_below(rng, len(pool)))
        left = pool.pop(_below(rng, len(pool)))
        steps.append(_random_step(rng, max(left, right), min(left, right)))
        pool.append(steps[-1].result)
    return CountdownInstance(numbers, pool[0], tuple(steps)) if pool[0] <= config.max_target else None


def _random_step(rng: random.Random, larger: int, smaller: int) -> Step:
    """A random step among those whose result is a positive integer; the larger operand comes first."""
    results = {"+": larger + smaller, "*": larger * smaller}
    if larger > smaller:
        results["-"] = larger - smaller
    if larger % smaller == 0:
        results["/"] = larger // smaller
    operator = sorted(results)[_below(rng, len(results))]
    return Step(larger, operator, smaller, results[operator])


def _shuffled(rng: random.Random, items: list[CountdownInstance]) -> tuple[CountdownInstance, ...]:
    for last in range(len(items) - 1, 0, -1):
        other = _below(rng, last + 1)
        items[last], items[other] = items[other], items[last]
    return tuple(items)


def _below(rng: random.Random, bound: int) -> int:
    """A uniform integer from 0 to bound − 1."""
    return int(rng.random() * bound)
