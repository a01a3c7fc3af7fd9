"""python -m benchmarks.gpu check | race | record: one of the three commands of `make gpu`.

Exit code 1: a result or an op of rhythm is wrong or failed; 2: there is no such device.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

COMMANDS = {"check": "benchmarks.gpu.check", "race": "benchmarks.gpu.race", "record": "benchmarks.gpu.run"}
DEVICES = ("cuda", "interpreter", "rehearsal")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.device != "cuda":
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it defines kernels

    from benchmarks.gpu.clock import Budget
    from benchmarks.gpu.report import Plain
    from benchmarks.record import RECORDS

    # The interpreter's times are meaningless and a rehearsal's made up: they are recorded only into a given directory.
    records = options.records or (RECORDS if options.device == "cuda" else None)
    run = import_module(COMMANDS[options.command]).run
    return int(run(options.device, records, Plain(), Plain(), Budget(options.budget)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--device", choices=DEVICES, default="cuda")
    parser.add_argument("--budget", type=float, default=480, metavar="S", help="seconds to end within (480)")
    parser.add_argument("--records", type=Path, metavar="DIR", help="where records are kept")
    return parser


if __name__ == "__main__":
    sys.exit(main())
