"""The directory lock admits one process at a time, even if it or its children are killed."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rhythm.system.directory_lock import LOCK_NAME, DirectoryLockedError, lock_directory

HOLD = """
import os, subprocess, sys, time
from pathlib import Path
from rhythm.system.directory_lock import lock_directory
with lock_directory(Path(sys.argv[1])):
    children = []
    if sys.argv[2] == "with children":
        if not (forked := os.fork()):
            time.sleep(600)
        children = [forked, subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid]
    print(*children, flush=True)
    time.sleep(600)
"""


@contextmanager
def holder(directory: Path, how: str = "alone") -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Another process that holds the lock, and its children."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, directory, how], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    children = [int(pid) for pid in process.stdout.readline().split()]
    try:
        yield process, children
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.communicate()


def test_a_second_process_is_told_who_holds_it_and_gets_it_when_that_one_is_killed(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "run"
    with holder(directory) as (process, _):
        (directory / "file").touch()
        before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.iterdir()}
        message = rf"run is in use by process {process.pid} on {os.uname().nodename}, since 2\d\d\d-\d\d-\d\d \d\d:\d\d"
        with pytest.raises(DirectoryLockedError, match=message), lock_directory(directory):
            pass
        assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in directory.iterdir()} == before
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (directory / LOCK_NAME).is_file()  # left behind, and of no effect
        with lock_directory(directory):
            assert str(os.getpid()) in (directory / LOCK_NAME).read_text()
    assert [path.name for path in directory.iterdir()] == ["file"]


def test_children_do_not_keep_it(tmp_path: Path) -> None:
    with holder(tmp_path, "with children") as (process, children):
        assert len(children) == 2
        with pytest.raises(DirectoryLockedError), lock_directory(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        for pid in children:
            os.kill(pid, 0)  # it lives
        with lock_directory(tmp_path):
            pass


def test_a_forked_child_that_ends_does_not_drop_it(tmp_path: Path) -> None:
    with lock_directory(tmp_path):
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(DirectoryLockedError, match=f"process {os.getpid()} "), lock_directory(tmp_path):
            pass
    with lock_directory(tmp_path):
        pass


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    ran = False
    with caplog.at_level(logging.WARNING), lock_directory(tmp_path):
        ran = True
    assert ran
    assert "can't be locked (No locks available): make sure that no second process uses it" in caplog.text


def test_a_full_disk_is_named_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=r"\.lock") as caught, lock_directory(tmp_path):
        pass
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    with lock_directory(tmp_path):  # it was let go
        pass
