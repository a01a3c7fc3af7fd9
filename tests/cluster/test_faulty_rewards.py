"""A run whose judge hangs on some responses and raises on others goes on, and counts them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

TASK = """
import time
from rhythm.tasks.countdown import Countdown

class Faulty(Countdown):
    def reward(self, instance, response):
        if instance == self.train[0]:
            time.sleep(600)
        if instance == self.train[1]:
            raise RuntimeError("this judge gives up")
        return super().reward(instance, response)
"""


def test_late_and_raised_rewards_are_counted(small_cluster: Path, launch: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(TASK)
    engines = ("cluster.infer.engine=transformers", "cluster.train.engine=torch", "cluster.deadlines.reward=0.5")
    # A step that sees every one of the sixty training instances once.
    sizes = ("steps=1", "batch.prompts_per_batch=60", "batch.responses_per_prompt=2", "evaluation.samples=0")
    launched = launch(
        small_cluster, "name=faulty", f"runs_dir={tmp_path}", "task.name=faulty:Faulty", *engines, *sizes, cwd=tmp_path
    )
    output = launched.finish()
    row = json.loads((tmp_path / "faulty" / "metrics.jsonl").read_text().splitlines()[1])
    assert (row["rewards_late"], row["rewards_raised"]) == (2, 2)
    assert "a reward took longer than 0.5 s" in output
    assert "RuntimeError: this judge gives up" in output
    assert launched.nothing_left()
