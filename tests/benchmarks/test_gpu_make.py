"""The make targets for a GPU: their time limits, and the tree of links that replaces an installed rhythm."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import ROOT
from benchmarks.gpu.__main__ import main
from benchmarks.record import commit, software

MAKE = ["make", "--no-print-directory", f"RUN_PYTHON={sys.executable}"]


def planned(target: str) -> str:
    run = subprocess.run([*MAKE, "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.replace("\\\n", " ")


@pytest.mark.parametrize("command", ["check", "race", "record"])
def test_each_command_ends_within_nine_minutes(command: str) -> None:
    (line,) = (line for line in planned(f"gpu-{command}").splitlines() if "benchmarks.gpu" in line)
    match = re.search(rf"timeout --kill-after=5 (\d+) .* -P -m benchmarks.gpu {command} --budget (\d+)", line)
    assert match is not None
    limit, budget = (int(number) for number in match.groups())
    assert budget + 30 <= limit <= 9 * 60 - 5
    assert "RHYTHM_AUTOTUNE=0 RHYTHM_GLUON='' " in line


def test_gpu_runs_the_three_in_turn() -> None:
    assert re.findall(r"-m benchmarks\.gpu (\w+)", planned("gpu")) == ["check", "race", "record"]


def test_the_tree_of_links_is_importable_without_an_installation(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    subprocess.run([*MAKE, "gpu-tree", f"GPU_TREE={tree}"], cwd=ROOT, capture_output=True, check=True)
    program = (
        "import sys, importlib.util\n"
        "sys.meta_path = [one for one in sys.meta_path if 'ScikitBuild' not in type(one).__name__]\n"
        "import rhythm, rhythm.kernels, benchmarks.gpu.__main__\n"
        "print(rhythm.__file__, rhythm.kernels.__file__, importlib.util.find_spec('kernels'))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tree), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-P", "-c", program]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.stdout.split() == [f"{tree}/rhythm/__init__.py", f"{tree}/rhythm/kernels/__init__.py", "None"], (
        run.stderr
    )


def test_without_a_gpu_each_command_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for command in ("check", "race", "record"):
        assert main([command]) == 2
        assert "torch sees no CUDA device" in capsys.readouterr().out


def test_a_copy_without_repository_or_installation_says_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib.metadata import PackageNotFoundError

    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("benchmarks.record.version", version)
    assert software()["rhythm"] == "not installed: the source tree"
    monkeypatch.setattr("benchmarks.record.ROOT", tmp_path)
    monkeypatch.setenv("RHYTHM_COMMIT", "24171fd")
    assert commit() == {"hash": "24171fd", "dirty": None}
    monkeypatch.delenv("RHYTHM_COMMIT")
    assert commit()["hash"] is None
