"""The console scripts. If a required package is missing, they print in one line which extra to install."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from importlib import import_module

from rhythm.system.extras import missing, package_of
from rhythm.system.openmp import ThreadWatch, choose_waiting

CANT_RUN = 2


def train() -> int:
    return _run("train", extra="train")


def analyze() -> int:
    return _run("analyze", extra="analyze")


def eval() -> int:
    return _run("eval", extra="train")


def report() -> int:
    return _run("report", extra="train")


def sweep() -> int:
    return _run("sweep", extra="train")


def doctor() -> int:
    return _run("doctor", extra="train")


def _run(name: str, *, extra: str) -> int:
    """The exit code of rhythm.cli.<name>.main(), or 2 where its module can't be imported without the extra."""
    chosen = choose_waiting()  # before torch is loaded
    try:
        module = import_module(f"rhythm.cli.{name}")
    except ModuleNotFoundError as error:
        package = package_of(error)
        if package is None:
            raise
        print(missing(f"rhythm-{name}", package, extra), file=sys.stderr)
        return CANT_RUN
    with ThreadWatch() if chosen else nullcontext():
        code: int = module.main()
    return code
