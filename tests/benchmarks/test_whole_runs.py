"""When a run that is watched counts as hung."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import whole_runs
from benchmarks.whole_runs import Launched

SILENCE = 10.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The clock that the module sees: each sleep there takes a second, and calls `clock.meanwhile`."""
    state = SimpleNamespace(now=0.0, meanwhile=lambda: None)

    def sleep(_: float) -> None:
        state.now += 1
        state.meanwhile()

    ns = {"monotonic": lambda: state.now, "monotonic_ns": lambda: int(state.now * 1e9), "sleep": sleep}
    monkeypatch.setattr(whole_runs, "time", SimpleNamespace(**ns))
    return state


@pytest.fixture
def launched(clock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run that starts and never does anything by itself."""
    process = SimpleNamespace(pid=0, returncode=None, killed=False, poll=lambda: process.returncode)
    process.kill = lambda: setattr(process, "killed", True)
    monkeypatch.setattr(whole_runs.subprocess, "Popen", lambda *_, **__: process)
    monkeypatch.setattr(Launched, "processes", lambda self, title="": [])
    return Launched(tmp_path / "run.yaml")


def test_a_slow_run_has_the_time_that_it_needs_as_long_as_it_writes(launched: Any, clock: Any, tmp_path: Path) -> None:
    """Into its log, or files of its own further down, one of which comes and goes."""
    (tmp_path / "runs" / "small").mkdir(parents=True)
    metrics = tmp_path / "runs" / "small" / "metrics.jsonl"

    def write() -> None:
        if clock.now % 24 == 8:
            launched.log.write_text(f"{launched.output}line\n")
        if clock.now % 24 == 16:
            metrics.write_text("step")
        if clock.now % 24 == 0:
            metrics.unlink(missing_ok=True)

    clock.meanwhile = write
    launched.wait_for(lambda: clock.now >= 400, SILENCE)
    assert clock.now == 400
    clock.meanwhile = lambda: (write(), clock.now >= 800 and setattr(launched.process, "returncode", 3))
    assert launched.finish(code=3, silence=SILENCE) == launched.output
    assert launched.output.count("line") > 20


def test_a_run_that_writes_nothing_is_hung(launched: Any, clock: Any) -> None:
    clock.meanwhile = lambda: clock.now <= 5 and launched.log.write_text("x" * int(clock.now))
    with pytest.raises(AssertionError, match="nothing written for 10 s: xxxxx"):
        launched.wait_for(lambda: False, SILENCE)
    assert 14 <= clock.now <= 17
    assert not launched.process.killed
    with pytest.raises(AssertionError, match="nothing written for 10 s"):
        launched.finish(silence=SILENCE)
    assert 24 <= clock.now <= 30
    assert launched.process.killed


def test_a_run_that_ends_is_not_waited_for(launched: Any, clock: Any) -> None:
    launched.process.returncode = 1
    launched.log.write_text("why")
    with pytest.raises(AssertionError, match="ended early: why"):
        launched.wait_for(lambda: False, SILENCE)
