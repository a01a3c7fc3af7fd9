"""Builds the commands' argument parsers and splits CONFIG from key=value overrides."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from rhythm.cli.failures import EXIT_CODES

_OVERRIDE = re.compile(r"[^/]*=")


def command_parser(name: str, usage: str, description: str) -> argparse.ArgumentParser:
    """A parser whose help ends with the exit codes; the command adds -h itself. Parse with `parse_intermixed_args`,
    which allows options between the positional words.
    """
    return argparse.ArgumentParser(
        prog=name,
        usage=f"{name} {usage}",
        description=description,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )


def config_and_overrides(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """CONFIG, if the first word is a file, and the overrides: `a.b=c` is an override, `./a=b.yaml` a file."""
    if not words or _OVERRIDE.match(words[0]):
        return None, list(words)
    return Path(words[0]), list(words[1:])
