"""Directories of rhythm-eval as runs of a comparison: one record, of the checkpoint's step."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rhythm.reports.run import Run

_RESULTS = "results.json"
_CHECKPOINT = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class Evaluation:
    """An evaluation as read from disk. settings: how it was made, as rhythm-eval takes it."""

    run: Run
    settings: Mapping[str, Any]


def holds_an_evaluation(directory: Path) -> bool:
    """Whether rhythm-eval finished there."""
    return (directory / _RESULTS).is_file()


def load_evaluation(directory: Path) -> Evaluation:
    """The estimates of every task as `<task>/<estimate>`, as rhythm-train records them. Of a run's checkpoint the
    configuration is the run's, and the step the checkpoint's; of any other there is none, and the step is 0.

    Raises ValueError for results.json that rhythm-eval doesn't write.
    """
    path = directory / _RESULTS
    try:
        results = json.loads(path.read_bytes())
        settings, model = dict(results["settings"]), Path(results["settings"]["model"])
        values = {
            f"{task['task']}/{estimate['name']}": float(estimate["value"])
            for task in results["tasks"]
            for estimate in task["estimates"]
        }
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or of another version: {type(error).__name__}: {error}") from error
    config, step = None, 0
    if (match := _CHECKPOINT.fullmatch(model.name)) and model.parent.name == "checkpoints":
        recorded = model.parent.parent / "config.yaml"
        if recorded.is_file():
            config, step = recorded.read_text(encoding="utf-8", errors="replace"), int(match[1])
    return Evaluation(Run(directory.resolve().name, config, ({"step": step, **values},), {}), settings)
