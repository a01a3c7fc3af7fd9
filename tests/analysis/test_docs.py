"""The examples of docs/analysis.md, run unchanged except for sizes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from rhythm.cli import analyze as command
from rhythm.tiny.model import TinyModelConfig, build_model, build_tokenizer

TEXT = (Path(__file__).parents[2] / "docs" / "analysis.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [match[2] for match in FENCE.finditer(TEXT) if match[1] == language]


def test_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = build_tokenizer()
    shape = TinyModelConfig(layers=3, hidden_size=32, mlp_size=32, query_heads=4, key_heads=2, head_size=8)
    names: dict[str, Any] = {"model": build_model(shape, tokenizer), "tokenizer": tokenizer}
    call, _, matched = blocks("python")
    exec(call, names)
    assert re.findall(r"^(0000\d-0) \[", capsys.readouterr().out, re.MULTILINE) == ["00001-0", "00002-0"]
    Path("runs/two").rename("runs/analysis-trained")
    exec(matched, {})
    assert "group" in capsys.readouterr().out


def test_commands(tmp_path: Path) -> None:
    *others, many = blocks("bash")
    options = shlex.split(re.search(r'options="(.*)"', many)[1])  # type: ignore[index]
    lines = [line for line in "".join([*others, many]).splitlines() if line.startswith("rhythm-analyze")]
    assert len(lines) == 7
    for line in lines:
        words = [part for word in shlex.split(line)[1:] for part in (options if word == "$options" else [word])]
        config = command._config(command._parser().parse_intermixed_args(words))
        assert config.signals.horizon == ((2, 10) if "$options" in line else (10, 50))
