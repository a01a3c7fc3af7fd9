"""Progress lines: one unit throughout, and one line at least every 30 s, by a clock that the test sets."""

from __future__ import annotations

import io
import logging
import time
from pathlib import Path

import pytest
from rich.console import Console

from rhythm.analysis.progress import AnalysisProgress, finishing, working
from rhythm.system.progress import Heartbeat, Rate, duration
from rhythm.trainer.progress import RunProgress

NUMBERS = {"tokens_per_second": 1000.0, "reward": 0.25}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_one_unit_from_the_first_text_on() -> None:
    slow, fast = Rate("step"), Rate("step")
    assert [slow.text(x) for x in (14.25, 1.0, 0.5, 2000)] == [
        "14.2 s/step",
        "1.0 s/step",
        "0.5 s/step",
        "2,000.0 s/step",
    ]
    assert [fast.text(x) for x in (0.5, 1.25, 0.0005)] == ["2.0 steps/s", "0.8 steps/s", "2,000.0 steps/s"]


def test_durations() -> None:
    seconds = [0, 119, 120, 3600, 7200, 11_100]
    assert [duration(s) for s in seconds] == ["0 s", "119 s", "2 min", "60 min", "2 h 00 min", "3 h 05 min"]


def test_a_sign_whenever_thirty_seconds_have_passed_without_a_line() -> None:
    clock, said = Clock(), []
    heartbeat = Heartbeat(lambda: f"at {clock.now:g}", said.append, clock=clock)
    for clock.now in range(100, 200):
        if clock.now == 140:
            heartbeat.said()
        heartbeat.beat()
    assert said == ["at 130", "at 170"]


def test_signs_come_while_the_block_is_busy() -> None:
    said: list[str] = []
    with Heartbeat(lambda: "busy", said.append, every=0.02):
        deadline = time.monotonic() + 60
        while len(said) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    count = len(said)
    assert count >= 2
    time.sleep(0.1)
    assert len(said) == count  # none after the block


def test_a_run_says_what_it_does_and_the_start_is_no_part_of_its_rate(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    progress = RunProgress(Console(file=io.StringIO()), steps=40, done=2, clock=clock)
    progress.phase("evaluation")
    clock.now += 31
    progress.heartbeat.beat()
    clock.now += 900
    progress.begin_steps()
    progress.phase("rollout")
    clock.now += 14
    progress.step(3, NUMBERS)
    progress.phase("training")
    clock.now += 29
    progress.heartbeat.beat()
    clock.now += 1
    progress.heartbeat.beat()
    clock.now -= 24
    progress.step(4, NUMBERS | {"accuracy": 0.5})
    assert caplog.messages == [
        "after step 2/40: evaluation for 31 s; no step is finished yet, so the remaining time is unknown",
        "step 3/40: 14.0 s/step, 1,000 tokens/s, reward 0.250, 9 min left",
        "after step 3/40: training for 30 s; 14.0 s/step, 9 min left",
        "step 4/40: 10.0 s/step, 1,000 tokens/s, reward 0.250, accuracy 50.0%, 6 min left",
    ]


def test_a_terminal_has_the_bar_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    with RunProgress(Console(file=io.StringIO(), force_terminal=True), steps=4, done=0, clock=clock) as progress:
        clock.now += 100
        progress.step(1, NUMBERS)
    assert not caplog.messages


def test_an_analysis_says_how_far_it_is_within_a_batch() -> None:
    clock, shown = Clock(), io.StringIO()
    progress = AnalysisProgress(Console(file=shown, width=40), problems=40, clock=clock)
    progress.batch(4, 0)
    tokens = 7
    progress.phase(lambda: f"generating ({tokens} tokens)")
    clock.now, tokens = 131.0, 130
    progress.heartbeat.beat()
    progress.reached(0.5)
    with progress.aside("observing response 0-0"):
        clock.now += 9
        progress.heartbeat.beat()
        clock.now += 21
        progress.heartbeat.beat()
        progress.measured(5, 80)
        progress.first_page(Path("out/report.html"))
    clock.now += 30
    progress.heartbeat.beat()
    progress.end_batch()
    progress.batch(4, 0)
    progress.phase("generating")
    clock.now += 39
    progress.heartbeat.beat()
    assert shown.getvalue().splitlines() == [
        "rhythm-analyze: 0/40 problems; generating (130 tokens) for 31 s; none is finished yet, so the remaining "
        "time is unknown",
        "rhythm-analyze: 2/40 problems, 30.5 s/problem, 19 min left; observing response 0-0 for 30 s",
        "rhythm-analyze: out/report.html shows 5 of 80 responses, and more as they come",
        "rhythm-analyze: 2/40 problems, 45.5 s/problem, 29 min left; generating (130 tokens) for 91 s; 5 of 80 "
        "responses measured",
        "rhythm-analyze: 4/40 problems, 32.5 s/problem, 20 min left; generating for 39 s; 5 of 80 responses measured",
    ]


def test_an_analysis_says_that_it_writes_its_report() -> None:
    clock, shown = Clock(), io.StringIO()
    signs = finishing(Console(file=shown), clock=clock)
    assert isinstance(signs, Heartbeat)
    clock.now += 45
    signs.beat()
    said = "rhythm-analyze: all problems done; writing tables, figures and the page for 45 s\n"
    assert shown.getvalue() == said
    assert not isinstance(finishing(Console(force_terminal=True)), Heartbeat)
    assert not isinstance(finishing(None), Heartbeat)


def test_work_after_an_analysis_says_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, shown = Clock(), io.StringIO()
    opened: list[Heartbeat] = []
    enter = Heartbeat.__enter__
    monkeypatch.setattr(Heartbeat, "__enter__", lambda self: opened.append(self) or enter(self))
    with working(Console(file=shown), clock) as tell:
        tell("heads of response 7")
        tell("γ by 40 settings")
        clock.now += 45
        opened[0].beat()
    assert shown.getvalue() == "rhythm-analyze: γ by 40 settings, after 45 s\n"
    with working(None) as tell:
        tell("nothing is shown")
