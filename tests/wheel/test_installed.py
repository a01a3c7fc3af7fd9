"""What the installed package must look like, from the wheel or from an editable install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def run(code: str, cwd: Path) -> str:
    """What a new interpreter prints, started in `cwd`."""
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, check=True, capture_output=True, text=True).stdout


def test_kernels_are_inside_the_package_only(tmp_path: Path) -> None:
    """`kernels` at the top level is another project's name, which transformers looks for."""
    found = run(
        "import importlib.util as u; print(u.find_spec('kernels') is None, u.find_spec('rhythm.kernels') is not None)",
        tmp_path,
    )
    assert found.split() == ["True", "True"]


def test_public_names(tmp_path: Path) -> None:
    names = [
        "attention_statistics",
        "attention_with_statistics",
        "select_heads",
        "credit_weights",
        "sampled_layers",
        "observe",
        "RhythmCredit",
    ]
    assert run(f"import rhythm; print(all(hasattr(rhythm, name) for name in {names}))", tmp_path).strip() == "True"


@pytest.mark.parametrize("op", ["attention_statistics", "attention_with_statistics"])
def test_ops_are_registered(op: str, tmp_path: Path) -> None:
    assert run(f"import torch, rhythm; print(torch.ops.rhythm.{op})", tmp_path).strip() == f"rhythm.{op}"


@pytest.mark.parametrize("command", ["rhythm-train", "rhythm-doctor", "rhythm-report"])
def test_commands_start(command: str, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name(command)
    shown = subprocess.run([program, "--help"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert command in shown
