"""benchmarks.busy: a small run from end to end, its arithmetic, and its competing processes."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from benchmarks import busy
from benchmarks.busy import PLAIN, Row, beside, environment, main, table


@pytest.mark.slow
def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--company", "alone", "one", "--rounds", "1", "--steps", "2"]
    path = tmp_path / "busy.json"
    assert main([*arguments, "--policies", "default", "--json", str(path), "--records", str(tmp_path)]) == 0
    assert list(tmp_path.iterdir()) == [path], "quick mode leaves no record"
    record = json.loads(path.read_text())
    assert {"machine", "software", "commit", "nice", "config"} <= set(record)
    steps = record["seconds"]["default"]
    assert {company: len(seconds) for company, seconds in steps.items()} == {"alone": 2, "one": 2}
    assert all(0 < second < 60 for seconds in steps.values() for second in seconds)
    assert [(row["company"], row["steps"], row["met"]) for row in record["rows"]] == [
        ("alone", 2, None), ("one", 2, None),
    ]  # fmt: skip
    assert record["rows"][0]["seconds"] == sum(steps["alone"]) / 2
    assert "| default | one |" in capsys.readouterr().out


def test_arithmetic() -> None:
    seconds = {
        "default": {"alone": [1.0, 1.2, 9.0], "one": [2.0, 1.5], "two": [3.0]},
        PLAIN: {"alone": [1.25, 0.75], "one": [4.0]},
    }
    assert table(seconds, targets=True) == [
        Row("default", "alone", 1.2, 3, 1.2, 1.05, False),
        Row("default", "one", 1.75, 2, 1.75, 1.6, False),
        Row("default", "two", 3.0, 1, 3.0, 2.3, False),
        Row(PLAIN, "alone", 1.0, 2, 1.0, None, None),
        Row(PLAIN, "one", 4.0, 1, 4.0, None, None),
    ]
    met = table({"default": {"alone": [2.0], "one": [3.2], "two": [4.6], "short": [5.0]}}, targets=True)
    assert [(row.ratio, row.at_most, row.met) for row in met] == [
        (1.0, None, None), (1.6, 1.6, True), (2.3, 2.3, True), (2.5, None, None),
    ]  # fmt: skip
    assert [row.met for row in table(seconds, targets=False)] == [None] * 5
    assert table({"default": {"one": [1.0]}}, targets=True)[0].ratio is None


def test_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "3", "PATH": "/"})
    assert environment("default") == {"PATH": "/"}
    assert environment("OMP_NUM_THREADS=2,KMP_BLOCKTIME=4") == {
        "PATH": "/", "OMP_NUM_THREADS": "2", "KMP_BLOCKTIME": "4",
    }  # fmt: skip
    with pytest.raises(SystemExit, match="--policies passive: must be default or"):
        environment("passive")


def test_company_ends_with_all_that_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    program = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
open({str(child)!r}, "w").write(f"{{child.pid}}\\n")
while True: pass
"""
    with beside([program]):
        while not (child.exists() and child.read_text().endswith("\n")):
            time.sleep(0.01)
        pid = int(child.read_text())
        assert state(pid) in "RS"
    end = time.monotonic() + 10
    while state(pid) not in "ZX" and time.monotonic() < end:
        time.sleep(0.01)
    assert state(pid) in "ZX"


def test_short_processes_use_a_core(tmp_path: Path) -> None:
    """The program of short-lived processes starts one after another."""
    assert busy.COMPANY["short"] == (busy.SHORT,) * 3
    with beside([busy.SHORT]):
        assert any(short_process_listed() for _ in range(200))  # each listing takes some 50 ms


def short_process_listed() -> bool:
    """Whether one of the short-lived processes runs at this moment."""
    listed = subprocess.run(["ps", "-A", "-ww", "-o", "args="], capture_output=True, text=True, check=True).stdout
    return "process_time() < 0.1" in listed


def test_a_run_that_fails_shows_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "QUICK", {"no_such_key": "1"})
    with pytest.raises(RuntimeError, match=r"(?s)0 of 2 steps.*ended with code 2.*no_such_key"):
        busy.run(dict(os.environ), ["alone"], 1, tmp_path, quick=True)


def state(pid: int) -> str:
    """Its state letter in /proc; X if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"
