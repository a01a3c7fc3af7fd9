from __future__ import annotations

import ast
import inspect
import pickle
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from reasoning_gym.factory import DATASETS

from rhythm.tasks import Reward, load_for_rewards, load_task, task_class
from rhythm.tasks.reasoning_gym import UNSAFE

RIGHT = Reward(1.0, True, True)
SMALL: dict[str, object] = {"train_size": 20, "test_size": 10}

EVALUATORS = {"eval", "exec", "compile", "__import__", "parse_expr", "sympify", "lambdify", "parse_latex", "S"}
REVIEWED = {  # what is evaluated there comes from the generator, or only has the name
    "bitwise_arithmetic": {"eval(problem)"},
    "number_sorting": {"eval(entry['answer'])"},
    "propositional_logic": {"parse_expr(expr)", "parse_expr(expr[1:-1])", "parse_expr(sub_expr)"}
    | {"parse_expr(left_expr)", "parse_expr(right_expr)"},
}


@pytest.mark.parametrize("generator", ["chain_sum", "gsm_symbolic", "number_sorting", "word_ladder", "maze"])
def test_a_generator_by_name(generator: str) -> None:
    task = load_task(f"reasoning_gym:{generator}", SMALL)
    again = load_task(f"reasoning_gym:{generator}", SMALL)
    assert (len(task.train), len(task.test)) == (20, 10)
    assert ([*task.train], [*task.test]) == ([*again.train], [*again.test])
    assert not {entry.question for entry in task.train} & {entry.question for entry in task.test}
    for entry in task.test:
        assert task.prompt(entry) == f"{entry.question}\n" + task.prompt(entry).partition(f"{entry.question}\n")[2]
        assert task.reward(entry, task.solution(entry)) == RIGHT
        assert task.reward(entry, f"<answer>{entry.answer}</answer> And 1 + 1? <answer>2</answer>") == RIGHT
        assert not task.reward(entry, "<answer>no idea</answer>").correct
        assert task.reward(entry, entry.answer) == Reward(0.0, False, False)
        assert pickle.loads(pickle.dumps(entry)) == entry


def test_parameters_and_seeds() -> None:
    small = {**SMALL, "parameters": {"min_terms": 3, "max_terms": 3, "min_digits": 2, "max_digits": 2}}
    tasks = [load_task("reasoning_gym:chain_sum", {**small, "seed": seed}) for seed in (0, 1)]
    assert {len(entry.metadata["expression"].split()) for entry in tasks[0].train} == {5}
    assert not {e.question for e in tasks[0].train} & {e.question for e in tasks[1].train}


def test_worked_solutions_say_each_step() -> None:
    parameters = {"min_terms": 3, "max_terms": 3}
    task = load_task("reasoning_gym:chain_sum", {**SMALL, "parameters": parameters})
    for entry in task.train:
        first, sign, second, last_sign, third = entry.metadata["expression"].split()
        one = int(first) + int(second) if sign == "+" else int(first) - int(second)
        two = one + int(third) if last_sign == "+" else one - int(third)
        assert task.solution(entry) == (
            f"{first} {sign} {second} = {one}\n{one} {last_sign} {third} = {two}\n<answer>{two}</answer>"
        )
    told = load_task("reasoning_gym:gsm_symbolic", SMALL)
    entry = told.train[0]
    assert told.solution(entry).startswith(entry.metadata["answer_cot"].partition("####")[0])
    assert "####" not in told.solution(entry)


@pytest.mark.parametrize("generator", sorted(UNSAFE))
def test_generators_that_run_answers_are_refused(generator: str) -> None:
    with pytest.raises(AttributeError, match=f"generator {generator} evaluates a response as Python code"):
        task_class(f"reasoning_gym:{generator}")


def test_names_and_parameters_that_do_not_exist() -> None:
    with pytest.raises(AttributeError, match="no generator chain_sums; did you mean chain_sum"):
        task_class("reasoning_gym:chain_sums")
    with pytest.raises(ValueError, match=r"parameters of chain_sum: .*min_term"):
        load_task("reasoning_gym:chain_sum", {**SMALL, "parameters": {"min_term": 2}})
    with pytest.raises(ValueError, match="parameters of chain_sum: min_terms must be positive"):
        load_task("reasoning_gym:chain_sum", {**SMALL, "parameters": {"min_terms": 0}})
    with pytest.raises(ValueError, match="parameters has seed: use seed, train_size and test_size"):
        load_task("reasoning_gym:chain_sum", {**SMALL, "parameters": {"seed": 1}})
    tiny = {"min_terms": 1, "max_terms": 1, "max_digits": 1}
    with pytest.raises(ValueError, match="is 30, but only 10 different questions of chain_sum were found"):
        load_task("reasoning_gym:chain_sum", {**SMALL, "parameters": tiny})


def test_rewards_alone_have_no_instances_and_a_class_can_be_pickled() -> None:
    entry = load_task("reasoning_gym:chain_sum", SMALL).train[0]
    task = load_for_rewards("reasoning_gym:chain_sum", SMALL)
    assert len(task.train) == 0
    assert task.reward(entry, f"<answer>{entry.answer}</answer>") == RIGHT
    kind = task_class("reasoning_gym:chain_sum")
    assert pickle.loads(pickle.dumps(kind)) is kind


def test_no_other_scorer_of_the_installed_reasoning_gym_evaluates_anything() -> None:
    """A later version's new evaluators are found here: add them to UNSAFE, or review them."""
    evaluating = {name: calls for name, (kind, _) in DATASETS.items() if (calls := set(evaluations(kind)))}
    assert {name for name in evaluating if not evaluating[name] <= REVIEWED.get(name, set())} == UNSAFE


def evaluations(kind: type[Any]) -> Iterator[str]:
    """Calls of evaluators in a generator's score_answer and in what that calls of reasoning-gym."""
    waiting: list[tuple[Callable[..., Any], type[Any] | None]] = [(kind.score_answer, kind)]
    seen: set[Callable[..., Any]] = set()
    while waiting:
        function, owner = waiting.pop()
        function = inspect.unwrap(getattr(function, "__func__", function))
        if function in seen or not function.__module__.startswith("reasoning_gym"):
            continue
        seen.add(function)
        known = vars(sys.modules[function.__module__])
        for call in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
            if not isinstance(call, ast.Call):
                continue
            called, on = call.func, None
            if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
                on = owner if called.value.id in ("self", "cls") else known.get(called.value.id)
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            if name in EVALUATORS and getattr(on, "__name__", "") != "re":
                yield ast.unparse(call)
            target = getattr(on, name, None) if on is not None else known.get(name)
            if inspect.isclass(target) and target.__module__.startswith("reasoning_gym"):
                waiting += [(member, target) for member in vars(target).values() if inspect.isfunction(member)]
            elif inspect.isfunction(target) or inspect.ismethod(target):
                waiting.append((target, on if inspect.isclass(on) else None))
