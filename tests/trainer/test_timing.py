"""A step's recorded attention time is the time of its statistics, wherever they are computed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rhythm.tap import attention_tap as tap
from rhythm.trainer import loop
from rhythm.trainer.config import TrainConfig
from rhythm.trainer.loop import run
from rhythm.trainer.metrics import Stopwatch, read_metrics
from rhythm.trainer.progress import RunProgress

SLOW = 0.2  # seconds that the op is made to take more


@pytest.mark.timing
@pytest.mark.parametrize("source", ["inline", "separate"])
@pytest.mark.parametrize("grouping", ["sequence", "batch"])
def test_the_share_is_that_of_the_statistics(
    source: str,
    grouping: str,
    small_config: Callable[..., TrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, spent = tap.attention_statistics, []

    def slow(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        time.sleep(SLOW)
        result = real(*arguments, **options)
        spent.append(time.perf_counter() - started)
        return result

    monkeypatch.setattr(tap, "attention_statistics", slow)
    overrides = (
        f"runs_dir={tmp_path}",
        f"signals.source={source}",
        f"signals.grouping={grouping}",
        "evaluation.samples=0",
        "evaluation.rhythm_responses=0",  # which needs statistics too
    )
    config = small_config(*overrides, "name=timed", "steps=1")
    run(config)
    row = read_metrics(config.run_dir / "metrics.jsonl")[1]
    assert len(spent) >= 4  # four micro-batches of one sampled layer
    statistics, attention, seconds = sum(spent), row["seconds_attention"], row["seconds_total"]
    assert attention is not None
    assert seconds is not None
    # A pass of their own counts as a whole.
    assert statistics <= attention <= 3 * statistics  # room for a busy machine
    total = sum(row[f"seconds_{phase}"] or 0.0 for phase in ("rollout", "attention", "training", "push"))
    assert row["attention_share"] == pytest.approx(attention / total, rel=0.05)
    assert total <= 1.05 * seconds


def test_seconds_move_between_phases() -> None:
    watch = Stopwatch()
    watch.seconds = {"training": 3.0, "attention": 0.5}
    watch.move(1.0, of="training", to="attention")
    assert watch.seconds == {"training": 2.0, "attention": 1.5}
    watch.move(float("nan"), of="training", to="attention")
    assert watch.seconds == {"training": 2.0, "attention": 1.5}
    watch.move(9.0, of="training", to="attention")
    assert watch.seconds == {"training": 0.0, "attention": 3.5}


def test_the_evaluation_of_the_start_is_no_part_of_the_rate(
    small_config: Callable[..., TrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    now, evaluate, train_step = [0.0], loop.evaluate, loop.train_step

    def slow(seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        def taken(*arguments: Any, **options: Any) -> Any:
            now[0] += seconds
            return function(*arguments, **options)

        return taken

    monkeypatch.setattr(loop, "evaluate", slow(1000, evaluate))
    monkeypatch.setattr(loop, "train_step", slow(12, train_step))
    monkeypatch.setattr(loop, "RunProgress", partial(RunProgress, clock=lambda: now[0]))
    run(small_config(f"runs_dir={tmp_path}", "name=rate", "steps=2"))
    lines = [line for line in caplog.messages if line.startswith("step ")]
    assert lines[0].startswith("step 1/2: 12.0 s/step, ")
    assert lines[0].endswith(", 12 s left")
    assert lines[1].startswith("step 2/2: 512.0 s/step, ")  # with the evaluation after it
