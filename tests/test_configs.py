"""Every file in configs/ is a valid configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from rhythm.cli.config_file import load_config

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def test_there_are_some() -> None:
    assert [path.name for path in CONFIGS]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_parses_and_is_named_after_its_file(path: Path) -> None:
    assert load_config(path).name == path.stem
