from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rhythm.engines.interfaces import Rollout
from rhythm.tiny.model import TinyModelConfig, build_model, build_tokenizer

PROMPT_LENS, RESPONSE_LENS = (4, 7, 1, 5), (12, 3, 20, 1)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="session")
def _model(tokenizer: Any) -> Any:
    model = build_model(
        TinyModelConfig(layers=3, hidden_size=32, mlp_size=48, query_heads=4, key_heads=2, head_size=16), tokenizer
    )
    with torch.no_grad():  # a fresh model is nearly uniform: sharper weights tell right from wrong
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return model


@pytest.fixture
def model(_model: Any) -> Any:
    """A random Qwen3 of three layers, four query heads and two key heads: a fresh copy for each test."""
    return copy.deepcopy(_model)


@pytest.fixture
def make_rollout() -> Callable[..., Rollout]:
    """Random tokens as prompts and responses of the lengths given, two responses to a prompt."""

    def make(
        prompt_lens: tuple[int, ...] = PROMPT_LENS,
        response_lens: tuple[int, ...] = RESPONSE_LENS,
        seed: int = 0,
    ) -> Rollout:
        prompt_lens_B, response_lens_B = torch.tensor(prompt_lens), torch.tensor(response_lens)
        t = torch.arange(int((prompt_lens_B + response_lens_B).max()))
        attention_mask = t < (prompt_lens_B + response_lens_B)[:, None]
        response_mask = attention_mask & (t >= prompt_lens_B[:, None])
        ids = torch.randint(4, 100, attention_mask.shape, generator=torch.Generator().manual_seed(seed))
        return Rollout(
            input_ids=torch.where(attention_mask, ids, 0),
            attention_mask=attention_mask,
            response_mask=response_mask,
            prompt_lens=prompt_lens_B,
            group=torch.arange(len(prompt_lens)) // 2,
            logprobs=torch.zeros(attention_mask.shape),
            finished=torch.ones(len(prompt_lens), dtype=torch.bool),
        )

    return make
