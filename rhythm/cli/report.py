"""rhythm-report RUN_DIR: writes the report of a run, finished or not, and prints where it is."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rhythm.cli.failures import EXIT_CODES, ExitCode, command, show
from rhythm.reports.run import write_report


@command("rhythm-report", {ValueError: ExitCode.BAD_INPUT})
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 with the report's path on stdout, or another with the reason on stderr."""
    parser = argparse.ArgumentParser(
        prog="rhythm-report",
        description="Write report.html into a run's directory: curves, and sampled responses with signals.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXIT_CODES,
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="what rhythm-train wrote: runs/<name>")
    run_dir = parser.parse_args(arguments).run_dir
    show(str(write_report(run_dir)))
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
