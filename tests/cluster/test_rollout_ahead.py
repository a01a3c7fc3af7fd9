"""Whole runs one step off, with the engines that start soonest.

What is killed, and the moment at which a run is stopped and resumed, must leave no trace: the same metrics and, bit for
bit, the same weights as the uninterrupted run's.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from itertools import accumulate
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.whole_runs import metrics, rows, weights_digest
from rhythm.cli.config_file import load_config
from rhythm.trainer.config import TrainConfig
from rhythm.trainer.loop import run

if TYPE_CHECKING:  # it imports Ray, whose environment has to be prepared first
    from rhythm.cluster.rpc import Worker

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1800)]

SETTINGS = (
    "steps=8",
    "task.options.format_score=0.2",  # so that rewards differ
    "correction.mode=token_truncate",
    "cluster.placement=separate",
    "cluster.rollout_ahead=1",
    "cluster.parity.every_steps=4",
    "cluster.infer.engine=transformers",
    "cluster.infer.replicas=2",
    "cluster.train.engine=torch",
)


@pytest.fixture(scope="module", autouse=True)
def _without_curves() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rhythm.reports.run.draw_curves", lambda *_: [])
        patch.setattr("rhythm.reports.run.draw_seconds", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def configure(small_cluster: Path) -> Callable[..., TrainConfig]:
    return lambda *overrides: load_config(small_cluster, [*SETTINGS, *overrides])


@pytest.fixture(scope="module")
def whole(configure: Callable[..., TrainConfig]) -> Path:
    """The run, uninterrupted."""
    return run(configure("name=whole")).run_dir


def test_one_version_behind_and_corrected(whole: Path) -> None:
    """But for the first step, which none comes before, and those whose engines are compared."""
    steps = rows(whole)[1:]
    assert [row["staleness"] for row in steps] == [0, 1, 1, 0, 1, 1, 1, 0]
    assert [row["step"] for row in steps if "parity_mean" in row] == [1, 4, 8]
    moved = [row["grad_norm"] > 0 for row in steps]
    assert sum(moved) >= 4
    for before, row, changed, ever in zip(steps, steps[1:], moved, accumulate(moved, or_), strict=False):
        # Of the same weights the engines' log-probs differ by rounding, of two versions by more. Adam's moments move
        # the weights also in a step whose gradients are 0.
        if row["staleness"] == 1 and changed:
            assert row["rollout_ratio_max"] > 1.001, (before, row)
        elif row["staleness"] == 0 or not ever:
            assert row["rollout_ratio_max"] <= 1.001, (before, row)
    assert not (whole / "checkpoints" / "step_000008" / "rollout_ahead.pt").exists(), "nothing comes after"


def test_what_is_lost_or_stopped_while_a_rollout_is_ahead_leaves_no_trace(
    whole: Path,
    configure: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In step 1 a replica is lost, and in step 5 a rank of the trainer, both with the next rollout in flight; in step 6
    the run is asked to stop before it has changed a weight, also then.
    """
    from rhythm.cluster.rpc import Worker

    config = configure("name=disturbed")
    seen: list[str] = []
    trainer: list[Worker] = []

    def disturb(worker: Worker, method: str) -> None:
        done = len(rows(config.run_dir)) - 1
        ahead = threading.current_thread() is not threading.main_thread()
        if method == "step":
            trainer[:] = [worker]
        for what, due in (
            ("replica", done == 0 and ahead and method == "generate"),
            ("rank", done == 4 and ahead and method == "generate"),
            ("stop", done == 5 and not ahead and method == "log_probs"),
        ):
            if due and what not in seen:
                seen.append(what)
                if what == "stop":
                    os.kill(os.getpid(), signal.SIGINT)
                else:
                    lost = worker if what == "replica" else trainer[0]
                    assert lost.pid is not None
                    os.kill(lost.pid, signal.SIGKILL)

    for name in ("submit", "stream"):
        inner = getattr(Worker, name)

        def watched(worker: Worker, method: str, *arguments: Any, inner: Callable[..., Any] = inner) -> Any:
            disturb(worker, method)
            return inner(worker, method, *arguments)

        monkeypatch.setattr(Worker, name, watched)
    caplog.set_level(logging.INFO)
    stopped = run(config)
    assert seen == ["replica", "rank", "stop"]
    assert (stopped.step, stopped.stopped_by) == (5, signal.SIGINT)
    assert "actor_infer.generate ahead: actor_infer[" in caplog.text
    assert "going back to step 0: restart 1 of at most 3" in caplog.text
    assert "going back to step 4: restart 2 of at most 3" in caplog.text
    assert (config.run_dir / "checkpoints" / "step_000005" / "rollout_ahead.pt").is_file()
    assert metrics(config.run_dir) == metrics(whole)[:6]
    assert run(config, resume=True).step == 8
    assert metrics(config.run_dir) == metrics(whole)
    assert weights_digest(config.run_dir, 8) == weights_digest(whole, 8)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rollout")]
