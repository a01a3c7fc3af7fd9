"""Which Countdown instances are drawn, how they are split, and which configurations are refused."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from fractions import Fraction

import pytest
from pydantic import ValidationError

from rhythm.tasks import Reward, countdown
from rhythm.tasks.countdown import Countdown, CountdownConfig, as_expression, make_instances
from rhythm.tasks.expression import evaluate


def small(**keys: object) -> CountdownConfig:
    return CountdownConfig.model_validate({"train_size": 300, "test_size": 50, "numbers": 3, "max_number": 20} | keys)


@pytest.mark.parametrize("numbers", [2, 3, 4, (3, 6)])
def test_every_instance_is_solved_by_its_solution(numbers: object) -> None:
    config = small(numbers=numbers, max_number=30, max_target=60)
    counts = set()
    for instance in make_instances(config):
        counts.add(len(instance.numbers))
        assert 1 <= instance.target <= 60
        assert all(1 <= number <= 30 for number in instance.numbers)
        assert len(instance.solution) == len(instance.numbers) - 1
        assert evaluate(as_expression(instance), instance.numbers) == instance.target
        for step in instance.solution:
            exact = {"+": step.left + step.right, "-": step.left - step.right, "*": step.left * step.right}
            exact["/"] = Fraction(step.left, step.right)
            assert step.result == exact[step.operator] > 0
    assert counts == ({numbers} if isinstance(numbers, int) else {3, 4, 5, 6})


@pytest.mark.parametrize("format", ["answer", "steps"])
def test_worked_solutions_are_right(format: str) -> None:
    task = Countdown(small(format=format, max_number=99, numbers=(3, 5)))
    for instance in (*task.train, *task.test):
        assert task.reward(instance, task.solution(instance)) == Reward(1.0, True, True)


def test_train_and_test_are_disjoint_and_full() -> None:
    task = Countdown(small(train_size=2000, test_size=500))
    keys = [{(tuple(sorted(i.numbers)), i.target) for i in part} for part in (task.train, task.test)]
    assert [len(key) for key in keys] == [len(task.train), len(task.test)] == [2000, 500]
    assert not keys[0] & keys[1]


def test_the_split_is_random() -> None:
    """Drawn without the shuffle, what has many ways to be made comes first: the mean target would differ."""
    instances = make_instances(small(train_size=9000, test_size=3000))
    targets = [float(instance.target) for instance in instances]
    mean = sum(targets) / len(targets)
    deviation = (sum((target - mean) ** 2 for target in targets) / len(targets)) ** 0.5
    for part in (targets[:3000], targets[-3000:]):
        assert abs(sum(part) / 3000 - mean) < 4 * deviation / 3000**0.5


def test_defaults_are_the_papers() -> None:
    config = CountdownConfig()
    assert (config.train_size, config.test_size, config.counts) == (20_000, 512, (4, 4))
    assert (config.max_number, config.max_target, config.format) == (99, 100, "answer")
    assert all(field.description for field in CountdownConfig.model_fields.values())


def test_instances_are_the_same_everywhere() -> None:
    first = make_instances(small())[:3]
    assert [(i.numbers, i.target, ",".join(map(str, i.solution))) for i in first] == [
        ((11, 9, 9), 11, "11-9=2,9+2=11"),
        ((4, 1, 3), 1, "3*1=3,4-3=1"),
        ((1, 9, 14), 5, "14-9=5,5*1=5"),
    ]
    program = (
        "from rhythm.tasks.countdown import *\n"
        "print(make_instances(CountdownConfig(train_size=300, test_size=50, numbers=3, max_number=20)))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    other = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == repr(make_instances(small()))
    assert make_instances(small(seed=1))[:3] != first


def reachable(numbers: tuple[int, ...]) -> set[int]:
    """The results of all these numbers, each used once, with whole positive numbers on the way."""
    if len(numbers) == 1:
        return set(numbers)
    results: set[int] = set()
    for i, j in itertools.combinations(range(len(numbers)), 2):
        rest = tuple(number for at, number in enumerate(numbers) if at not in (i, j))
        larger, smaller = max(numbers[i], numbers[j]), min(numbers[i], numbers[j])
        ways = {larger + smaller, larger * smaller} | ({larger - smaller} if larger > smaller else set())
        for way in ways | ({larger // smaller} if larger % smaller == 0 else set()):
            results |= reachable((*rest, way))
    return results


@pytest.mark.parametrize(
    ("counts", "max_number", "max_target"), [((2, 2), 4, 100), ((2, 2), 9, 3), ((3, 3), 3, 30), ((2, 3), 3, 100)]
)
def test_what_cannot_exist_is_not_searched_for(
    counts: tuple[int, int], max_number: int, max_target: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that exist are found all the same, by fifty draws for each that could; the default sizes would ask for a
    million.
    """
    exist = sum(
        result <= max_target
        for count in range(counts[0], counts[1] + 1)
        for numbers in itertools.combinations_with_replacement(range(1, max_number + 1), count)
        for result in reachable(numbers)
    )
    draws: list[object] = []
    draw = countdown._draw
    monkeypatch.setattr(countdown, "_draw", lambda *arguments: draws.append(arguments) or draw(*arguments))
    limits = {"numbers": counts, "max_number": max_number, "max_target": max_target}
    with pytest.raises(ValueError, match=f"but only {exist} different instances were found"):
        make_instances(CountdownConfig(**limits))
    assert len(draws) < 50_000
    assert len(make_instances(CountdownConfig(train_size=exist - 1, test_size=1, **limits))) == exist


def test_asking_for_more_instances_than_exist_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"train_size \+ test_size is 1050, but only \d+ .*max_number=4"):
        make_instances(small(train_size=1000, max_number=4))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"numbers": 1}, "numbers is 1: must be a count from 2 to 8"),
        ({"numbers": [4, 3]}, "must be a count from 2 to 8, or"),
        ({"numbers": [2, 9]}, "must be a count from 2 to 8, or"),
        ({"format": "chat"}, "format"),
        ({"format_score": 1.0}, "format_score"),
        ({"max_numbr": 3}, "max_numbr"),
    ],
)
def test_bad_configurations_are_named(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        small(**keys)
