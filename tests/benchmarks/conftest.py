"""Shared by the tests of the benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def smallest() -> Any:
    """Settings of the GPU benchmark: rhythm's ops and the plain forwards, at shapes of one or two tiles."""
    from benchmarks.gpu import suite
    from benchmarks.gpu.actor_attn import ModelShape
    from benchmarks.shapes import Shape

    names = ("sdpa_flash", "sdpa_cudnn", "flash_attn", "statistics", "with_output", "bands")
    return replace(
        suite.INTERPRETED,
        implementations=tuple(one for one in suite.INTERPRETED.implementations if one.name in names),
        shape=Shape(40, query_heads=2, key_heads=1, head_size=16),
        checked_shapes=(Shape(33, prompt=5, query_heads=2, key_heads=1, head_size=16),),
        checked_dtypes=(torch.bfloat16,),
        lengths=(24,),
        packed=(30,),
        mean_length=12,
        model=ModelShape(2, 16, 16, 2, 1, 8, 20),
        longest=24,
        late_lengths=(40,),
    )


@pytest.fixture(scope="session")
def rehearse() -> Callable[..., dict[str, Any]]:
    """rehearse(command, folder, code=0, budget=480): the record of a command of `make gpu`, its times made up."""
    from benchmarks.gpu.__main__ import main

    def run(command: str, folder: Path, code: int = 0, budget: float = 480.0) -> dict[str, Any]:
        arguments = [command, "--device", "rehearsal", "--records", str(folder), "--budget", str(budget)]
        assert main(arguments) == code
        (path,) = (folder / "rehearsal").glob("*.json")
        parsed: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return parsed

    return run
