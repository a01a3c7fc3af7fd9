"""A run whose reward hangs on some responses, raises or eats memory on others or returns nothing goes on, and counts
them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1800)]

TASK = """
import time
from rhythm.tasks.countdown import Countdown

class Faulty(Countdown):
    def reward(self, instance, response):
        if instance == self.train[0]:
            time.sleep(600)
        if instance == self.train[1]:
            raise RuntimeError("no reward for this")
        if instance == self.train[2]:
            return None
        if instance == self.train[3]:
            return bytearray(1 << 34)
        return super().reward(instance, response)
"""


def test_faulty_rewards_are_counted(small_cluster: Path, launch: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(TASK)
    # What no process of the run takes for the installed module, the workers of Ray included.
    for name in ("torch", "transformers", "pickle"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'a').write(__file__)\n")
    engines = (
        "cluster.infer.engine=transformers",
        "cluster.train.engine=torch",
        "reward.seconds=2",
        "reward.memory_gib=0.5",
    )
    # A step that sees every one of the sixty training instances once.
    sizes = ("steps=1", "batch.prompts_per_batch=60", "batch.responses_per_prompt=2", "evaluation.samples=0")
    launched = launch(
        small_cluster, "name=faulty", f"runs_dir={tmp_path}", "task.name=faulty:Faulty", *engines, *sizes, cwd=tmp_path
    )
    output = launched.finish()
    row = json.loads((tmp_path / "faulty" / "metrics.jsonl").read_text().splitlines()[1])
    faults = [row[f"rewards_{kind}"] for kind in ("late", "raised", "memory", "invalid")]
    assert faults == [2, 2, 2, 2]
    assert "given up after 2 s" in output
    assert "RuntimeError: no reward for this" in output
    assert "reward returned None" in output
    assert not (tmp_path / "executed").exists(), (tmp_path / "executed").read_text()
    assert launched.nothing_left()
