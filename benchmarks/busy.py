"""python -m benchmarks.busy: seconds per training step while other processes want the cores.

Runs `rhythm-train` on the tiny model, and next to it competing processes of normal priority: none, one, two, or
several that each live for a tenth of a second. A policy is a setting of OpenMP's environment variables: `default`
leaves the choice to the command; any other is written VARIABLE=VALUE[,VARIABLE=VALUE]. Each round runs each policy
once, with the sets of competing processes in an order that changes from round to round; steps during a change are not
counted. Writes a record, and prints a markdown table of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import ROOT
from benchmarks.record import RECORDS, commit, machine, record_path, software, write_record
from rhythm.system.openmp import VARIABLES

SPIN = "while True: pass"
# Processes of a tenth of a second, one after another.
SHORT = """
import subprocess, sys
code = "import time\\nwhile time.process_time() < 0.1: pass"
while True: subprocess.run([sys.executable, "-S", "-c", code])
"""
COMPANY: dict[str, tuple[str, ...]] = {
    "alone": (),
    "one": (SPIN,),
    "two": (SPIN, SPIN),
    "short": (SHORT, SHORT, SHORT),
}
"""Competing programs that run next to the training."""

PLAIN = "GOMP_SPINCOUNT=300000"
"""libgomp's default, for comparison."""

TARGETS = {"one": 1.6, "two": 2.3}
"""Targets: most seconds per step with those competing processes, as a multiple of the plain runtime's alone."""
NO_SLOWER = 1.05
"""Target: most seconds per step alone, as a multiple of the plain runtime's; two equal runs differ by as much."""

CHANGING = 2  # steps not counted after the competing processes changed
QUICK = {
    "batch.prompts_per_batch": "2",
    "batch.responses_per_prompt": "2",
    "batch.mini_batch_size": "4",
    "batch.micro_batch_size": "4",
    "sampling.max_new_tokens": "4",
    "warm_start.steps": "2",
    "task.options.train_size": "200",
}
_START_SECONDS, _STEP_SECONDS = 600, 120

Seconds = dict[str, dict[str, list[float]]]
"""Seconds of each counted step, by policy and competing processes."""


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        seconds: median per step.
        ratio: to the plain runtime without competing processes, or to the policy itself without them if the plain
            runtime was not measured.
        at_most: the target; only `default` has one.
        met: whether the target was met; None without one.
    """

    policy: str
    company: str
    seconds: float
    steps: int
    ratio: float | None
    at_most: float | None
    met: bool | None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.busy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policies", nargs="+", default=["default", PLAIN], metavar="POLICY")
    parser.add_argument("--company", nargs="+", choices=COMPANY, default=list(COMPANY))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--steps", type=int, default=4, help="steps counted per policy, set of competing processes and round"
    )
    parser.add_argument("--quick", action="store_true", help="batches of 4 responses, no targets, no record")
    parser.add_argument(
        "--add", action="store_true", help="add to the steps in the record, if it is of the same commit"
    )
    parser.add_argument("--json", type=Path, help="write the record there too")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the records")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the busy processes end, too
    environments = {policy: environment(policy) for policy in options.policies}
    where, at = machine(), commit()
    path = record_path("cpu", where, options.records).with_name("busy.json")
    seconds = _kept(path, at) if options.add else {}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(options.rounds):
            turned = number % len(options.company)
            company = options.company[turned:] + options.company[:turned]
            for policy, variables in environments.items():
                for name, steps in run(variables, company, options.steps, Path(scratch), options.quick).items():
                    seconds.setdefault(policy, {}).setdefault(name, []).extend(steps)
    rows = table(seconds, targets=not options.quick)
    record = {
        "machine": where,
        "software": software(),
        "commit": at,
        "nice": os.nice(0),
        "config": "configs/countdown_tiny.yaml",
        "rows": [vars(row) for row in rows],
        "seconds": seconds,
    }
    for file in [*([options.json] if options.json else []), *([] if options.quick else [path])]:
        write_record(file, record)
    show(rows)
    return 0


def environment(policy: str) -> dict[str, str]:
    """This process's environment with the policy's variables. Raises SystemExit if it is not a policy."""
    variables = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    if policy == "default":
        return variables
    for word in policy.split(","):
        name, separator, value = word.partition("=")
        if not (name and separator):
            raise SystemExit(f"--policies {policy}: must be default or VARIABLE=VALUE[,VARIABLE=VALUE]")
        variables[name] = value
    return variables


def run(
    variables: Mapping[str, str], company: Sequence[str], steps: int, scratch: Path, quick: bool
) -> dict[str, list[float]]:
    """Run one training process; return the seconds of each counted step, by competing processes.

    Raises RuntimeError if the process ends or makes no more steps.
    """
    folder = Path(tempfile.mkdtemp(dir=scratch))
    command = [
        str(Path(sys.executable).with_name("rhythm-train")),
        str(ROOT / "configs" / "countdown_tiny.yaml"),
        "name=busy",
        f"runs_dir={folder}",
        "steps=100000",
        "tensorboard=false",
        "evaluation.every_steps=100000",
        "evaluation.instances=1",
        "evaluation.samples=0",
        "checkpoint.every_steps=100000",
        *(f"{key}={value}" for key, value in (QUICK.items() if quick else ())),
        *([f"warm_start.cache_dir={scratch / 'cache'}"] if quick else []),
    ]
    log = folder / "log"
    with log.open("wb") as file:
        trainer = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=file, stderr=file)
    metrics = folder / "busy" / "metrics.jsonl"
    counted = {}
    try:
        _wait(trainer, metrics, 2, _START_SECONDS, log)  # the line of the start, and one step to warm up
        for name in company:
            with beside(COMPANY[name]):
                first = len(_lines(metrics)) + CHANGING
                _wait(trainer, metrics, first + steps, _STEP_SECONDS * (CHANGING + steps), log)
                counted[name] = [json.loads(line)["seconds_total"] for line in _lines(metrics)[first : first + steps]]
    finally:
        trainer.terminate()  # it finishes its step and saves a checkpoint
        try:
            trainer.wait(_STEP_SECONDS)
        except subprocess.TimeoutExpired:
            trainer.kill()
            trainer.wait()
    return counted


@contextmanager
def beside(programs: Sequence[str]) -> Iterator[None]:
    """Run these Python programs until the block ends; then kill them and their children."""
    processes = [subprocess.Popen([sys.executable, "-S", "-c", code], start_new_session=True) for code in programs]
    try:
        yield
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def table(seconds: Seconds, *, targets: bool) -> list[Row]:
    """Medians, and their ratios to the plain runtime without competing processes."""
    rows = []
    for policy, by_company in seconds.items():
        base = seconds.get(PLAIN, {}).get("alone") or by_company.get("alone")
        for company, steps in by_company.items():
            median = statistics.median(steps)
            ratio = median / statistics.median(base) if base else None
            against_plain = bool(seconds.get(PLAIN, {}).get("alone"))
            at_most = TARGETS.get(company, NO_SLOWER if company == "alone" and against_plain else None)
            if policy != "default" or not targets or ratio is None:
                at_most = None
            met = None if at_most is None or ratio is None else ratio <= at_most
            rows.append(Row(policy, company, median, len(steps), ratio, at_most, met))
    return rows


def show(rows: Sequence[Row]) -> None:
    """Print the markdown table."""
    print("| policy | competing | s per step | steps | ratio to the plain runtime alone | target |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        target = "" if row.at_most is None else f"≤ {row.at_most}: {'met' if row.met else 'missed'}"
        print(f"| {row.policy} | {row.company} | {row.seconds:.2f} | {row.steps} | {ratio} | {target} |")


def _kept(path: Path, at: Mapping[str, object]) -> Seconds:
    """The seconds in the record at `path`; empty if it is of another commit."""
    if not path.is_file():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    seconds: Seconds = record["seconds"] if record["commit"] == at else {}
    return seconds


def _lines(metrics: Path) -> list[str]:
    """The complete lines of the file."""
    return metrics.read_text(encoding="utf-8").split("\n")[:-1] if metrics.exists() else []


def _wait(trainer: subprocess.Popen[bytes], metrics: Path, lines: int, seconds: float, log: Path) -> None:
    end = time.monotonic() + seconds
    while len(_lines(metrics)) < lines:
        if trainer.poll() is not None or time.monotonic() > end:
            what = "still runs" if trainer.poll() is None else f"ended with code {trainer.returncode}"
            tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise RuntimeError(f"{len(_lines(metrics))} of {lines} steps, and rhythm-train {what}:\n{tail}")
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main())
