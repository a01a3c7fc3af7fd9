"""Shows a sweep's progress in one display for all runs, with step and accuracy of those that are running."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

from rhythm.sweep.config import PlannedRun
from rhythm.system.display import ProgressDisplay, say_as
from rhythm.system.progress import duration


class SweepProgress(ProgressDisplay):
    """Counts steps over all runs that are left, for the remaining time; a line or a bar names the runs at work."""

    def __init__(
        self,
        console: Console | None,
        *,
        total: int,
        done: int,
        steps_left: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """total, done: runs. steps_left: training steps of those that are not done. clock: seconds."""
        super().__init__(
            console,
            TextColumn("runs"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[doing]}"),
            description="runs",
            total=total,
            done=done,
            say=say_as("rhythm-sweep", console),
            clock=clock,
            doing="",
        )
        self._say = say_as("rhythm-sweep", console)
        self._total, self._done, self._left = total, done, steps_left
        self._began = clock()
        self._base: dict[str, int] = {}  # steps that a resumed run had before
        self._running: dict[str, tuple[int, str]] = {}
        self._read: dict[str, tuple[int, tuple[int, str]]] = {}  # size of a run's metrics, and what they say
        self._ended = 0

    def update(self, runs: Sequence[PlannedRun]) -> None:
        """Set the runs that are running, and read their progress."""
        self._running = {}
        for run in runs:
            step, accuracy = self._last_step(run)
            self._base.setdefault(run.name, step)
            self._running[run.name] = step, f"{run.name} step {step}/{run.config.steps}{accuracy}"
        self._bars.update(self._bar, doing=self._doing())

    def ended(self, run: PlannedRun, said: str, *, done: bool) -> None:
        """Count a run that has ended, with or without results."""
        self._running.pop(run.name, None)
        self._ended += run.config.steps - self._base.get(run.name, 0)
        self._done += done
        self._bars.update(self._bar, completed=self._done)
        self._say(f"{run.name}: {said}; {self.status()}")
        self.heartbeat.said()

    def status(self) -> str:
        """For a line: "12/45 runs; coupled-1 step 120/240, accuracy 31.2%; 2 h 05 min left"."""
        return f"{self._done}/{self._total} runs; {self._doing()}"

    def _doing(self) -> str:
        begun = self._ended + sum(step - self._base[name] for name, (step, _) in self._running.items())
        names = [said for _, said in self._running.values()]
        if begun:
            seconds = (self._clock() - self._began) * max(0, self._left - begun) / begun
            names.append(f"{duration(seconds)} left")
        return "; ".join(names) or "starting"

    def _last_step(self, run: PlannedRun) -> tuple[int, str]:
        """`last_step`, reading the file again only if it has grown."""
        path = run.config.run_dir / "metrics.jsonl"
        size = path.stat().st_size if path.is_file() else 0
        if run.name not in self._read or self._read[run.name][0] != size:
            self._read[run.name] = size, last_step(path)
        return self._read[run.name][1]


def last_step(path: Path) -> tuple[int, str]:
    """The last step in a run's metrics.jsonl, and ", accuracy …" of the last evaluation; (0, "") before the first."""
    step, accuracy = 0, ""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return step, accuracy
    for line in lines:
        try:
            record = json.loads(line)
            step = int(record["step"])
            if record.get("accuracy") is not None:
                accuracy = f", accuracy {record['accuracy']:.1%}"
        except (ValueError, TypeError, KeyError):  # the line that is being written
            continue
    return step, accuracy
