"""Every file in configs/ is a valid configuration, every file in configs/sweeps/ a valid sweep."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rhythm.cli.config_file import load_config
from rhythm.cli.sweep import main
from rhythm.trainer.setup import build_task

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
SWEEPS = sorted((Path(__file__).parents[1] / "configs" / "sweeps").glob("*.yaml"))


def test_there_are_some() -> None:
    assert [path.name for path in CONFIGS]
    assert [path.name for path in SWEEPS]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_parses_and_is_named_after_its_file(path: Path) -> None:
    assert load_config(path).name == path.stem


DRAWN = [path for path in CONFIGS if load_config(path).task.name.partition(":")[0] in ("countdown", "reasoning_gym")]


@pytest.mark.parametrize("path", DRAWN, ids=lambda path: path.name)
def test_a_task_that_needs_no_file_has_the_instances_asked_for(path: Path) -> None:
    task = build_task(load_config(path))
    assert len(task.train) > 0
    assert len(task.test) > 0


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_a_sweep_says_what_it_would_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # without results that are there already
    assert main([str(path), "--dry-run"]) == 0
    sweep = yaml.safe_load(path.read_text(encoding="utf-8"))
    runs = len(sweep["methods"]) * len(sweep["seeds"])
    assert f"{runs} of {runs} runs left; results in docs/experiments/{path.stem}" in capsys.readouterr().out
