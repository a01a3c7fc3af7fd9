"""Times the whole actor_attn pass, rhythm.observe on a model, against the model's plain forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import rhythm
from benchmarks.gpu.clock import Clock
from benchmarks.measure import Timing
from rhythm.tap.signals_config import SignalsConfig


@dataclass(frozen=True)
class ModelShape:
    """A Qwen3 model; the defaults are Qwen3-4B's."""

    layers: int = 36
    hidden: int = 2560
    intermediate: int = 9728
    query_heads: int = 32
    key_heads: int = 8
    head_size: int = 128
    vocabulary: int = 151936


def build(shape: ModelShape, device: str, dtype: torch.dtype, tokens: int) -> Any:
    """Build a Qwen3 model with random weights on the device."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head_size,
        vocab_size=shape.vocabulary,
        max_position_embeddings=max(tokens, 40960),
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        dtype=dtype,
    )
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return Qwen3ForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)


def token_ids(shape: ModelShape, device: str, tokens: int) -> Tensor:
    generator = torch.Generator(device=device).manual_seed(0)
    return torch.randint(shape.vocabulary, (1, tokens), generator=generator, device=device)


def timings(model: Any, input_ids: Tensor, clock: Clock, rounds: int) -> dict[str, Timing]:
    """Time the plain forward without logits and rhythm.observe in interleaved rounds; eager, since whole models are
    not captured in graphs.
    """

    @torch.no_grad()
    def plain() -> None:
        model.model(input_ids, use_cache=False)

    return clock.interleaved({"plain": plain, "observe": observer(model, input_ids, clock)}, rounds)


def observer(model: Any, input_ids: Tensor, clock: Clock) -> Callable[[], rhythm.RhythmSignals]:
    """A call of rhythm.observe; the first quarter of the tokens is the prompt."""
    prompt_lens = torch.full((input_ids.shape[0],), input_ids.shape[1] // 4, device=input_ids.device)
    return lambda: rhythm.observe(
        model, input_ids, prompt_lens=prompt_lens, signals=SignalsConfig(backend=clock.backend)
    )
