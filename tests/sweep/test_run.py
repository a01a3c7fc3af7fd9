"""rhythm-sweep with real runs: what it leaves when one fails, when it is stopped, and when it is killed."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml

from rhythm.cli.sweep import main
from rhythm.system.directory_lock import lock_directory

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def sweep_file(directory: Path, caches: Path, **keys: object) -> Path:
    overrides = {
        "steps": 3,
        "warm_start.steps": 3,
        "warm_start.examples": 200,
        "warm_start.cache_dir": str(caches),
        "task.options.test_size": 8,
        "batch.prompts_per_batch": 2,
        "batch.mini_batch_size": 8,
        "batch.micro_batch_size": 8,
        "evaluation.every_steps": 1,
        "evaluation.samples": 0,
        "checkpoint.every_steps": 1,
        "tensorboard": False,
    }
    values = {
        "name": "s",
        "base": str(ROOT / "configs/countdown_tiny.yaml"),
        "overrides": overrides,
        "methods": {"grpo": {"credit.strategy": "none"}, "coupled": {"credit.strategy": "coupled"}},
        "seeds": [1],
        "jobs": 2,
        "runs_dir": str(directory / "runs"),
        "out": str(directory / "out"),
    }
    path = directory / "sweep.yaml"
    path.write_text(yaml.safe_dump(values | keys), encoding="utf-8")
    return path


def start(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rhythm.cli.sweep", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=path.parent)


def sweep(path: Path) -> tuple[int, str, str]:
    """What `start` does to its end, in this process: (exit code, standard output, standard error)."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = main([str(path)])
    return code, out.getvalue(), err.getvalue()


def rows(directory: Path, name: str = "runs.csv") -> list[dict[str, str]]:
    with (directory / "out/s" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def measured(directory: Path) -> list[tuple[str, ...]]:
    """What must not depend on when it was computed."""
    names = ("method", "seed", "step", "accuracy", "reward", "entropy", "response_length")
    return sorted(tuple(row[name] for name in names) for row in rows(directory, "curves.csv"))


def records(directory: Path, run: str) -> list[dict[str, float]]:
    path = directory / "runs/s" / run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, caches: Path) -> Path:
    """The directory of a sweep that nothing disturbed, but for a method that can't work."""
    directory = tmp_path_factory.mktemp("whole")
    methods = {
        "grpo": {"credit.strategy": "none"},
        "broken": {"model.path": str(directory / "nowhere")},
        "coupled": {"credit.strategy": "coupled"},
    }
    code, out, err = sweep(sweep_file(directory, caches, methods=methods, seeds=[1, 2]))
    assert code == 1
    assert "broken-1 failed with exit code 2" in out
    assert "nowhere: no such directory" in out
    assert "4/6 runs" in err
    return directory


def test_the_methods_of_a_seed_begin_alike(whole: Path) -> None:
    assert {(row["method"], row["seed"]) for row in rows(whole)} == {
        (method, seed) for method in ("grpo", "coupled") for seed in ("1", "2")
    }
    first = {run: records(whole, run)[1] for run in ("grpo-1", "coupled-1", "grpo-2")}
    for key in ("reward", "entropy", "response_length"):
        assert first["grpo-1"][key] == first["coupled-1"][key]
    assert first["grpo-1"]["entropy"] != first["grpo-2"]["entropy"]
    assert not list((whole / "runs").rglob("checkpoints"))


def test_a_clone_goes_on_from_the_results_alone(whole: Path, tmp_path: Path, caches: Path) -> None:
    path = sweep_file(tmp_path, caches, seeds=[1, 2])
    (tmp_path / "out/s").mkdir(parents=True)
    for name in ("runs.csv", "curves.csv"):
        (tmp_path / "out/s" / name).write_bytes((whole / "out/s" / name).read_bytes())
    code, out, _ = sweep(path)
    assert code == 0
    assert "grpo" in out
    assert not list((tmp_path / "runs/s").iterdir())
    assert measured(tmp_path) == measured(whole)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_that_was_stopped_ends_like_one_that_was_not(
    number: signal.Signals, whole: Path, tmp_path: Path, caches: Path
) -> None:
    path = sweep_file(tmp_path, caches)
    process = start(path)
    metrics = tmp_path / "runs/s/coupled-1/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, number)
    out, _ = process.communicate(timeout=120)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "stopped by SIGINT; the same command goes on from there" in out
    for name in ("grpo-1", "coupled-1"):  # the runs of a killed sweep save and stop by themselves
        with lock_directory(tmp_path / "runs/s" / name, waiting=print):
            pass
    assert sweep(path)[0] == 0
    assert measured(tmp_path) == [row for row in measured(whole) if row[1] == "1"]


@pytest.mark.parametrize("held", ["runs/s", "out/s"])
def test_a_second_sweep_is_refused(tmp_path: Path, caches: Path, held: str) -> None:
    with lock_directory(tmp_path / held):
        code, _, err = sweep(sweep_file(tmp_path, caches))
    assert code == 2
    assert f"is in use by process {os.getpid()}" in err
    assert not (tmp_path / "out/s/runs.csv").exists()
