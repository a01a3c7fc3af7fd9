"""A run without anything to learn from says so once, and counts such steps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rhythm.trainer.config import TrainConfig
from rhythm.trainer.drawing import zero_variance_share
from rhythm.trainer.loop import run
from rhythm.trainer.metrics import read_metrics
from rhythm.trainer.notices import Notices

TIES, UNFINISHED = "all rewards tie", "no response finished"


def record(step: int, *, ties: float = 0.0, finished: float = 1.0) -> dict[str, float]:
    return {
        "step": float(step), "reward": 0.0, "zero_variance_share": ties, "finished_share": finished,
        "response_length": 8.0,
    }  # fmt: skip


def test_zero_variance_share_by_hand() -> None:
    scores = torch.tensor([0.0, 0.0, 1.0, 0.5, 1.0, 1.0, 0.2, 0.2])
    assert zero_variance_share(scores, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])) == 0.75
    assert zero_variance_share(scores, torch.tensor([0, 1, 1, 2, 2, 0, 3, 3])) == 0.25
    assert zero_variance_share(scores, torch.zeros(8)) == 0


def test_three_steps_in_a_row_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    notices = Notices(steps=100)
    for step, ties in enumerate([1, 1, 0.75, 1, 1, 1, 1, 1, 0, 1, 1, 1], start=1):
        notices.look(record(step, ties=ties))
        assert caplog.text.count(TIES) == (step >= 6)
    assert "step 6: within every group all rewards tie (mean reward 0), 3 step(s) in a row" in caplog.text
    assert UNFINISHED not in caplog.text
    for step in range(13, 20):
        notices.look(record(step, finished=0.0))
        assert caplog.text.count(UNFINISHED) == (step >= 15)
    assert caplog.text.count(TIES) == 1


def test_a_shorter_run_says_so_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    notices = Notices(steps=2)
    notices.look(record(1, ties=1.0, finished=0.0))
    assert not caplog.text
    notices.look(record(2, ties=1.0, finished=0.0))
    assert caplog.text.count(TIES) == caplog.text.count(UNFINISHED) == 1


def test_a_run_without_a_reward(
    small_config: Callable[..., TrainConfig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One token is too little for any answer: nothing finishes, every reward is 0."""
    caplog.set_level(logging.INFO)
    config = small_config(
        f"runs_dir={tmp_path}", "name=none", "steps=4", "sampling.max_new_tokens=2", "tensorboard=true"
    )
    run(config)
    rows = read_metrics(config.run_dir / "metrics.jsonl")[1:]
    assert [row["zero_variance_share"] for row in rows] == [1.0] * 4
    assert [row["finished_share"] for row in rows[:3]] == [0.0] * 3
    assert caplog.text.count(TIES) == caplog.text.count(UNFINISHED) == 1
    assert "Groups whose rewards tie" in (config.run_dir / "report.html").read_text()
    events = b"".join(path.read_bytes() for path in (config.run_dir / "tensorboard").iterdir())
    assert b"zero_variance_share" in events
