"""The working directory: a user's task is imported from there, but nothing there replaces an installed module."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SHADOW = """
import os
with open({mark!r}, "a") as file:
    file.write(__name__ + " ")
raise ImportError("not the real " + __name__)
"""
TASK = """
from pydantic import BaseModel
from rhythm.tasks import Reward

class NoOptions(BaseModel):
    pass

class Own:
    config_class = NoOptions

    def __init__(self, config):
        self.train, self.test = ["1,2>3:", "2,2>4:"], ["1,1>2:"]

    def prompt(self, instance):
        return instance

    def solution(self, instance):
        return instance[2:0:-1]

    def reward(self, instance, response):
        return Reward(score=float(len(response)), correct=False, format_ok=True)
"""
RUN = """
{name: run, steps: 1, task: {name: 'own:Own'}, sampling: {max_new_tokens: 6}, evaluation: {samples: 0},
 warm_start: {steps: 2, batch_size: 2, cache_dir: cache, model: {layers: 3, hidden_size: 16, mlp_size: 16,
              query_heads: 2, key_heads: 1, head_size: 8}},
 batch: {prompts_per_batch: 2, responses_per_prompt: 2, mini_batch_size: 4, micro_batch_size: 4}}
"""


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def directory_of(shadows: list[str], mark: Path) -> Path:
    """A working directory with our own task in it, and with modules that leave a mark when they are executed."""
    directory = mark.parent / "here"
    directory.mkdir()
    (directory / "own.py").write_text(TASK)
    (directory / "run.yaml").write_text(RUN)
    for name in shadows:
        (directory / f"{name}.py").write_text(SHADOW.format(mark=str(mark)))
    return directory


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False)


def script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def test_training_finds_a_task_there_and_executes_nothing_else(mark: Path) -> None:
    directory = directory_of(["tensorboard", "ray", "yaml", "safetensors", "matplotlib"], mark)
    done = run(script("rhythm-train"), "run.yaml", cwd=directory)
    assert done.returncode == 0, done.stderr
    assert not mark.exists(), mark.read_text()
    assert list((directory / "runs" / "run" / "tensorboard").iterdir())


def test_the_reward_workers_process_takes_nothing_from_there(mark: Path) -> None:
    directory = directory_of(["pickle", "socket", "signal", "tempfile"], mark)
    program = mark.parent / "elsewhere" / "program.py"
    program.parent.mkdir()
    program.write_text(
        textwrap.dedent("""
            import os, sys
            from rhythm.tasks import load_task
            from rhythm.tasks.isolation import IsolatedTask
            if __name__ == "__main__":
                sys.path.append(os.getcwd())
                with IsolatedTask(load_task("own:Own"), "own:Own", {}, seconds=60, start_seconds=60) as task:
                    print(task.reward("1,2>3:", "abc").score, os.environ.get("PYTHONSAFEPATH"))
        """)
    )
    done = run(sys.executable, str(program), cwd=directory)
    assert not mark.exists(), mark.read_text()
    assert done.stdout.split() == ["3.0", "None"], done.stderr


def test_the_doctors_probe_takes_nothing_from_there(mark: Path) -> None:
    directory = directory_of(["torch", "triton", "rhythm"], mark)
    done = run(script("rhythm-doctor"), cwd=directory)
    assert done.returncode == 0, done.stdout
    assert "runs on the CPU" in done.stdout
    assert not mark.exists(), mark.read_text()
