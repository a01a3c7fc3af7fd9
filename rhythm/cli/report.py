"""rhythm-report RUN…: the page of a run, or a comparison of several, written from what they recorded."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, Field

from rhythm.cli.arguments import command_parser
from rhythm.cli.config_file import ConfigError, dump_config, read_config
from rhythm.cli.config_keys import config_keys, describe
from rhythm.cli.failures import ExitCode, command, show
from rhythm.reports.comparison import At
from rhythm.reports.comparison_page import Comparison, compare, write_comparison
from rhythm.reports.evaluations import holds_an_evaluation
from rhythm.reports.run import load_run, write_report
from rhythm.sweep.report import holds_a_sweep, summarize, write_sweep_report

_OVERRIDE = re.compile(r"[A-Za-z_.]+=")


class ReportConfig(BaseModel, extra="forbid", frozen=True):
    """How several runs are compared; the page of a single run has no settings."""

    runs: tuple[Path, ...] = Field(default=(), description="directories of the runs, where none is named by itself")
    out: Path | None = Field(
        default=None, description="directory of the comparison; null: `comparison` beside the first run"
    )
    labels: dict[str, str] = Field(
        default={},
        description="method of a run, by its directory's name, in place of the one its configuration says",
    )
    baseline: str | None = Field(default=None, description="method that gains are over; null: GRPO")
    at: At = Field(
        default="final",
        description="value of a run in the tables: of its last evaluation, of its best, or where its running peak ends",
    )
    peak_alpha: float = Field(default=0.3, gt=0, le=1, description="weight of a new peak in the running-peak average")


@command("rhythm-report", {ValueError: ExitCode.BAD_INPUT})
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: prints the report's path on stdout, or an error on stderr; returns an `ExitCode`."""
    parser = command_parser(
        "rhythm-report",
        "RUN_DIR… [CONFIG] [key=value …] [--dry-run]",
        "Of one run: write report.html into its directory: curves, and sampled responses with signals. Of several:\n"
        "write tables (method × task, gains over GRPO paired by seed), curves and the commands that make the runs\n"
        "again, as report.html, report.md, CSV, PNG and PDF, into a directory of their own; directories that\n"
        "rhythm-eval wrote are runs, too. Of the results of\n"
        "rhythm-sweep (a directory with runs.csv): differences to GRPO paired by seed, with intervals and p-values.",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RUN_DIR",
        help="directories that rhythm-train wrote: runs/<name>; a YAML file and key=value for several runs",
    )
    parser.add_argument("--dry-run", action="store_true", help="read the runs and print what they hold; write nothing")
    parser.add_argument("-h", "--help", action="store_true", help="print this, with every key and its default")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.help:
        keys = describe(list(config_keys(ReportConfig())))
        show(f"{parser.format_help()}\nkeys for a comparison, their types and defaults:\n{keys}")
        return ExitCode.DONE
    config = _config(arguments.words)
    if len(config.runs) == 1:
        only = config.runs[0]
        if holds_an_evaluation(only):
            raise ConfigError(
                f"{only} holds an evaluation, whose page rhythm-eval wrote: report.html there; name several to compare"
            )
        if holds_a_sweep(only):
            return _sweep(only, config, dry_run=arguments.dry_run)
        if config.model_copy(update={"runs": ()}) != ReportConfig():
            raise ConfigError("a single run has a page without settings: name several runs, or leave the keys out")
        show(_dry_run(only) if arguments.dry_run else str(write_report(only)))
        return ExitCode.DONE
    comparison = compare(
        config.runs, labels=config.labels, baseline=config.baseline, at=config.at, peak_alpha=config.peak_alpha
    )
    out = config.out or config.runs[0].resolve().parent / "comparison"
    if arguments.dry_run:
        show(_dry_comparison(config, comparison, out))
        return ExitCode.DONE
    show("\n".join(map(str, write_comparison(comparison, out))))
    return ExitCode.DONE


def _sweep(directory: Path, config: ReportConfig, *, dry_run: bool) -> int:
    """The report of a sweep's results, which has one setting: the baseline."""
    if config.model_copy(update={"runs": (), "baseline": None}) != ReportConfig():
        raise ConfigError("the report of a sweep has one setting, baseline=METHOD: leave the other keys out")
    if dry_run:
        report = summarize(directory, config.baseline)
        show("\n".join(f"# {row.method}: {len(row.seeds)} seeds" for row in report.methods))
    else:
        show("\n".join(map(str, write_sweep_report(directory, config.baseline))))
    return ExitCode.DONE


def _config(words: Sequence[str]) -> ReportConfig:
    """Raises ConfigError naming the keys at fault, and where no run is named."""
    overrides = [word for word in words if _OVERRIDE.match(word)]
    paths = [Path(word) for word in words if not _OVERRIDE.match(word)]
    files = [path for path in paths if path.suffix in (".yaml", ".yml") and not path.is_dir()]
    runs = [path for path in paths if path not in files]
    if len(files) > 1:
        raise ConfigError(f"{files[1]}: there is one configuration already, {files[0]}")
    config = read_config(ReportConfig, files[0] if files else None, overrides, given={"runs": runs} if runs else None)
    if not config.runs:
        raise ConfigError("no run given: rhythm-report RUN_DIR…, or rhythm-report --help")
    return config


def _dry_comparison(config: ReportConfig, comparison: Comparison, out: Path) -> str:
    """What the comparison would contain."""
    lines = [f"# {run.directory}: {run.method}, seed {run.seed}" + (f", {run.block}" if run.block else "")
             for run in comparison.runs]  # fmt: skip
    tasks = ", ".join(f"{column.task} ({column.metric})" for column in comparison.columns)
    return "\n".join([f"{dump_config(config)}# derived", *lines, f"# tasks: {tasks}", f"# out: {out}"])


def _dry_run(run_dir: Path) -> str:
    """What the report would contain. Raises ValueError if the directory holds no run."""
    run = load_run(run_dir)
    path = run_dir / "report.html"
    steps = [int(record["step"]) for record in run.records]
    responses = sum(map(len, run.samples.values()))
    return (
        f"# steps: {steps[0]} to {steps[-1]}, {len(steps)} recorded\n"
        f"# sampled responses: {responses}, of {len(run.samples)} steps\n"
        f"# configuration: {'config.yaml' if run.config is not None else 'none'}\n"
        f"# report: {path} ({'there is one; it would be replaced' if path.exists() else 'new'})"
    )


if __name__ == "__main__":
    sys.exit(main())
