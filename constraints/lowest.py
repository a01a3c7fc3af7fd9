"""Constraints for pip: what rhythm and some extras need, at the lowest versions that pyproject.toml allows.

python constraints/lowest.py models train analyze > build/lowest.txt
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement


def lowest(project: dict[str, object], extras: list[str]) -> dict[str, str]:
    """name → version, of the project's own requirements and those of `extras`, which may name each other."""
    own, optional = project["dependencies"], project["optional-dependencies"]
    bounds_by_name: dict[str, str] = {}
    waiting, seen = [*own, *(line for extra in extras for line in optional[extra])], set(extras)
    while waiting:
        requirement = Requirement(waiting.pop())
        if requirement.name == project["name"]:
            waiting += [line for extra in requirement.extras - seen for line in optional[extra]]
            seen |= requirement.extras
            continue
        bounds = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        if len(bounds) != 1:
            raise ValueError(f"{requirement}: one lower bound (>=) is needed")
        bounds_by_name[requirement.name] = bounds[0]
    return bounds_by_name


if __name__ == "__main__":
    pyproject = Path(__file__).parent.parent / "pyproject.toml"
    for name, version in sorted(lowest(tomllib.loads(pyproject.read_text())["project"], sys.argv[1:]).items()):
        print(f"{name}=={version}")
