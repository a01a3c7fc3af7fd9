"""A real vLLM on a Gemma 3 against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from rhythm.engines.interfaces import SamplingConfig
from rhythm.engines.parity import compare
from rhythm.engines.vllm.infer import VllmInfer

SAMPLING = SamplingConfig(temperature=1.0, max_new_tokens=24)
PROMPTS = [[5, 6, 7, 8], list(range(4, 94)) * 2]


def gemma3(seed: int, vocabulary: int) -> Gemma3ForCausalLM:
    """Random, of two layers with a window of 16 tokens and one without."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "query_pre_attn_scalar": 24}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "sliding_window": 16}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(
        vocab_size=vocabulary, **sizes, **heads, layer_types=kinds, max_position_embeddings=320, initializer_range=0.2
    )
    model = Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def test_log_probs_before_and_after_a_push(
    start: Callable[..., VllmInfer], tokenizer: Any, tmp_path: Path, logprobs: Callable[..., Tensor]
) -> None:
    model, other = (gemma3(seed, len(tokenizer)) for seed in (0, 1))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    engine = start(tmp_path)
    for pushed in (model, other):
        if pushed is other:
            engine.update_weights(other.state_dict(), version=1)
        rollout = engine.generate(PROMPTS, 2, SAMPLING, seed=1)
        assert compare(rollout.logprobs, logprobs(pushed, rollout), rollout.response_mask).max < 2e-5
