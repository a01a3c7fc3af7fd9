from __future__ import annotations

import random
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from rhythm.tasks import Reward, base, load_task, task_class
from rhythm.tasks.countdown import Countdown
from rhythm.tasks.reasoning_gym import _task_class as rhythm_gym


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The example of the module's docstring, as a user would write it."""
    assert base.__doc__ is not None
    example = textwrap.dedent(base.__doc__.split("backwards:\n")[1].split("If it is in `mypackage")[0])
    head = "import random\nfrom pydantic import BaseModel, Field\nfrom rhythm.tasks import Reward\nnumber = 3\n"
    (tmp_path / "own_task_example.py").write_text(head + example)
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_task_example"
    sys.modules.pop("own_task_example", None)


def test_a_short_name_and_its_options() -> None:
    task = load_task("countdown", {"train_size": 3, "test_size": 2, "numbers": 3})
    assert isinstance(task, Countdown)
    assert (len(task.train), len(task.test), task.config.numbers) == (3, 2, 3)
    assert task_class("countdown") is Countdown


def test_the_documented_example_of_a_task_of_ones_own_works(own_module: str) -> None:
    task = load_task(f"{own_module}:Reverse", {"length": 4})
    assert (len(task.train), len(task.test)) == (1000, 100)
    word = task.train[0]
    assert len(word) == 4
    assert task.prompt(word) == f"{word}>"
    assert task.reward(word, task.solution(word)) == Reward(1.0, correct=True, format_ok=True)
    assert task.reward("abcd", "abcd") == Reward(0.0, correct=False, format_ok=True)
    assert task.reward("abcd", "") == Reward(0.0, correct=False, format_ok=False)
    assert random.Random(0).choices("abcdef", k=4) == list(word)


def test_unknown_names_and_options_are_errors(own_module: str) -> None:
    with pytest.raises(ValueError, match=r"'countdwon'.*'module:Class'; did you mean 'countdown'\?"):
        task_class("countdwon")
    with pytest.raises(ValueError, match=r"'module:Class'$"):
        task_class("mypackage.module")
    with pytest.raises(ValueError, match="must name a class with a config_class"):
        task_class(f"{own_module}:number")
    with pytest.raises(ValueError, match="must name a class with a config_class"):
        task_class("pathlib:Path")
    with pytest.raises(ModuleNotFoundError):
        task_class("no_such_module_anywhere:Task")
    with pytest.raises(AttributeError):
        task_class(f"{own_module}:Nothing")
    with pytest.raises(ValidationError, match="train_sze"):
        load_task("countdown", {"train_sze": 3})


# torch comes with rhythm itself.
HEAVY = {"datasets", "pyarrow", "sympy", "math_verify", "reasoning_gym", "transformers"}


LOADS = {
    "load_task('countdown', {'train_size': 1, 'test_size': 1})": set(),
    "load_for_rewards('jsonl', {'path': 'x.jsonl', 'held_out': 1.0, 'grader': 'numeric'})": set(),
    "load_for_rewards('crossthink_qa')": set(),
    "load_for_rewards('math500')": {"math_verify", "sympy"},
}


def test_a_task_loads_only_what_it_needs() -> None:
    """Each in a copy of one process, since loading torch is what takes the time."""
    code = f"""
import os, sys
from rhythm.tasks import *
for load in {list(LOADS)!r}:
    child = os.fork()
    if not child:
        exec(load)
        print(*sorted({HEAVY!r} & set(sys.modules)), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    loaded = dict(zip(LOADS, (set(line.split()) for line in done.stdout.splitlines()), strict=True))
    assert loaded == LOADS, done.stderr


@pytest.mark.parametrize(
    ("name", "package"), [("math500", "math_verify"), ("jsonl", "pyarrow"), ("reasoning_gym:dice", "reasoning_gym")]
)
def test_a_missing_package_is_named_with_the_command_that_brings_it(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    rhythm_gym.cache_clear()
    options = {} if ":" in name else {"path": str(tmp_path / "x.parquet"), "held_out": 1.0}
    with pytest.raises(
        ModuleNotFoundError, match=rf"needs {package}, which is not installed: pip install '\.\[tasks\]'"
    ):
        load_task(name, {**options, **({"grader": "exact"} if name == "jsonl" else {})})
    rhythm_gym.cache_clear()
