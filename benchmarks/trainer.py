"""python -m benchmarks.trainer: seconds per training step, of rhythm-train and of TRL's GRPOTrainer on the same work.

Both train the same warm-started tiny model on the same prompts: configs/countdown_tiny.yaml, 256 responses of up to 20
tokens, 4 gradient steps. Each trainer has a process of its own; the processes take their steps in turn, so that a
disturbance of the machine affects all alike. The first steps are not counted. Writes a record and prints a markdown
table of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import ROOT, busy
from benchmarks.record import RECORDS, commit, machine, record_path, software, write_record
from benchmarks.trainer_workers import PARTS, Seconds
from rhythm.cli.config_file import load_config
from rhythm.tiny.warm_start import warm_start
from rhythm.trainer.setup import build_task

CONFIG = ROOT / "configs" / "countdown_tiny.yaml"
TRL, GAMMA, IN_TRAINING = "TRL", "rhythm, γ inline", "rhythm, γ in training"
TRAINERS: dict[str, tuple[str, dict[str, str]]] = {
    TRL: ("trl", {}),
    "rhythm, GRPO": ("rhythm", {"credit.strategy": "none"}),
    GAMMA: ("rhythm", {}),
    IN_TRAINING: ("rhythm", {"signals.source": "training", "batch.old_logprobs": "rollout"}),
}
"""Name of a trainer → its worker, and the overrides of the configuration."""

QUICK = {**busy.QUICK, "batch.mini_batch_size": "2", "batch.micro_batch_size": "2"}  # of several gradient steps

TIMES_FASTER = 2.0
"""Target: TRL's seconds per step, as a multiple of those with γ, inline and in training."""
GAMMA_SHARE = 0.03
"""Target: most of a step that statistics and γ take inline."""


@dataclass(frozen=True)
class Row:
    """A row of the table: medians over the counted steps.

    Attributes:
        seconds: per step by part (PARTS).
        faster: median over the rounds of TRL's seconds per step to this trainer's in the same round; None without TRL.
        faster_cpu: the same of processor seconds.
        gamma_share: median of γ's part of a step.
    """

    trainer: str
    steps: int
    seconds: Seconds
    faster: float | None
    faster_cpu: float | None
    gamma_share: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trainer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS), metavar="TRAINER")
    parser.add_argument("--steps", type=int, default=12, help="counted training steps of each trainer")
    parser.add_argument("--warm-up", type=int, default=3, help="training steps before them")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads")
    parser.add_argument("--quick", action="store_true", help="batches of 4 responses, no targets, no record")
    parser.add_argument("--json", type=Path, help="write the record there too")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the records")
    options = parser.parse_args(arguments)
    where, at, load = machine(), commit(), os.getloadavg()[0]  # before the run: files may change during it
    seconds = run(options.trainers, options.warm_up, options.steps, options.threads, QUICK if options.quick else {})
    rows = table(seconds)
    path = record_path("cpu", where, options.records).with_name("trainer.json")
    record = {
        "machine": where,
        "software": {**software(), "transformers": version("transformers"), "trl": version("trl")},
        "commit": at,
        "config": str(CONFIG.relative_to(ROOT)),
        "threads": options.threads,
        "load_before": load,
        "targets": {} if options.quick else targets(rows),
        "rows": [vars(row) for row in rows],
        "seconds": seconds,
    }
    for file in [*([options.json] if options.json else []), *([] if options.quick else [path])]:
        write_record(file, record)
    show(rows)
    for target, met in ({} if options.quick else targets(rows)).items():
        print(f"{target}: {'met' if met else 'missed'}")
    return 0


def run(
    trainers: Sequence[str], warm_up: int, steps: int, threads: int, overrides: Mapping[str, str]
) -> dict[str, list[Seconds]]:
    """The seconds by part of each counted step, by trainer; one step of each trainer in turn.

    Raises RuntimeError if a trainer's process ends.
    """
    config = load_config(CONFIG, [f"{key}={value}" for key, value in overrides.items()])
    start = warm_start(build_task(config), config.warm_start, Console(stderr=True))
    common = {**overrides, "steps": str(warm_up + steps), "model.path": str(start.directory.resolve())}
    seconds: dict[str, list[Seconds]] = {name: [] for name in trainers}
    with ExitStack() as stack:
        workers = {}
        for name in trainers:
            worker, own = TRAINERS[name]
            workers[name] = stack.enter_context(_worker(worker, {**common, **own}, threads))
            _answer(name, workers[name])
        for step in range(warm_up + steps):
            for name, process in workers.items():
                assert process.stdin is not None
                process.stdin.write("step\n")
                process.stdin.flush()
                parts = _answer(name, process)
                if step >= warm_up:
                    seconds[name].append(parts)
    return seconds


@contextmanager
def _worker(name: str, overrides: Mapping[str, str], threads: int) -> Iterator[subprocess.Popen[str]]:
    """The process of a trainer, until the block is left."""
    words = [f"{key}={value}" for key, value in overrides.items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.trainer_workers", name, str(CONFIG), str(threads), *words],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _answer(name: str, process: subprocess.Popen[str]) -> Seconds:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the process of {name} ended with code {process.wait()}, see above")
    answer: Seconds = json.loads(line)
    return answer


def table(seconds: Mapping[str, Sequence[Seconds]]) -> list[Row]:
    """Medians over the steps."""
    rows = []
    for name, steps in seconds.items():
        medians = {part: statistics.median(step[part] for step in steps) for part in PARTS}
        share = statistics.median(step["gamma"] / step["total"] for step in steps)
        faster = [_ratio(seconds.get(TRL, []), steps, of) for of in ("total", "cpu")]
        rows.append(Row(name, len(steps), medians, faster[0], faster[1], share))
    return rows


def _ratio(trl: Sequence[Seconds], ours: Sequence[Seconds], of: str) -> float | None:
    """Median over the rounds; None without TRL."""
    ratios = [theirs[of] / mine[of] for theirs, mine in zip(trl, ours, strict=False)]
    return statistics.median(ratios) if ratios else None


def targets(rows: Sequence[Row]) -> dict[str, bool]:
    """Whether the targets of the rows with γ were met; those without TRL are compared with nothing."""
    with_gamma = [row for row in rows if row.trainer in (GAMMA, IN_TRAINING)]
    met = {
        f"{row.trainer} at least {TIMES_FASTER:g} times as fast as TRL": row.faster >= TIMES_FASTER
        for row in with_gamma
        if row.faster is not None
    }
    shares = [row.gamma_share for row in with_gamma if row.trainer == GAMMA]
    return met | {f"γ inline takes at most {GAMMA_SHARE:.0%} of a step": share <= GAMMA_SHARE for share in shares}


def show(rows: Sequence[Row]) -> None:
    """Print the markdown table."""
    print(f"| s per step | {' | '.join(PARTS).replace('_', '-')} | TRL's total / total | TRL's cpu / cpu | γ's share |")
    print(f"|---{'|---' * (len(PARTS) + 3)}|")
    for row in rows:
        numbers = " | ".join(f"{row.seconds[part]:.3f}" for part in PARTS)
        faster = " | ".join("" if ratio is None else f"{ratio:.2f}" for ratio in (row.faster, row.faster_cpu))
        print(f"| {row.trainer} | {numbers} | {faster} | {row.gamma_share:.1%} |")


if __name__ == "__main__":
    sys.exit(main())
