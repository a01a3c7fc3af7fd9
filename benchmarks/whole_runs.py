"""Runs of rhythm-train in processes of their own: started, watched, killed, and compared with each other."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
from safetensors.torch import load_file

TIMINGS = ("seconds_", "tokens_per_second", "idle_share_", "attention_share", "restarts_")
"""How the names of metrics begin that differ between equal runs."""


SILENCE = 300.0
"""Seconds without a line of output or a file written after which a run counts as hung. Its longest silence, while a
process imports its libraries, is some ten seconds on an idle machine."""


class _Deadline:
    """Comes `seconds` after the last time that something was written in a folder: a slow machine has all the time that
    it needs, one that does nothing has not.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self._folder, self._seconds = folder, seconds
        self._written = self._state()
        self._since = self._looked = time.monotonic()

    def passed(self) -> bool:
        """Whether it has come. Looks at the folder once per second."""
        now = time.monotonic()
        if now - self._looked >= min(1.0, self._seconds / 4):
            self._looked, written = now, self._state()
            if written != self._written:
                self._written, self._since = written, now
        return now - self._since > self._seconds

    def _state(self) -> dict[str, tuple[int, int]]:
        state = {}
        for path in self._folder.rglob("*"):
            try:
                status = path.stat()
            except FileNotFoundError:  # renamed or removed meanwhile
                continue
            state[str(path)] = status.st_size, status.st_mtime_ns
        return state


class Launched:
    """rhythm-train in a process of its own, and the processes that it started."""

    def __init__(
        self, config: Path, *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        """`arguments`: as on the command line; `env`: variables in addition to this process's. Its output is written
        beside the configuration, and whatever is written there, such as its run's files, is a sign of life.
        """
        self._folder = config.parent
        self.log = config.parent / f"log-{time.monotonic_ns()}.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [Path(sys.executable).with_name("rhythm-train"), str(config), *arguments],
                env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=cwd,
            )
        self._seen: dict[int, psutil.Process] = {}

    @property
    def output(self) -> str:
        """What it has written so far."""
        return self.log.read_text()

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Its processes whose title begins so, the oldest first."""
        if self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self._seen[child.pid] = child
        alive = []
        for process in self._seen.values():
            try:
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    command = process.cmdline()
                    if not title or (command and command[0].startswith(title)):
                        alive.append(process)
            except psutil.NoSuchProcess:
                continue
        return sorted(alive, key=lambda process: process.create_time())

    def wait_for(self, happened: Callable[[], bool], silence: float = SILENCE) -> None:
        """Wait until `happened()`, which must be before the run ends and before `silence` seconds without a sign of
        life.
        """
        deadline = _Deadline(self._folder, silence)
        while not happened():
            assert self.process.poll() is None, f"ended early: {self.output}"
            assert not deadline.passed(), f"nothing written for {silence:g} s: {self.output}"
            time.sleep(0.02)
        self.processes()

    def finish(self, code: int = 0, silence: float = SILENCE) -> str:
        """Wait for its end, with this exit code and before `silence` seconds without a sign of life; returns its
        output.
        """
        deadline = _Deadline(self._folder, silence)
        while self.process.poll() is None:
            if deadline.passed():
                self.process.kill()
                raise AssertionError(f"nothing written for {silence:g} s: {self.output}")
            time.sleep(0.02)
        assert self.process.returncode == code, self.output
        return self.output

    def nothing_left(self, seconds: float = 90) -> bool:
        """Whether all its processes end within `seconds`."""
        deadline = time.monotonic() + seconds
        while self.processes():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def stop(self) -> None:
        """Kill it and all its processes."""
        children = self.processes()
        self.process.kill()
        self.process.wait()
        for child in children:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue


def rows(run: Path) -> list[dict[str, float]]:
    """The metrics of the steps that a run has done."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def metrics(run: Path) -> list[dict[str, float]]:
    """`rows` without timings and restarts: the same in equal runs."""
    return [{k: v for k, v in row.items() if not k.startswith(TIMINGS)} for row in rows(run)]


def weights_digest(run: Path, step: int) -> str:
    """Of all weights in a checkpoint, bit for bit."""
    digest = hashlib.sha256()
    for path in sorted((run / "checkpoints" / f"step_{step:06d}").glob("*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
