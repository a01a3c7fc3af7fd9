"""rhythm-sweep: trains one configuration by several methods and seeds, and keeps the results as CSV."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rhythm.cli.arguments import command_parser, config_and_overrides
from rhythm.cli.config_file import ConfigError, load_config, read_config
from rhythm.cli.config_keys import config_keys, describe
from rhythm.cli.failures import SIGNALLED, ErrorConsole, ExitCode, command, show
from rhythm.sweep.config import PlannedRun, SweepConfig, plan
from rhythm.sweep.results import Results, read_results
from rhythm.sweep.run import SweepOutcome, left, run_sweep
from rhythm.system.progress import duration

EXAMPLE = SweepConfig(methods={"grpo": {"credit.strategy": "none"}})


@command("rhythm-sweep", {ValueError: ExitCode.BAD_INPUT})
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns an `ExitCode`; FAULT where a run failed."""
    arguments = _parser().parse_intermixed_args(argv)
    sys.path.append(str(Path.cwd()))  # to find the user's own task; last, so that it shadows no installed module
    if arguments.help:
        keys = describe(list(config_keys(EXAMPLE)))
        show(f"{_parser().format_help()}\nkeys of a sweep, their types and defaults:\n{keys}")
        return ExitCode.DONE
    path, overrides = config_and_overrides(arguments.words)
    if path is None:
        raise ConfigError("no sweep given: rhythm-sweep SWEEP.yaml, or rhythm-sweep --help")
    # Methods and overrides hold keys of rhythm-train, which are checked with the runs' configurations.
    sweep = read_config(SweepConfig, path, overrides, like=EXAMPLE)
    base = sweep.base if sweep.base.is_absolute() else path.parent / sweep.base
    runs = plan(sweep, lambda keys: load_config(base, keys))
    if arguments.dry_run:
        show(_dry_run(sweep, runs))
        return ExitCode.DONE
    outcome = run_sweep(sweep, runs, ErrorConsole())
    show(_summary(sweep, runs, outcome))
    if outcome.stopped_by is not None:
        return SIGNALLED + outcome.stopped_by
    return ExitCode.FAULT if outcome.failures else ExitCode.DONE


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "rhythm-sweep",
        "SWEEP.yaml [key=value …] [--dry-run]",
        "Train a base configuration by every method and seed of a sweep, several runs at once. Results go to\n"
        "<out>/<name>/runs.csv and curves.csv as runs end. The same command again goes on where it stopped, from\n"
        "these files alone where the runs' directories are gone; what is done is not run again.",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="SWEEP key=value",
        help="a YAML file, and overrides, for example jobs=2 seeds='[1, 2]'",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check all configurations; print the runs and the estimated time"
    )
    parser.add_argument("-h", "--help", action="store_true", help="print this, with every key and its default")
    return parser


def _dry_run(sweep: SweepConfig, runs: Sequence[PlannedRun]) -> str:
    """What is done and what is left, and how long it takes, from the runs that are done."""
    results = read_results(sweep.results)
    todo = {(run.method, run.seed) for run in left(runs, results, sweep.results)}
    lines = []
    for run in runs:
        row = results.row(run.method, run.seed)
        state = "to run" if row is None else f"done: {row.start:.1%} → {row.final:.1%} in {duration(row.seconds)}"
        lines.append(f"{run.method:24}seed {run.seed:<4}{run.config.steps} steps  {state}")
    lines.append(f"{len(todo)} of {len(runs)} runs left; results in {sweep.results}")
    seconds = _estimate(runs, results, todo)
    hours = "not known before the first run is done" if seconds is None else f"{seconds / 3600:.1f} hours of one job"
    lines.append(f"estimated: {hours}")
    return "\n".join(lines)


def _estimate(runs: Sequence[PlannedRun], results: Results, todo: set[tuple[str, int]]) -> float | None:
    """Seconds of what is left, one run after the other: by the method's own seconds per step, else by all methods'."""
    done = [row for row in results.runs if row.steps]
    if not done:
        return None
    total = 0.0
    for run in runs:
        if (run.method, run.seed) in todo:
            rows = [row for row in done if row.method == run.method] or done
            total += run.config.steps * sum(row.seconds for row in rows) / sum(row.steps for row in rows)
    return total


def _summary(sweep: SweepConfig, runs: Sequence[PlannedRun], outcome: SweepOutcome) -> str:
    """A line per method: its mean accuracy over the seeds done; then what failed, and where the results are."""
    lines = [f"{'method':24}{'seeds':>5}{'start':>9}{'final':>9}"]
    for method in sweep.methods:
        rows = [row for run in runs if run.method == method if (row := outcome.results.row(method, run.seed))]
        if rows:
            start, final = (sum(values) / len(rows) for values in zip(*((r.start, r.final) for r in rows), strict=True))
            lines.append(f"{method:24}{len(rows):>5}{start:>9.1%}{final:>9.1%}")
    for failure in outcome.failures:
        lines.append(f"{failure.run.name} failed with exit code {failure.code}, {failure.log} ends:\n{failure.said}")
    if outcome.stopped_by is not None:
        lines.append(f"stopped by {outcome.stopped_by.name}; the same command goes on from there")
    lines.append(f"results     {sweep.results}")
    lines.append(f"the report  rhythm-report {sweep.results}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
