"""The version of rhythm: from the metadata of the installed package, else from pyproject.toml."""

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
