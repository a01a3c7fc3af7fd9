"""The installed version of rhythm, from the package's metadata; in a tree that is not installed, pyproject.toml's."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

_PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def _version() -> str:
    try:
        return importlib.metadata.version("rhythm")
    except importlib.metadata.PackageNotFoundError:
        if not _PYPROJECT.is_file():
            return "0+unknown"
        return f"{tomllib.loads(_PYPROJECT.read_text(encoding='utf-8'))['project']['version']}+unknown"


__version__ = _version()
