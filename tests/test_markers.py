"""The later parts of `make test` collect only files in which their marker is written: none is missed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def recipe(target: str) -> list[str]:
    """The lines that make would run for a target."""
    command = ["make", "--dry-run", "--no-print-directory", target]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def test_each_part_gets_all_files_with_its_markers() -> None:
    texts = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    parts = {
        "(slow or cluster) and not timing": ("test", "slow|cluster"),
        "timing": ("test", "timing"),
        "slow and not cluster and not timing": ("test-slow", "slow"),
        "cluster and not timing": ("test-cluster", "cluster"),
        "cluster and timing": ("test-cluster", "cluster"),
    }
    for expression, (target, markers) in parts.items():
        (line,) = [line for line in recipe(target) if f'-m "{expression}"' in line or f"-m {expression} " in line]
        given = {word for word in line.split() if word.startswith("tests/")}
        assert given == {name for name, text in texts.items() if re.search(rf"mark\.({markers})", text)}, expression
        assert given


@pytest.mark.parametrize("name", ["slow", "cluster", "timing"])
def test_a_marker_that_a_file_does_not_show_is_an_error(name: str, request: pytest.FixtureRequest) -> None:
    shared = request.config.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    item = pytest.Function.from_parent(request.node.parent, name="test_hidden", callobj=lambda: None)
    shared.pytest_collection_modifyitems([item])
    item.add_marker(name)
    with pytest.raises(pytest.UsageError, match=f"test_hidden is marked {name}, but its file does not say mark.{name}"):
        shared.pytest_collection_modifyitems([item])
