"""rhythm-report RUN_DIR: writes the report of a run, finished or not, and prints its path."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rhythm.cli.arguments import command_parser
from rhythm.cli.failures import ExitCode, command, show
from rhythm.reports.run import load_run, write_report


@command("rhythm-report", {ValueError: ExitCode.BAD_INPUT})
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: prints the report's path on stdout, or an error on stderr; returns an `ExitCode`."""
    parser = command_parser(
        "rhythm-report",
        "RUN_DIR [--dry-run]",
        "Write report.html into a run's directory: curves, and sampled responses with signals. It shows what the run\n"
        "recorded; there is nothing to configure.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory that rhythm-train wrote: runs/<name>")
    parser.add_argument("--dry-run", action="store_true", help="read the run and print what it holds; write nothing")
    parser.add_argument("-h", "--help", action="help", help="print this")
    arguments = parser.parse_args(argv)
    show(_dry_run(arguments.run_dir) if arguments.dry_run else str(write_report(arguments.run_dir)))
    return ExitCode.DONE


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
