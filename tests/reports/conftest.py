"""Runs as the trainer leaves them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rhythm.trainer.config import TrainConfig


@pytest.fixture
def write_run() -> Callable[..., Path]:
    """write_run(root, name, accuracies, …): its directory, with a resolved configuration and metrics."""
    return _write_run


def _write_run(
    root: Path, name: str, accuracies: list[float], *, seed: int = 0, config: dict[str, Any] | None = None,
    further: dict[str, float] | None = None, **credit: Any,
) -> Path:  # fmt: skip
    """Evaluated at steps 0, 10, …; `further`: metrics of the last step."""
    folder = root / name
    folder.mkdir(parents=True)
    values = {"name": name, "runs_dir": str(root), "seed": seed, "credit": credit, **(config or {})}
    resolved = TrainConfig.model_validate(values).model_dump(mode="json")
    (folder / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))
    rows: list[dict[str, Any]] = [{"step": 10 * i, "accuracy": value} for i, value in enumerate(accuracies)]
    rows[-1] |= further or {}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
