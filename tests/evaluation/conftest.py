"""A checkpoint small enough for tests: a random Qwen3 of three narrow layers that knows Countdown's characters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rhythm.tiny.model import TinyModelConfig, build_model, build_tokenizer, save_checkpoint

OPTIONS = "format: steps, numbers: 2, max_number: 9, max_target: 18, train_size: 60, test_size: 16, format_score: 0.2"
COUNTDOWN = f"{{name: countdown, options: {{{OPTIONS}}}}}"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = build_tokenizer()
    shape = {"hidden_size": 32, "mlp_size": 48, "query_heads": 2, "key_heads": 1, "head_size": 32}
    model = build_model(TinyModelConfig(layers=3, **shape), tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    save_checkpoint(model, tokenizer, directory)
    return directory


@pytest.fixture
def countdown() -> str:
    return COUNTDOWN
