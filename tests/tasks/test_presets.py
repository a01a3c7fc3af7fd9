from __future__ import annotations

from pathlib import Path
from typing import Any

import paper_sets
import pyarrow
import pytest
from pyarrow import parquet

from rhythm.tasks import Reward, load_task, task_class
from rhythm.tasks.presets import BOXED

RIGHT = Reward(1.0, True, True)


def load(name: str, tmp_path: Path, suffix: str, **more: object) -> Any:
    path = tmp_path / f"{name}{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(paper_sets.ROWS[name]), path)
    else:
        paper_sets.write_rows(name, tmp_path)
    return load_task(name, {"path": str(path), "held_out": 0.5, **more})


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", paper_sets.ROWS)
def test_rows_of_the_published_schema(name: str, suffix: str, tmp_path: Path) -> None:
    task = load(name, tmp_path, suffix)
    assert (len(task.train), len(task.test)) == (3, 3)
    for problem in (*task.train, *task.test):
        assert task.reward(problem, task.solution(problem)) == RIGHT
        assert not task.reward(problem, r"\boxed{77}").correct
        assert (BOXED in task.prompt(problem)) == (name != "dapo_math_17k")


@pytest.mark.parametrize(
    ("name", "response"),
    [
        ("gsm8k", r"In all \boxed{1003} pens"),
        ("dapo_math_17k", "3 + 3 = 6\nAnswer: 6"),
        ("crossthink_qa", r"It is \boxed{old harbor}"),
        ("aime24", r"\boxed{3}"),
        ("aime25", r"\boxed{3}"),
        ("amc23", r"\boxed{3}"),
        ("math500", r"\boxed{1.5}"),
        ("olympiadbench", r"\boxed{3, \sqrt3}"),
    ],
)
def test_other_ways_to_write_the_right_answer_to_number_3(name: str, response: str, tmp_path: Path) -> None:
    task = load(name, tmp_path, ".jsonl")
    three = {"aime24": "003", "amc23": "3.0", "gsm8k": "1,003", "crossthink_qa": "Old Harbor", "dapo_math_17k": "6"}
    three |= {"math500": "\\frac{3}{2}", "olympiadbench": "$\\sqrt{3},3$"}
    problem = next(p for p in (*task.train, *task.test) if p.answer == three.get(name, "3"))
    assert task.reward(problem, response) == RIGHT


def test_where_the_sets_are_published() -> None:
    defaults = {name: task_class(name).config_class() for name in paper_sets.ROWS}
    assert {name: (c.path, c.subset, c.split, c.test_split, c.held_out) for name, c in defaults.items()} == {
        "gsm8k": ("openai/gsm8k", "main", "train", "test", None),
        "dapo_math_17k": ("BytedTsinghua-SIA/DAPO-Math-17k", None, "train", None, 0.01),
        "crossthink_qa": ("nvidia/Nemotron-CrossThink", None, "train_qa", None, 0.01),
        "aime24": ("HuggingFaceH4/aime_2024", None, "train", None, 1.0),
        "aime25": ("math-ai/aime25", None, "test", None, 1.0),
        "amc23": ("math-ai/amc23", None, "test", None, 1.0),
        "math500": ("HuggingFaceH4/MATH-500", None, "test", None, 1.0),
        "olympiadbench": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", None, 1.0),
    }


def test_gsm8k_keeps_its_worked_solutions(tmp_path: Path) -> None:
    task = load("gsm8k", tmp_path, ".jsonl", held_out=1.0)
    solutions = {task.solution(problem) for problem in task.test}
    assert "2+1000=<<2+1000=1002>>\n\\boxed{1,002}" in solutions
