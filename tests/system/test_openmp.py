"""How long OpenMP's threads spin: measured as the CPU time of a wait in which nothing happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from rhythm.cli import commands
from rhythm.system import openmp
from rhythm.system.openmp import VARIABLES, SpinWatch, choose_waiting, crowds, waited, worker_waiting

IDLE = """
import json, time, torch
from rhythm.system.openmp import Crowd, SpinWatch, uses_libgomp

def idle():
    "Milliseconds of CPU time of a wait of 20 ms after parallel work, the mean of 20."
    spent = 0.0
    for _ in range(20):
        torch.ones(1 << 20).mul_(2)
        before = time.process_time()
        time.sleep(0.02)
        spent += time.process_time() - before
    return 50 * spent
"""


def run(code: str, **environment: str) -> object:
    """What it prints as JSON, with the two threads that a team needs and no choice about their waits."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-c", f"{IDLE}\ntorch.set_num_threads(2)\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, env=kept | environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_crowd_ends_spinning_while_it_is_there() -> None:
    code = """
import os
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
first = torch.get_num_threads()
plain = idle()
crowd = Crowd()
crowded = idle()
crowd.leave()
print(json.dumps([uses_libgomp(), plain, crowded, idle(), torch.get_num_threads() - first]))
"""
    libgomp, plain, crowded, after, more = run(code)  # type: ignore[misc]
    assert libgomp
    assert plain > 1
    assert after > 1
    assert crowded < 0.2 * min(plain, after)
    assert more == 0, "the number of threads decides how sums are made"


def test_the_watch_follows_the_wait_of_the_main_thread() -> None:
    """A made-up wait: none, half the time, none."""
    code = """
share, total, then = 0.0, 0.0, time.monotonic()
def waited():
    global total, then
    now = time.monotonic()
    total, then = total + share * (now - then), now
    return total
def until(crowded):
    end = time.monotonic() + 20
    while watch.crowded != crowded and time.monotonic() < end:
        time.sleep(0.01)
    return [watch.crowded, idle()]
with SpinWatch(waited, interval=0.05) as watch:
    time.sleep(0.4)
    readings = [[watch.crowded, idle()]]
    share = 0.5
    readings.append(until(True))
    share = 0.0
    readings.append(until(False))
    share = 0.5
    until(True)
print(json.dumps([*readings, [watch.crowded, idle()]]))
"""
    (calm, spun), (busy, slept), (calm_again, spun_again), (ended, at_the_end) = run(code)  # type: ignore[misc]
    assert [calm, busy, calm_again, ended] == [False, True, False, False]
    assert min(spun, spun_again, at_the_end) > 1
    assert slept < 0.2 * min(spun, spun_again, at_the_end)


@pytest.mark.parametrize("shares", [(0.5, 0.0) * 10, (0.07,) * 20])
def test_one_look_or_a_short_wait_changes_nothing(shares: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "Crowd", lambda: pytest.fail("no reason to crowd"))
    wait = Wait(shares)
    with SpinWatch(wait, interval=0.03) as watch:
        wait.over()
    assert not watch.crowded


def test_a_crowd_stays_longer_each_time_it_is_called_back_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the wait is while it is there: 8 looks, 16, 32, 40 at most; and 8 again after a calm time."""
    came, left = [], []

    class Noted:
        def __init__(self) -> None:
            came.append(wait.looks)

        def leave(self) -> None:
            left.append(wait.looks)

    shares = [
        0.5,
        0.5,
        *[0.0] * 8,
        0.5,
        0.5,
        *[0.5] * 16,
        0.0,
        0.5,
        0.5,
        *[0.0] * 32,
        0.5,
        0.5,
        *[0.0] * 40,
        *[0.0] * 4,
    ]
    wait = Wait([*shares, 0.5, 0.5, *[0.5] * 8, 0.0])
    monkeypatch.setattr(openmp, "uses_libgomp", lambda: True)
    monkeypatch.setattr(openmp, "Crowd", Noted)
    with SpinWatch(wait, interval=0.02):
        wait.over()
    assert came == [2, 12, 31, 65, 111]
    assert [end - start for start, end in zip(came, left, strict=True)] == [8, 16, 32, 40, 8]


class Wait:
    """Seconds waited, by a share of the time for each look."""

    def __init__(self, shares: tuple[float, ...] | list[float]) -> None:
        self._shares = shares
        self._total, self._then = 0.0, time.monotonic()
        self.looks = -1

    def __call__(self) -> float:
        now = time.monotonic()
        if 0 <= self.looks < len(self._shares):
            self._total += self._shares[self.looks] * (now - self._then)
        self._then = now
        self.looks += 1
        return self._total

    def over(self) -> None:
        end = time.monotonic() + 20
        while self.looks <= len(self._shares):
            assert time.monotonic() < end, "the watch has ended"
            time.sleep(0.01)


def test_a_system_that_does_not_say_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "_SCHEDSTAT", openmp._SCHEDSTAT.with_name("none"))
    assert waited() is None
    with SpinWatch(interval=0.01) as watch:
        watch._thread.join(10)
        assert not watch._thread.is_alive()
    assert not watch.crowded


def test_waited_counts_what_the_main_thread_waits() -> None:
    """Beside a process on the same core, a thread that computes for 0.3 s waits about as long."""
    code = """
import subprocess, sys
from rhythm.system.openmp import waited
os_core = sorted(__import__("os").sched_getaffinity(0))[:1]
__import__("os").sched_setaffinity(0, os_core)
other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
time.sleep(0.5)
before, end = waited(), time.process_time() + 0.3
while time.process_time() < end: pass
print(json.dumps(waited() - before))
other.kill()
"""
    assert run(code) > 0.1  # type: ignore[operator]


def test_crowds() -> None:
    """More threads than processors: 2 + 1 > 2; of half the processors (two threads a core) 4 + 3 + 3 > 8."""
    assert [crowds(*case) for case in [(2, 2), (8, 8), (4, 8), (64, 128), (3, 2)]] == [1, 1, 2, 2, 1]
    assert crowds(1, 2) == 0
    assert crowds(2, 64) == 0, "62 teams to keep two threads from spinning"


def test_what_the_user_has_set_stays() -> None:
    for name in VARIABLES:
        environment = {name: "1", "HOME": "/"}
        assert not choose_waiting(environment)
        assert environment == {name: "1", "HOME": "/"}
    environment = {"HOME": "/"}
    assert choose_waiting(environment)
    assert environment == {"HOME": "/", "KMP_BLOCKTIME": "1"}


def test_workers_do_not_spin_unless_the_user_says_so() -> None:
    none = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
    assert worker_waiting({}) == none
    assert worker_waiting({"KMP_BLOCKTIME": "1", "HOME": "/"}) == none, "the command's own choice for itself"
    assert worker_waiting({"GOMP_SPINCOUNT": "7", "KMP_BLOCKTIME": "1"}) == {"GOMP_SPINCOUNT": "7"}
    assert worker_waiting({"KMP_BLOCKTIME": "30", "OMP_NUM_THREADS": "2"}) == {"KMP_BLOCKTIME": "30"}


@pytest.mark.parametrize(("variables", "watched"), [({}, True), ({"OMP_NUM_THREADS": "2"}, False)])
def test_commands_watch_while_they_run(
    variables: dict[str, str], watched: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    seen: list[tuple[bool, str | None]] = []

    def main() -> int:
        import threading

        names = [thread.name for thread in threading.enumerate()]
        seen.append(("spin-watch" in names, os.environ.get("KMP_BLOCKTIME")))
        return 7

    monkeypatch.setattr("rhythm.cli.train.main", main)
    run_command: Callable[[], int] = commands.train
    assert run_command() == 7
    os.environ.pop("KMP_BLOCKTIME", None)
    assert seen == [(watched, "1" if watched else None)]
