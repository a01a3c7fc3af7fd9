"""How many threads the commands use beside other processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from rhythm.cli import commands
from rhythm.system import openmp
from rhythm.system.openmp import VARIABLES, ThreadWatch, choose_waiting, used_by_others, waited, worker_waiting


class Looks:
    """Seconds since the start of which a share was waited or used, by one share for each look."""

    def __init__(self, shares: Sequence[float]) -> None:
        self._shares = shares
        self._total, self._then = 0.0, time.monotonic()
        self.count = -1

    def __call__(self) -> float:
        now = time.monotonic()
        if 0 <= self.count < len(self._shares):
            self._total += self._shares[self.count] * (now - self._then)
        self._then = now
        self.count += 1
        return self._total


def watch_through(
    waits: Sequence[float], others: Sequence[float], monkeypatch: pytest.MonkeyPatch, *, team: int = 4
) -> list[tuple[int, int]]:
    """The changes that a watch makes on four processors with these shares at its looks: (look, threads)."""
    changes: list[tuple[int, int]] = []
    wait = Looks(waits)
    monkeypatch.setattr(openmp, "processors", lambda: 4)
    monkeypatch.setattr(openmp, "_torch_threads", lambda: team)
    monkeypatch.setattr(openmp, "set_threads_of_the_main_thread", lambda n: changes.append((wait.count, n)))
    with ThreadWatch(wait, Looks(others), interval=0.03):
        end = time.monotonic() + 20
        while wait.count <= len(waits):
            assert time.monotonic() < end, "the watch has ended"
            time.sleep(0.01)
    return changes


def test_a_core_that_others_use_is_left_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four threads on four processors: two cores are taken at the third look, one given back ten looks later, and all
    when the watch ends.
    """
    waits = [0.0, 0.5, 0.5, *[0.0] * 16]
    others = [0.0, 2.0, 2.0, *[2.0] * 5, *[1.0] * 11]
    assert watch_through(waits, others, monkeypatch) == [(3, 2), (12, 3), (20, 4)]


@pytest.mark.parametrize(
    ("waits", "others"),
    [
        pytest.param([0.5, 0.0] * 5, [2.0] * 10, id="one look"),
        pytest.param([0.07] * 10, [2.0] * 10, id="a short wait"),
        pytest.param([0.5] * 10, [0.1] * 10, id="a wait for nobody"),
    ],
)
def test_threads_stay(waits: list[float], others: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    assert watch_through(waits, others, monkeypatch) == []


def test_one_thread_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watch_through([0.6] * 4, [3.9] * 4, monkeypatch)[0] == (2, 1)


def test_a_team_smaller_than_the_machine_leaves_only_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watch_through([0.6] * 4, [1.0] * 4, monkeypatch, team=2) == []
    assert watch_through([0.6] * 4, [3.0] * 4, monkeypatch, team=2)[0] == (2, 1)


def run(code: str) -> object:
    """What it prints as JSON, in a process of its own in which nobody has chosen a number of threads."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=kept, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_beside_a_busy_process_the_main_thread_has_fewer_threads() -> None:
    """On two cores: two threads, one beside a process that computes, two after it and after the watch."""
    code = """
import json, os, subprocess, sys, time
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import torch
from rhythm.system.openmp import ThreadWatch
if len(os.sched_getaffinity(0)) < 2:
    print(json.dumps(None)), sys.exit()
torch.set_num_threads(2)
numbers = torch.randn(256, 256)

def until(threads, seconds=60):
    end = time.monotonic() + seconds
    while torch.get_num_threads() != threads and time.monotonic() < end:
        numbers @ numbers
    return torch.get_num_threads()

with ThreadWatch(interval=0.1):
    seen = [torch.get_num_threads()]
    others = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(2)]
    seen.append(until(1))
    for other in others:
        other.kill(), other.wait()
print(json.dumps([*seen, until(2, 5)]))
"""
    assert run(code) in ([2, 1, 2], None)  # None: one core is all there is


@pytest.mark.timing
def test_what_others_use_is_counted_and_what_this_process_uses_is_not() -> None:
    """A second of one core, on which this process computes beside another."""
    code = """
import json, os, subprocess, sys, time
from rhythm.system.openmp import used_by_others
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
other = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
time.sleep(0.3)
before, own, end = used_by_others(), time.process_time(), time.monotonic() + 1
while time.monotonic() < end: pass
print(json.dumps([used_by_others() - before, time.process_time() - own]))
other.kill(), other.wait()
"""
    others, own = run(code)  # type: ignore[misc]
    assert own > 0.05
    assert others > 0.2
    assert 0.8 < others + own < 1.2


def test_nice_processes_and_other_processors_do_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(openmp.os, "sched_getaffinity", lambda pid: {1})
    monkeypatch.setattr(openmp, "_STAT", tmp_path / "stat")
    monkeypatch.setattr(openmp.time, "process_time", lambda: 0.5)
    (tmp_path / "stat").write_text(
        "cpu  9000 9000 9000 9000 9000 9000 9000 9000 0 0\n"
        "cpu0 8000 8000 8000 8000 8000 8000 8000 8000 0 0\n"
        "cpu1 100 7000 20 7000 7000 3 4 5 70 0\n"
        "intr 1 2 3\nctxt 5\n"
    )
    for priority, own in ((0, 0.5), (5, 0.0)):  # a nice process is not among those counted
        monkeypatch.setattr(openmp.os, "getpriority", lambda which, who, priority=priority: priority)
        assert used_by_others() == pytest.approx(132 / os.sysconf("SC_CLK_TCK") - own)


def test_a_system_that_does_not_say_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "_TASKS", openmp._TASKS.with_name("none"))
    assert waited() is None
    with ThreadWatch(interval=0.01) as watch:
        watch._thread.join(10)
        assert not watch._thread.is_alive()
    assert watch.threads is None


def test_threads_that_have_ended_do_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(openmp, "_TASKS", tmp_path)
    for task, said in (("10", "5 2000000000 7"), ("11", "6 500000000 8"), ("12", None)):
        (tmp_path / task).mkdir()
        if said:
            (tmp_path / task / "schedstat").write_text(said)
    assert waited() == 2.5


@pytest.mark.timing
@pytest.mark.parametrize("thread", ["main", "another"])
def test_waited_counts_what_any_thread_waits(thread: str) -> None:
    """Beside a process on the same core, a thread that computes for 0.3 s waits about as long."""
    code = """
import json, os, subprocess, sys, threading, time
from rhythm.system.openmp import waited
core = sorted(os.sched_getaffinity(0))[:1]
other = subprocess.Popen(["taskset", "-c", str(core[0]), sys.executable, "-c", "while True: pass"])
time.sleep(0.5)
def work():
    os.sched_setaffinity(0, core)
    before, end = waited(), time.thread_time() + 0.3
    while time.thread_time() < end: pass
    print(json.dumps(waited() - before))
if THREAD == "main":
    work()
else:
    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
other.kill()
"""
    assert run(code.replace("THREAD", repr(thread))) > 0.1  # type: ignore[operator]


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
        seen.append(("thread-watch" in names, os.environ.get("KMP_BLOCKTIME")))
        return 7

    monkeypatch.setattr("rhythm.cli.train.main", main)
    run_command: Callable[[], int] = commands.train
    assert run_command() == 7
    os.environ.pop("KMP_BLOCKTIME", None)
    assert seen == [(watched, "1" if watched else None)]
