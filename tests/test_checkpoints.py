from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rhythm.checkpoints import checkpoint_end_tokens, end_tokens, load_model, model_end_tokens
from rhythm.tiny.model import TinyModelConfig, build_model, build_tokenizer, save_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tokenizer = build_tokenizer()
    tiny = TinyModelConfig(layers=2, hidden_size=32, mlp_size=32)
    save_checkpoint(build_model(tiny, tokenizer), tokenizer, tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("own", "configured", "ends"),
    [(5, None, (5,)), (5, 3, (3, 5)), (5, [9, 5], (5, 9)), (None, [0], (0,)), (None, None, ())],
)
def test_end_tokens_are_the_tokenizers_and_the_configured_ones(
    own: int | None, configured: int | list[int] | None, ends: tuple[int, ...]
) -> None:
    tokenizer = SimpleNamespace(eos_token_id=own)
    assert end_tokens(tokenizer, configured) == ends
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=configured))
    assert model_end_tokens(model, tokenizer) == ends
    assert model_end_tokens(SimpleNamespace(), tokenizer) == end_tokens(tokenizer, None)


def test_a_checkpoints_end_tokens_come_from_its_generation_config_if_it_has_one(checkpoint: Path) -> None:
    tokenizer = SimpleNamespace(eos_token_id=7)

    def configure(name: str, value: Any) -> None:
        path = checkpoint / name
        known = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**known, "eos_token_id": value}))

    (checkpoint / "generation_config.json").unlink(missing_ok=True)
    configure("config.json", 2)
    assert checkpoint_end_tokens(checkpoint, tokenizer) == (2, 7)
    configure("generation_config.json", [4, 3])
    assert checkpoint_end_tokens(checkpoint, tokenizer) == (3, 4, 7)


def test_a_model_is_loaded_in_the_type_asked_for(checkpoint: Path) -> None:
    models = {dtype: load_model(checkpoint, dtype=dtype, device="cpu") for dtype in (torch.float32, torch.bfloat16)}
    for dtype, model in models.items():
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    first, half = (model.state_dict() for model in models.values())
    assert all(half[name].equal(tensor.bfloat16()) for name, tensor in first.items())
