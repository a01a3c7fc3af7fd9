"""Runs what is left of a sweep: rhythm-train processes side by side, results written as each ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch
import yaml
from rich.console import Console

from rhythm.sweep.config import PlannedRun, SweepConfig
from rhythm.sweep.progress import SweepProgress
from rhythm.sweep.results import Results, measure, read_results, write_results
from rhythm.system.directory_lock import lock_directory
from rhythm.system.parent import signal_at_parents_end
from rhythm.system.version import __version__
from rhythm.system.writing import replace_file
from rhythm.trainer.interrupts import Interrupts
from rhythm.trainer.run_dir import CHECKPOINTS

_POLL_SECONDS = 0.5
_PATIENCE_SECONDS = 120.0  # for a run to save when the sweep is stopped
_LOG_LINES = 5  # of a failed run's log, shown
_COMMITS = "# commit: "
# The run ends with the sweep that started it, whatever ends that.
_START = """
import os, sys
from rhythm.sweep.run import end_with
end_with(int(sys.argv.pop(1)))
from rhythm.cli.train import main
sys.exit(main())
"""


@dataclass
class Failure:
    """A run that ended without results: its exit code (negative: a signal), and the end of its log."""

    run: PlannedRun
    code: int
    log: Path
    said: str


@dataclass
class SweepOutcome:
    """How a sweep ended. stopped_by: the signal that stopped it."""

    results: Results
    failures: list[Failure] = field(default_factory=list)
    stopped_by: signal.Signals | None = None


@dataclass
class _Process:
    run: PlannedRun
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    device: str | None


def left(plan: Sequence[PlannedRun], results: Results, directory: Path) -> list[PlannedRun]:
    """The planned runs that have no results yet.

    Raises ValueError where rows must not be mixed: one was made with other settings than the sweep now has, or methods
    of a seed began with different weights.
    """
    _check_starts(plan, results, directory)
    todo = []
    for run in plan:
        row = results.row(run.method, run.seed)
        if row is None:
            todo.append(run)
        elif row.settings != run.settings:
            raise ValueError(
                f"{directory}/runs.csv: {run.method}, seed {run.seed} was run with other settings ({row.settings}) "
                f"than the sweep has now ({run.settings}): restore them, give the sweep another name, or delete the row"
            )
    return todo


def _check_starts(plan: Sequence[PlannedRun], results: Results, directory: Path) -> None:
    """A seed's methods are compared in pairs, so they must begin with the same weights. A warm start is the same on the
    same kind of machine only; on CPUs another one shows in the accuracy before training.
    """
    if torch.cuda.is_available():  # the same weights may then give other accuracies
        return
    began: dict[str, dict[float, list[str]]] = {}
    for run in plan:
        row = results.row(run.method, run.seed)
        if row is None or run.config.model.path is not None:
            continue
        start = run.config.model_dump_json(include={"model", "warm_start", "task", "sampling", "evaluation"})
        began.setdefault(start, {}).setdefault(row.start, []).append(run.name)
    for starts in began.values():
        if len(starts) > 1:
            groups = "; ".join(f"{accuracy:.2%} ({', '.join(names)})" for accuracy, names in starts.items())
            raise ValueError(
                f"{directory}/runs.csv: runs of the same warm start began at different accuracies: {groups}. Another "
                "machine gives other weights: delete the rows of all but one accuracy, and those runs are run again"
            )


def run_sweep(sweep: SweepConfig, plan: Sequence[PlannedRun], console: Console | None = None) -> SweepOutcome:
    """Trains what is left of `plan`, at most `jobs` runs at once, each in its directory below sweep.runs.

    A run that was stopped continues; one that fails is told, and the others go on. Ctrl-C and SIGTERM let the runs at
    work save, then it returns.

    Raises:
        DirectoryLockedError: another sweep works in sweep.runs or sweep.results.
        ValueError: see `left` and `read_results`; also as soon as a run ends that began unlike the others of its seed.
        OSError: a file can't be written.
    """
    with lock_directory(sweep.runs), lock_directory(sweep.results):
        results = read_results(sweep.results)
        todo = deque(left(plan, results, sweep.results))
        outcome = SweepOutcome(results)
        devices = _devices()
        jobs = sweep.jobs or len(devices) or len(os.sched_getaffinity(0))
        progress = SweepProgress(
            console,
            total=len(plan),
            done=len(plan) - len(todo),
            steps_left=sum(run.config.steps for run in todo),
        )
        free = deque(device for _ in range(-(-jobs // max(1, len(devices)))) for device in (devices or [None]))
        running: list[_Process] = []
        try:
            with Interrupts() as interrupts, progress:
                while (todo or running) and not interrupts.asked():
                    while todo and len(running) < jobs:
                        running.append(_start(todo.popleft(), sweep.threads, free.popleft()))
                    time.sleep(_POLL_SECONDS)
                    for ended in [process for process in running if process.process.poll() is not None]:
                        running.remove(ended)
                        free.append(ended.device)
                        _finish(sweep, ended, outcome, progress)
                        _check_starts(plan, outcome.results, sweep.results)
                    progress.update([process.run for process in running])
                _stop(running)
            outcome.stopped_by = interrupts.received
        except BaseException:
            _stop(running)
            raise
        return outcome


def _devices() -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of a run, one per GPU; empty without GPUs."""
    if not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return list(visible.split(",")) if visible else [str(index) for index in range(torch.cuda.device_count())]


def _start(run: PlannedRun, threads: int, device: str | None) -> _Process:
    """Start rhythm-train in a separate process; it continues where it stopped."""
    directory = run.config.run_dir.parent
    config = directory / f"{run.name}.yaml"
    commits = commits_of(config)
    if (now := current_commit()) not in commits:
        commits.append(now)
    values = run.config.model_dump(mode="json")
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    replace_file(config, f"{_COMMITS}{'+'.join(commits)}\n{text}")
    environment = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment[name] = str(threads)
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    log = (directory / f"{run.name}.log").open("ab")
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, str(os.getpid()), str(config), "--resume"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches it once, through _stop
        )
    except BaseException:
        log.close()
        raise
    return _Process(run, process, log, device)


def end_with(parent: int) -> None:
    """Called in a run's process: sends it SIGTERM once the sweep is gone, on which the run saves and stops."""
    signal_at_parents_end(signal.SIGTERM)
    if os.getppid() != parent:  # it was gone before
        sys.exit(128 + signal.SIGTERM)


def _finish(sweep: SweepConfig, ended: _Process, outcome: SweepOutcome, progress: SweepProgress) -> None:
    """Write the rows of a run that has ended; if it failed, keep the end of its log."""
    run, code = ended.run, ended.process.returncode
    ended.log.close()
    log = Path(ended.log.name)
    if code == 0:
        row, curve = measure(run, "+".join(commits_of(log.with_suffix(".yaml"))))  # complete, as its exit code says
        outcome.results = outcome.results.with_run(row, curve)
        write_results(outcome.results, sweep.results)
        if not sweep.keep_checkpoints:
            shutil.rmtree(run.config.run_dir / CHECKPOINTS, ignore_errors=True)
        progress.ended(run, f"accuracy {row.start:.1%} → {row.final:.1%} in {row.seconds:.0f} s", done=True)
        return
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
    outcome.failures.append(Failure(run, code, log, "\n".join(lines)))
    progress.ended(run, f"failed with exit code {code}, see {log}", done=False)


def _stop(running: Sequence[_Process]) -> None:
    """Stop the runs: they may save first; those that don't stop are killed."""
    for one in running:
        with suppress(ProcessLookupError):
            one.process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    for one in running:
        try:
            one.process.wait(max(0.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            one.process.kill()
            one.process.wait()
        one.log.close()


def commits_of(config: Path) -> list[str]:
    """The commits that the run was trained with, from the first line of its configuration."""
    try:
        with config.open(encoding="utf-8") as file:
            first = file.readline()
    except OSError:
        return []
    return first.removeprefix(_COMMITS).strip().split("+") if first.startswith(_COMMITS) else []


def current_commit() -> str:
    """The first 10 digits of the commit that this code is checked out at, "-dirty" where its files differ; without a
    repository, the release.
    """
    package = Path(__file__).parents[1]
    try:
        head = _git(package, "rev-parse", "--short=10", "HEAD")
        return f"{head}-dirty" if _git(package, "status", "--porcelain", "--", ".") else head
    except (OSError, subprocess.CalledProcessError):
        return __version__.replace("+", "_")


def _git(directory: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True, check=True).stdout.strip()
