"""Further tasks evaluated inside training, each with its own number of samples, as rhythm-eval does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rhythm.cli.config_file import ConfigError
from rhythm.trainer.config import TrainConfig
from rhythm.trainer.loop import run
from rhythm.trainer.setup import SetupError

Configure = Callable[..., TrainConfig]
SMALL = "format: steps, numbers: 2, max_number: 9, max_target: 18, train_size: 60, test_size: 16"
TASKS = (
    f"evaluation.tasks=[{{name: countdown, label: own, options: {{{SMALL}}}}}, "
    f"{{name: countdown, label: many, options: {{{SMALL}}}, samples: 4, k: [2, 4], temperature: 1.0, problems: 6}}]"
)


def test_every_task_has_its_own_samples_and_metrics(small_config: Configure, tmp_path: Path) -> None:
    summary = run(small_config(f"runs_dir={tmp_path}", "steps=2", "evaluation.instances=9", TASKS))
    rows = [json.loads(line) for line in (summary.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [("own/pass@1" in row) for row in rows] == [True, False, True]
    for row in (rows[0], rows[2]):
        # The first is the run's own task under another name: greedy, so its accuracy is the run's.
        assert row["own/pass@1"] == row["own/avg@1"] == row["accuracy"]
        assert (row["own/problems"], row["many/problems"]) == (9, 6)
        assert row["many/avg@4"] == row["many/pass@1"] <= row["many/pass@2"] <= row["many/pass@4"]
        assert row["many/avg@4"] * 24 == pytest.approx(round(row["many/avg@4"] * 24))
    assert rows[2]["many/avg@4"] > 0


def test_tasks_that_cant_be_evaluated_are_named(small_config: Configure, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="samples is 4 for task countdown: must be 1 at temperature 0"):
        small_config("evaluation.tasks=[{name: countdown, samples: 4}]")
    with pytest.raises(ConfigError, match=r"evaluation.tasks: tasks\[0\].name: task is 'countdwn'"):
        small_config("evaluation.tasks=[countdwn]")
    impossible = "evaluation.tasks=[{name: countdown, options: {numbers: 2, max_number: 2}}]"
    with pytest.raises(SetupError, match=r"evaluation\.tasks, countdown: train_size"):
        run(small_config(f"runs_dir={tmp_path}", "steps=0", impossible))
    assert not (tmp_path / "small").exists()  # refused before the warm start, and before anything is written


FAULTY = """
import time
from rhythm.tasks.countdown import Countdown

class Faulty(Countdown):
    def reward(self, instance, response):
        place = self.test.index(instance) if instance in self.test else -1
        if place == 0:
            return None
        if place == 1:
            time.sleep(600)
        if place in (2, 3, 4):
            raise RuntimeError("no reward for this")
        return super().reward(instance, response)
"""


def test_faulty_rewards_are_counted_apart_from_wrong_answers(
    small_config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "faulty_held_out.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(tmp_path)
    options = f"{{{SMALL}}}"
    summary = run(
        small_config(
            f"runs_dir={tmp_path}",
            "steps=0",
            "reward.seconds=1",
            "task.name=faulty_held_out:Faulty",
            f"evaluation.tasks=[{{name: 'faulty_held_out:Faulty', label: few, problems: 3, options: {options}}}, "
            f"{{name: countdown, options: {options}}}]",
        )
    )
    (row,) = [json.loads(line) for line in (summary.run_dir / "metrics.jsonl").read_text().splitlines()]
    kinds = ("late", "raised", "memory", "invalid")
    assert [row[f"accuracy_rewards_{kind}"] for kind in kinds] == [1, 3, 0, 1]
    assert [row[f"few/rewards_{kind}"] for kind in kinds] == [1, 1, 0, 1]
    assert [row[f"countdown/rewards_{kind}"] for kind in kinds] == [0, 0, 0, 0]
