"""The examples of docs/integrations.md, run unchanged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from rhythm.tiny.model import TinyModelConfig, build_model, build_tokenizer, save_checkpoint

TEXT = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")
MODEL = TinyModelConfig(layers=3, hidden_size=32, mlp_size=32, query_heads=4, key_heads=2, head_size=8)


def example(section: str) -> str:
    """The one block of code of a section."""
    body = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert body is not None
    blocks: list[str] = re.findall(r"^```python\n(.*?)^```$", body[1], re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    return blocks[0]


@pytest.fixture
def names(tmp_path: Path) -> dict[str, Any]:
    """What the examples leave to the reader."""
    tokenizer = build_tokenizer()
    save_checkpoint(build_model(MODEL, tokenizer), tokenizer, tmp_path / "model")
    return {"path": str(tmp_path / "model"), "output_dir": str(tmp_path / "run")}


def test_transformers(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    exec(example("transformers"), names)
    assert len(re.findall(r"layer \d: head \d attends farthest back", capsys.readouterr().out)) == MODEL.layers
    waad = names["waad"]
    assert waad.shape[:2] == (2, 4)
    # Of this tokenizer, which makes every character a token; the second row is padded on the left.
    for row, response in zip(waad, names["responses"], strict=True):
        assert row[:, -len(response) :].isfinite().all()
        assert row[:, : -len(response)].isnan().all()


def test_trl(names: dict[str, Any]) -> None:
    exec(example("TRL"), names)
    trainer = names["trainer"]
    assert trainer.state.global_step == 2
    assert 1 < trainer.state.log_history[0]["rhythm/gamma_mean"] < 1.5
