"""python -m benchmarks.kill_at_random: SIGKILL at random moments of a cluster run, after which nothing may be lost.

Runs `rhythm-train configs/countdown_cluster_cpu.yaml` (vLLM, Megatron-core, Ray) once uninterrupted. Then again for
each seed: after a random share of that run's seconds one of its processes is killed, the command itself as often as all
others together. If that ends the run, it is resumed. A seed passes if

- every step that was written before the kill is still there, and a resumed run begins at the newest checkpoint,
- metrics, samples and the weights in all checkpoints are those of the uninterrupted run, bit for bit,
- every process that was started has ended, and no shared memory is left.

Prints a line per seed, writes the record after each, and exits with 1 if a seed did not pass. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from benchmarks import ROOT
from benchmarks.record import commit, machine, record_path, software, write_record
from benchmarks.whole_runs import Launched, metrics, weights_digest

CONFIG = ROOT / "configs" / "countdown_cluster_cpu.yaml"
RUN_SECONDS = 900.0
END_SECONDS = 120.0
"""Until a killed run's processes must have ended. Two agents of Ray's look for its control process for a minute."""

COMMAND, OTHER = "rhythm-train", "a helper of Ray or Python"
KINDS = {
    "a rank of actor_train": r"ray::TrainHost",
    "a replica of actor_infer": r"ray::InferHost",
    "Ray's raylet": r"\S*/raylet\b",
    "Ray's control process": r"\S*/gcs_server\b",
    "a reward process": r".*rhythm\.tasks\.reward_process",
}
"""Kind of process → how its command line begins."""

_PR_SET_CHILD_SUBREAPER = 36
_commands: set[int] = set()  # started, not adopted: subprocess reaps them


@dataclass
class Outcome:
    """What came of a seed. seconds: from the start to the kill; steps: written until then; exit_codes: of the killed
    run and of its resumptions; resumed_after: the steps done when these began; faults: what is wrong.
    """

    seed: int
    seconds: float
    victim: str
    steps: int
    exit_codes: list[int] = field(default_factory=list)
    resumed_after: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        then = f"resumed after step {', '.join(map(str, self.resumed_after))}" if self.resumed_after else "went on"
        return (
            f"seed {self.seed}: {self.victim} killed after {self.seconds:.1f} s and {self.steps} steps, {then}: "
            f"{'; '.join(self.faults) or 'equal'}"
        )


class Trials:
    """Runs in one directory, each compared with the uninterrupted one."""

    def __init__(self, directory: Path, overrides: Sequence[str]) -> None:
        """Run it uninterrupted. `overrides`: of the configuration, as on the command line."""
        self._config = directory / CONFIG.name
        self._config.write_text(CONFIG.read_text())
        self._runs = directory / "runs"
        self._overrides = [f"runs_dir={self._runs}", f"warm_start.cache_dir={directory / 'cache'}", *overrides]
        self._launch("first", "steps=1").finish()  # makes the tiny model that all begin with
        started = time.monotonic()
        self._launch("whole").finish()
        self.seconds = time.monotonic() - started
        self._whole = self._runs / "whole"

    def trial(self, seed: int) -> Outcome:
        """Kill a run as the seed says, resume it if it ended, and compare it."""
        draw = random.Random(seed)
        name, run = f"seed_{seed}", self._runs / f"seed_{seed}"
        moment = draw.uniform(0, self.seconds)
        launched = self._launch(name)
        with suppress(subprocess.TimeoutExpired):
            launched.process.wait(moment)
        written, newest = len(metrics(run)), max([0, *map(_step, _checkpoints(run))])
        memory = {path for process in _descendants() for path in _shared_memory(process)}
        outcome = Outcome(seed, moment, _kill_one(launched.process.pid, draw), written - 1 if written else 0)
        _wait(launched, outcome)
        if metrics(run)[:written] != metrics(self._whole)[:written]:
            outcome.faults.append("steps that were written are lost")
        while outcome.exit_codes[-1] and len(outcome.exit_codes) < 4:
            resumed = self._launch(name, "--resume")
            _wait(resumed, outcome)
            began = re.search(r"continuing after step (\d+)", resumed.output)
            outcome.resumed_after.append(int(began[1]) if began else 0)
            if outcome.resumed_after[-1] < newest:
                outcome.faults.append(f"resumed after step {outcome.resumed_after[-1]}, there was {newest}")
        outcome.faults += self._differences(run)
        outcome.faults += [f"still running: {_name(process)}" for process in _after_their_end()]
        outcome.faults += [f"still there: {path}" for path in sorted(memory) if path.exists()]
        if outcome.faults:
            print(launched.output, flush=True)
        return outcome

    def _differences(self, run: Path) -> list[str]:
        """What is not as in the uninterrupted run."""
        checkpoints = [path.name for path in _checkpoints(self._whole)]
        if [path.name for path in _checkpoints(run)] != checkpoints:
            return [f"checkpoints are {[path.name for path in _checkpoints(run)]}"]
        steps = [_step(path) for path in _checkpoints(run)]
        equal = {
            "metrics": metrics(run) == metrics(self._whole),
            "samples": _contents(run / "samples") == _contents(self._whole / "samples"),
            "weights": all(weights_digest(run, step) == weights_digest(self._whole, step) for step in steps),
        }
        return [f"{what} differ" for what, same in equal.items() if not same]

    def _launch(self, name: str, *arguments: str) -> Launched:
        launched = Launched(self._config, f"name={name}", *self._overrides, *arguments)
        _commands.add(launched.process.pid)
        return launched


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kill_at_random", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(20)))
    parser.add_argument("--no-record", action="store_true", help="only print")
    options = parser.parse_intermixed_args(arguments)
    where = machine()
    path = record_path("cpu", where).with_name("kill_at_random.json")
    about = {"software": software(), "commit": commit(), "overrides": options.overrides}
    # What loses its parent becomes a child of this process, so that all that runs is among its descendants.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    threading.Thread(target=_reap, daemon=True).start()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="kill-at-random-") as scratch:
        trials = Trials(Path(scratch), options.overrides)
        print(f"uninterrupted: {trials.seconds:.1f} s", flush=True)
        for seed in options.seeds:
            outcomes.append(trials.trial(seed))
            print(outcomes[-1], flush=True)
            results = {"seconds": trials.seconds, "trials": [asdict(outcome) for outcome in outcomes]}
            if not options.no_record:
                write_record(path, {"machine": where, **about, **results})
    passed = sum(not outcome.faults for outcome in outcomes)
    print(f"{passed} of {len(outcomes)} ended as the uninterrupted run did")
    if not options.no_record:
        print(path.relative_to(ROOT))
    return 0 if passed == len(outcomes) else 1


def _wait(launched: Launched, outcome: Outcome) -> None:
    """Wait for the run's end; it is ended if that takes too long."""
    try:
        launched.process.wait(RUN_SECONDS)
    except subprocess.TimeoutExpired:
        outcome.faults.append(f"did not end within {RUN_SECONDS:g} s")
        launched.stop()
    outcome.exit_codes.append(launched.process.returncode)


def _kill_one(command: int, draw: random.Random) -> str:
    """Kill the run's command or one of its other processes; returns the kind."""
    kinds: dict[str, list[psutil.Process]] = {}
    for process in sorted(_descendants(), key=lambda process: process.pid):
        kinds.setdefault(COMMAND if process.pid == command else _kind(process), []).append(process)
    if COMMAND not in kinds:
        return "nothing, as it had ended,"
    others = sorted(kinds.keys() - {COMMAND})
    kind = draw.choice(others) if others and draw.random() < 0.5 else COMMAND
    with suppress(psutil.NoSuchProcess):
        draw.choice(kinds[kind]).send_signal(signal.SIGKILL)
    return kind


def _kind(process: psutil.Process) -> str:
    line = _name(process)
    return next((kind for kind, begins in KINDS.items() if re.match(begins, line, re.DOTALL)), OTHER)


def _reap() -> None:
    """Reap adopted processes when they end, as init would: Ray's take a zombie for a process that runs."""
    while True:
        for process in psutil.Process().children():
            with suppress(psutil.NoSuchProcess, ChildProcessError):
                if process.status() == psutil.STATUS_ZOMBIE and process.pid not in _commands:
                    os.waitpid(process.pid, os.WNOHANG)
        time.sleep(0.5)


def _descendants() -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if _runs(process)]


def _runs(process: psutil.Process) -> bool:
    """Whether it has not ended."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _after_their_end() -> list[psutil.Process]:
    """What is still running after END_SECONDS; it is killed, so that it isn't counted again."""
    deadline = time.monotonic() + END_SECONDS
    while (left := _descendants()) and time.monotonic() < deadline:
        time.sleep(0.2)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return left


def _name(process: psutil.Process) -> str:
    """The beginning of its command line."""
    try:
        return " ".join(process.cmdline()).strip()[:400]
    except psutil.Error:
        return f"process {process.pid}"


def _shared_memory(process: psutil.Process) -> set[Path]:
    """The named segments that it maps."""
    try:
        text = Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:
        return set()
    return {Path(path) for path in re.findall(r"\s(/dev/shm/\S+)$", text, re.MULTILINE)}


def _checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step_*"))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


if __name__ == "__main__":
    raise SystemExit(main())
