"""python -m benchmarks.busy: seconds per training step while other processes want the cores.

Runs `rhythm-train` on the tiny model, as a user runs it, and starts and ends busy processes of normal priority beside
it: none, one, two, or several that live a tenth of a second each. A policy is what the environment says about
OpenMP's threads: `default` leaves the choice to the command, any other is written VARIABLE=VALUE[,VARIABLE=VALUE].
Every round runs every policy once, the company in an order that changes from round to round; steps while the company
changes are not counted. Writes a record, and prints a markdown table of medians.
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
"""Programs that run beside the training."""

PLAIN = "GOMP_SPINCOUNT=300000"
"""libgomp's own number: what it does where nobody chooses."""

AIMS = {"one": 1.6, "two": 2.3}
"""Most seconds per step with that company, as a multiple of the plain runtime's alone."""
NO_SLOWER = 1.05
"""Most seconds per step alone, as a multiple of the plain runtime's: what two runs of the same differ by."""

CHANGING = 2  # steps not counted after the company changed
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
"""Of every step counted, by policy and company."""


@dataclass(frozen=True)
class Row:
    """A line of the table. seconds: median per step; ratio: to the plain runtime's alone, or to the policy's own where
    that was not measured; at_most: the aim, of `default` alone; met: None without one.
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
    parser.add_argument("--steps", type=int, default=4, help="steps counted, of each policy and company in each round")
    parser.add_argument("--quick", action="store_true", help="batches of 4 responses, no aims, no record")
    parser.add_argument("--add", action="store_true", help="to the steps in the record, if it is of the same commit")
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
    rows = table(seconds, aims=not options.quick)
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
    """This process's variables with those of the policy. Raises SystemExit for what is no policy."""
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
    """Seconds of each step counted, by company, of one training process.

    Raises RuntimeError if it ends or stops making steps.
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
    found = {}
    try:
        _wait(trainer, metrics, 2, _START_SECONDS, log)  # the start's line, and a first step that warms up
        for name in company:
            with beside(COMPANY[name]):
                first = len(_lines(metrics)) + CHANGING
                _wait(trainer, metrics, first + steps, _STEP_SECONDS * (CHANGING + steps), log)
                found[name] = [json.loads(line)["seconds_total"] for line in _lines(metrics)[first : first + steps]]
    finally:
        trainer.terminate()  # it saves a checkpoint after the step it is at
        try:
            trainer.wait(_STEP_SECONDS)
        except subprocess.TimeoutExpired:
            trainer.kill()
            trainer.wait()
    return found


@contextmanager
def beside(programs: Sequence[str]) -> Iterator[None]:
    """These Python programs run until the block is left, with all that they started."""
    processes = [subprocess.Popen([sys.executable, "-S", "-c", code], start_new_session=True) for code in programs]
    try:
        yield
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def table(seconds: Seconds, *, aims: bool) -> list[Row]:
    """Medians, and what they are of the plain runtime's alone."""
    rows = []
    for policy, by_company in seconds.items():
        base = seconds.get(PLAIN, {}).get("alone") or by_company.get("alone")
        for company, steps in by_company.items():
            median = statistics.median(steps)
            ratio = median / statistics.median(base) if base else None
            against_plain = bool(seconds.get(PLAIN, {}).get("alone"))
            at_most = AIMS.get(company, NO_SLOWER if company == "alone" and against_plain else None)
            if policy != "default" or not aims or ratio is None:
                at_most = None
            met = None if at_most is None or ratio is None else ratio <= at_most
            rows.append(Row(policy, company, median, len(steps), ratio, at_most, met))
    return rows


def show(rows: Sequence[Row]) -> None:
    """The markdown table on stdout."""
    print("| policy | beside | s per step | steps | to the plain runtime alone | aim |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        aim = "" if row.at_most is None else f"≤ {row.at_most}: {'met' if row.met else 'missed'}"
        print(f"| {row.policy} | {row.company} | {row.seconds:.2f} | {row.steps} | {ratio} | {aim} |")


def _kept(path: Path, at: Mapping[str, object]) -> Seconds:
    """Of the record there; nothing if it is of another commit."""
    if not path.is_file():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    seconds: Seconds = record["seconds"] if record["commit"] == at else {}
    return seconds


def _lines(metrics: Path) -> list[str]:
    """The finished ones."""
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
