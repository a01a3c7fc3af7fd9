"""Rewards that hang, raise, or end their process: each is a score of 0 with a reason, and the next one is computed."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest

from rhythm import tasks
from rhythm.tasks import Reward, load_task
from rhythm.tasks.isolation import IsolatedTask, start_rewards
from rhythm.tasks.scoring import RewardWorkerError

MODULE = """
import os, re, sys, time
import rhythm
from pydantic import BaseModel
from rhythm.tasks import Reward

class NoOptions(BaseModel):
    pass

class Unpicklable(Reward):
    def __reduce__(self):
        raise TypeError("no pickle of this")

INVALID = {
    "none": None,
    "float": 1.0,
    "str": "1.0",
    "nan": Reward(score=float("nan"), correct=True, format_ok=True),
    "inf": Reward(score=float("inf"), correct=True, format_ok=True),
    "str score": Reward(score="1", correct=True, format_ok=True),
}

class Awkward:
    config_class = NoOptions

    def __init__(self, config):
        self.train, self.test = ["a", "b"], ["c"]

    def prompt(self, instance):
        return instance + "?"

    def solution(self, instance):
        return instance

    def reward(self, instance, response):
        if response == "sleep":
            time.sleep(600)
        if response == "backtrack":  # holds the interpreter's lock all the while
            re.match(r"(a+)+$", "a" * 40 + "b")
        if response == "raise":
            raise KeyError("no such key")
        if response == "pid":
            time.sleep(0.3)
            return Reward(score=os.getpid(), correct=True, format_ok=True)
        if response == "torch":
            before = "torch" in sys.modules
            layers = rhythm.sampled_layers(36)
            return Reward(score=len(layers), correct=not before and "torch" in sys.modules, format_ok=True)
        if response == "exit":
            raise SystemExit(3)
        if response == "die":
            os._exit(1)
        if response == "eat":
            size = 1 << 24
            while True:  # to the last byte, and it stays
                try:
                    self.train.append(bytearray(size))
                except MemoryError:
                    if size == 64:
                        raise
                    size //= 2
        if response == "interrupt":
            raise KeyboardInterrupt
        if response == "lambda":
            return lambda: 1.0
        if response == "unpicklable score":
            return Reward(score=open(os.devnull), correct=True, format_ok=True)
        if response == "unpicklable":
            return Unpicklable(score=0.25, correct=False, format_ok=True)
        if response in INVALID:
            return INVALID[response]
        return Reward(score=1.0, correct=response == instance, format_ok=True)
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("task")
    (path / "awkward.py").write_text(MODULE)
    sys.path.insert(0, str(path))
    yield path
    sys.path.remove(str(path))


@pytest.fixture(scope="module")
def isolated(directory: Path) -> Iterator[IsolatedTask]:
    task = load_task("awkward:Awkward")
    with IsolatedTask(task, "awkward:Awkward", {}, seconds=1.0, start_seconds=60, memory_gib=0.25) as isolated_task:
        yield isolated_task


def test_everything_else_is_the_tasks_own(isolated: IsolatedTask) -> None:
    assert (isolated.train, isolated.test) == (["a", "b"], ["c"])
    assert (isolated.prompt("a"), isolated.solution("b")) == ("a?", "b")
    assert isolated.reward("a", "a") == Reward(score=1.0, correct=True, format_ok=True)
    assert isolated.reward("a", "b") == Reward(score=1.0, correct=False, format_ok=True)


FAULTS = {
    "sleep": "late",
    "backtrack": "late",
    "raise": "raised",
    "exit": "raised",
    "interrupt": "raised",
    "die": "raised",
    "eat": "memory",
}


@pytest.mark.parametrize(("response", "fault"), FAULTS.items())
def test_a_fault_is_a_score_of_zero_and_the_run_goes_on(
    response: str, fault: str, isolated: IsolatedTask, caplog: pytest.LogCaptureFixture
) -> None:
    isolated.reward("a", "a")  # the child has started
    children = isolated.pids
    assert isolated.reward("a", response) == Reward(0.0, correct=False, format_ok=False, fault=fault)
    assert (isolated.pids == children) == (response in ("raise", "exit", "interrupt"))
    assert f"prompt 'a?', response {response!r}" in caplog.text
    assert ("KeyError: 'no such key'" in caplog.text) == (response == "raise")
    assert isolated.reward("b", "b").score == 1.0


@pytest.mark.timing
@pytest.mark.parametrize("response", FAULTS)
def test_a_fault_costs_little_more_than_its_second(response: str, isolated: IsolatedTask) -> None:
    isolated.reward("a", "a")  # the child has started
    started = time.monotonic()
    isolated.reward("a", response)
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    ("response", "why"),
    [
        ("none", "reward returned None: must be a rhythm.tasks.Reward"),
        ("float", "reward returned 1.0: must be"),
        ("str", "reward returned '1.0': must be"),
        ("lambda", "reward returned <function"),
        ("nan", "score is nan: must be a finite number"),
        ("inf", "score is inf: must be"),
        ("str score", "score is '1': must be"),
        ("unpicklable score", "score is <_io.TextIOWr"),
    ],
)
def test_an_invalid_reward_is_a_fault_at_once_and_the_child_stays(
    response: str, why: str, isolated: IsolatedTask, caplog: pytest.LogCaptureFixture
) -> None:
    isolated.reward("a", "a")
    children = isolated.pids
    assert isolated.reward("a", response) == Reward(0.0, correct=False, format_ok=False, fault="invalid")
    assert f"a reward is not valid: its score is 0; prompt 'a?', response {response!r}: {why}" in caplog.text
    assert isolated.reward("b", "b").score == 1.0
    assert isolated.pids == children


def test_a_reward_that_cannot_be_pickled_comes_as_its_values(isolated: IsolatedTask) -> None:
    assert isolated.reward("a", "unpicklable") == Reward(0.25, correct=False, format_ok=True)


def test_the_child_ends_with_a_parent_that_is_killed(directory: Path) -> None:
    script = textwrap.dedent("""
        import os, signal, sys
        from rhythm.tasks import load_task
        from rhythm.tasks.isolation import IsolatedTask
        if __name__ == "__main__":
            with IsolatedTask(load_task("awkward:Awkward"), "awkward:Awkward", {}, seconds=1, start_seconds=60) as task:
                task.reward("a", "a")
                print(task.pids[0], flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
    """)
    (directory / "parent.py").write_text(script)
    done = subprocess.run([sys.executable, "parent.py"], cwd=directory, capture_output=True, text=True, timeout=120)
    child = int(done.stdout)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "State:\tZ" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.05)


def test_torch_comes_only_when_the_task_asks_for_it(directory: Path) -> None:
    with tasks.isolated("awkward:Awkward", seconds=60) as task:
        assert task.reward("a", "torch") == Reward(score=5.0, correct=True, format_ok=True)


def test_all_of_a_batch_are_scored_in_order_around_its_faults(directory: Path) -> None:
    responses = ["a", "b", "die", "raise", "b", "sleep", "none", "a", "b"]
    with tasks.isolated("awkward:Awkward", seconds=1, workers=2) as task:
        results = task.rewards(["b"] * 9, responses)
    assert [reward.fault for reward in results] == [
        None, None, "raised", "raised", None, "late", "invalid", None, None,
    ]  # fmt: skip
    assert [reward.correct for reward in results] == [response == "b" for response in responses]
    assert [reward.score for reward in results] == [1, 1, 0, 0, 1, 0, 0, 1, 1]


def test_workers_score_at_the_same_time(directory: Path) -> None:
    with tasks.isolated("awkward:Awkward", workers=2) as task:
        task.rewards(["a"] * 2, ["a"] * 2)
        results = {reward.score for reward in task.rewards(["a"] * 4, ["pid"] * 4)}
        assert results == set(task.pids)
        assert len(results) == 2


def test_leaving_ends_what_still_hangs(directory: Path) -> None:
    with tasks.isolated("awkward:Awkward", seconds=3600, workers=2) as task:
        task.rewards(["a"] * 2, ["a"] * 2)
        wait = task.start_rewards(["a"] * 8, ["sleep"] * 8)
        workers = list(task.pids)
    assert all(pid is not None and gone(pid) for pid in workers)
    with pytest.raises((RewardWorkerError, CancelledError)):
        wait()
    with pytest.raises(RuntimeError):
        task.reward("a", "a")


def test_a_task_that_does_not_load_in_the_worker_says_why(directory: Path) -> None:
    with (
        IsolatedTask(load_task("awkward:Awkward"), "awkward:Missing", {}, seconds=1, start_seconds=60) as task,
        pytest.raises(RewardWorkerError, match=r"(?s)awkward:Missing did not start.*AttributeError.*Missing"),
    ):
        task.reward("a", "a")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "countdwon"}, "did you mean 'countdown'"),
        ({"name": "countdown", "seconds": 0}, "seconds"),
        ({"name": "countdown", "workers": 0}, "workers"),
        ({"name": "countdown", "options": {"number": 3}}, "number"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tasks.isolated(**arguments)


def test_lists_of_different_lengths_are_refused(isolated: IsolatedTask) -> None:
    with pytest.raises(ValueError, match="shorter"):
        isolated.rewards(["a", "b"], ["a"])


def test_a_task_that_is_not_isolated_is_scored_here(directory: Path) -> None:
    wait = start_rewards(load_task("awkward:Awkward"), ["a", "b", "a"], ["a", "a", "raise"])
    assert [(reward.correct, reward.fault) for reward in wait()] == [(True, None), (False, None), (False, "raised")]


def test_a_script_needs_no_main_guard(directory: Path) -> None:
    """As its own code does not run again in the workers."""
    script = """
import rhythm.tasks
with rhythm.tasks.isolated("awkward:Awkward", seconds=5, workers=2) as task:
    print(task.reward("a", "a").score, [reward.correct for reward in task.rewards(["a", "b"], ["a", "a"])])
"""
    (directory / "script.py").write_text(script)
    done = subprocess.run([sys.executable, "script.py"], cwd=directory, capture_output=True, text=True, timeout=120)
    assert done.stdout == "1.0 [True, False]\n", done.stderr


def gone(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "State:\tZ" in status.read_text()


def test_the_example_in_the_docs(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(import rhythm\.tasks\n.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == "1.0 [0.0, 0.0]\n", done.stderr
