from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

from rhythm.engines.interfaces import Rollout
from rhythm.engines.vllm.config import VllmConfig
from rhythm.engines.vllm.infer import VllmInfer
from rhythm.tiny.model import TinyModelConfig, build_model, save_checkpoint

MAX_LENGTH = 320
"""Long enough for prompts of more than one block of vLLM's KV cache, 128 tokens on a CPU."""


@pytest.fixture(scope="module")
def make_checkpoint(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A random Qwen3 of four layers, 128 wide, its head tied to the embedding or not, another one for each seed."""

    def make(tied: bool = True, seed: int = 0) -> Path:
        model = build_model(TinyModelConfig(layers=4, max_positions=MAX_LENGTH, seed=seed), tokenizer)
        if not tied:
            model.config.tie_word_embeddings = False
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(0).clone())
        with torch.no_grad():  # a fresh model is nearly uniform: sharper weights tell right from wrong
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(4)
                else:
                    parameter.add_(0.1 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        directory = tmp_path_factory.mktemp("checkpoint")
        save_checkpoint(model, tokenizer, directory)
        return directory

    return make


@pytest.fixture
def load() -> Callable[[Path], Any]:
    """The transformers model in a checkpoint, in fp32."""
    return lambda directory: Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def _as_it_was() -> Iterator[None]:
    """vLLM sets variables of the environment and disables torch.set_num_threads: undone after the module."""
    environment, set_num_threads = dict(os.environ), torch.set_num_threads
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads = set_num_threads


@pytest.fixture(scope="module")
def start(tokenizer: Any, _as_it_was: None) -> Iterator[Callable[..., VllmInfer]]:
    """An engine on a checkpoint; closed after the module."""
    started: list[VllmInfer] = []

    def build(checkpoint: Path, stop_strings: bool = False, **knobs: Any) -> VllmInfer:
        engine = VllmInfer(
            checkpoint,
            VllmConfig(**{"kv_cache_gib": 0.0625, "max_num_seqs": 16} | knobs),
            max_length=MAX_LENGTH,
            end_ids=[tokenizer.eos_token_id],
            pad_id=tokenizer.pad_token_id,
            dtype=torch.float32,
            stop_strings=stop_strings,
        )
        started.append(engine)
        return engine

    yield build
    for engine in started:
        engine.close()


@pytest.fixture
def logprobs() -> Callable[..., Tensor]:
    """transformers' log-probs of a rollout's response tokens, fp32 [B, T]; NaN elsewhere."""

    @torch.no_grad()
    def compute(model: Any, rollout: Rollout, temperature: float = 1.0) -> Tensor:
        logits_BTV = model(rollout.input_ids, attention_mask=rollout.attention_mask.long()).logits / temperature
        picked = torch.log_softmax(logits_BTV[:, :-1], dim=-1).gather(2, rollout.input_ids[:, 1:, None])[..., 0]
        out_BT = torch.full(rollout.input_ids.shape, torch.nan)
        out_BT[:, 1:] = picked
        return out_BT.masked_fill(~rollout.response_mask, torch.nan)

    return compute
