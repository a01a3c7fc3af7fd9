"""The loop of docs/own_loop.md, run unchanged on a tiny model with random weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rhythm.tiny.model import TinyModelConfig, build_model, build_tokenizer, save_checkpoint

TEXT = (Path(__file__).parents[2] / "docs" / "own_loop.md").read_text(encoding="utf-8")
MODEL = TinyModelConfig(layers=3, hidden_size=32, mlp_size=32, query_heads=4, key_heads=2, head_size=8)


@pytest.fixture
def names(tmp_path: Path) -> dict[str, Any]:
    """What the page leaves to the reader."""
    tokenizer = build_tokenizer()
    save_checkpoint(build_model(MODEL, tokenizer), tokenizer, tmp_path)
    return {"path": str(tmp_path), "prompts": ["1+2=", "10+17="], "steps": 25, "learning_rate": 1e-2}


def test_the_loop_learns_its_reward(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    (loop,) = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    exec(loop, names)
    assert capsys.readouterr().out.count("reward") == 25
    history = names["history"]
    assert history[0] < 0.15  # one of some twenty characters
    assert history[-1] > 0.6

    # What the last step left behind: γ and the advantages it made, worked out again from their definitions.
    gamma, response, advantages, rewards = (names[name] for name in ("gamma", "response", "advantages", "rewards"))
    assert (gamma[~response] == 1).all()
    assert set(gamma[response].unique().tolist()) <= {1.0, 1.25, 1.5, 1.75, 2.0}
    assert (gamma[response] > 1).any()
    for row in range(16):
        of_group = rewards[row // 8 * 8 : row // 8 * 8 + 8]
        advantage = (rewards[row] - of_group.mean()) / (of_group.std() + 1e-4)
        expected = torch.where(advantage >= 0, gamma[row] * advantage, advantage) * response[row]
        torch.testing.assert_close(advantages[row], expected, rtol=1e-4, atol=1e-4)
