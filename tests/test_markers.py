"""The later parts of `make test` collect only files in which their marker is written: none is missed. On Python 3.11
lines are counted in some folders alone.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def recipe(target: str) -> list[str]:
    """The lines that make would run for a target."""
    command = ["make", "--dry-run", "--no-print-directory", target]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return said.replace("\\\n", " ").splitlines()


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
        files = [word for word in line.split() if word.startswith("tests/")]
        given = set(files)
        assert len(files) == len(given), "a file twice"
        assert given == {name for name, text in texts.items() if re.search(rf"mark\.({markers})", text)}, expression
        assert given


def collected(request: pytest.FixtureRequest, *markers: str) -> pytest.Item:
    """A test of this file with these markers, as the tests' shared configuration leaves it."""
    item = pytest.Function.from_parent(request.node.parent, name="test_hidden", callobj=lambda: None)
    for name in markers:
        item.add_marker(name)
    shared = request.config.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    shared.pytest_collection_modifyitems([item])
    return item


@pytest.mark.parametrize("name", ["slow", "cluster", "timing"])
def test_a_marker_that_a_file_does_not_show_is_an_error(name: str, request: pytest.FixtureRequest) -> None:
    collected(request)
    with pytest.raises(pytest.UsageError, match=f"test_hidden is marked {name}, but its file does not say mark.{name}"):
        collected(request, name)


@pytest.mark.parametrize(("folders", "counts"), [("", True), ("ops", False), (". ops", True), ("ops credit", False)])
def test_lines_are_counted_in_the_folders_asked_for(
    folders: str, counts: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COVERED_TESTS", folders)
    assert (collected(request).get_closest_marker("no_cover") is None) == counts
