"""Responses made to break whoever scores them, against every task that comes with rhythm: each costs at most the
deadline, is never right, runs no code, and the next response is scored as ever.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import paper_sets
import pytest

from rhythm.tasks import TASKS, isolated
from rhythm.tasks.base import FAMILIES
from rhythm.tasks.graders import GraderName
from rhythm.tasks.isolation import IsolatedTask

SECONDS = 2.0

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "countdown": [{"train_size": 20, "test_size": 1, "format": name} for name in ("answer", "steps")],
    "jsonl": [{"grader": grader} for grader in get_args(GraderName)],
    **{name: [{}] for name in paper_sets.ROWS},
    "reasoning_gym:chain_sum": [{"train_size": 20, "test_size": 1}],
}
"""For every task of TASKS, options with which it is built here; those that read rows get a file of some."""

DEEP = 100_000
HOSTILE = {
    "power": "99**98**97",
    "factorial": "9" * 30 + "!" * 5,
    "parentheses": "(" * DEEP + "1" + ")" * DEEP,
    "open parentheses": "(" * DEEP,
    "braces": "{" * DEEP + "1" + "}" * DEEP,
    "fractions": "\\frac{1}{" * 20_000 + "1" + "}" * 20_000,
    "megabyte": "7" * (1 << 20),
    "megabyte of terms": "1+" * (1 << 19) + "1",
    "unicode digits": "\N{ARABIC-INDIC DIGIT FOUR}\N{SUPERSCRIPT TWO}\N{FULLWIDTH DIGIT FIVE}",
    "import": "__import__('os').system('touch {mark}')",
    "open": "open('{mark}', 'w')",
    "surrogate": "\ud800",
    "nul": "1\0+2",
    "backtracking": "a" * 5000 + "=" * 5000,
}
WRAPPINGS = ("{}", "<answer>{}</answer>", "\\boxed{{{}}}", "{},{}", "1-{}=2")

CASES = [(name, options) for name, every in OPTIONS.items() for options in every]


def test_every_task_is_among_them() -> None:
    assert {name.partition(":")[0] for name in OPTIONS} == {*TASKS, *FAMILIES}, "a task without options is not tried"


def rows(name: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    if name == "jsonl":
        answers = "ABABAB" if options["grader"] == "choice" else "123456"
        return [{"prompt": f"Which one, {n}?", "answer": answer} for n, answer in enumerate(answers)]
    return paper_sets.ROWS[name]


@pytest.fixture(scope="module", params=CASES, ids=[f"{name} {number}" for number, (name, _) in enumerate(CASES)])
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[IsolatedTask]:
    name, options = request.param
    if name in ("jsonl", *paper_sets.ROWS):
        path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows(name, options))))
        options = options | {"path": str(path), "held_out": 0.5}
    with isolated(name, options, seconds=SECONDS, workers=2) as task:
        yield task


def responses(hostile: str, mark: Path) -> list[str]:
    text = HOSTILE[hostile].replace("{mark}", str(mark))
    return [wrapping.format(text, text) for wrapping in WRAPPINGS]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile(hostile: str, task: IsolatedTask, tmp_path: Path) -> None:
    instance, mark = task.train[0], tmp_path / "executed"
    texts = responses(hostile, mark)
    rewards = task.rewards([instance] * len(texts), texts)
    assert [reward.correct for reward in rewards] == [False] * len(texts)
    assert {reward.fault for reward in rewards} <= {None, "late"}, "a reward must not raise, whatever the text"
    assert not mark.exists()
    assert task.reward(instance, task.solution(instance)).correct


@pytest.mark.timing
def test_hostile_answers_cost_at_most_their_deadline(task: IsolatedTask, tmp_path: Path) -> None:
    instance = task.train[0]
    for hostile in HOSTILE:
        task.reward(instance, "")  # there is a worker
        started = time.monotonic()
        task.reward(instance, responses(hostile, tmp_path / "executed")[1])
        assert time.monotonic() - started < SECONDS + 1
