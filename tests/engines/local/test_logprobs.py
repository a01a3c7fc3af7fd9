from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
)

from rhythm.engines.interfaces import Rollout
from rhythm.engines.local.logprobs import check_output_head, response_logprobs

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
NO_SPECIALS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def naive(model: Any, rollout: Rollout, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies [B, T], row by row and token by token from the full softmax; NaN elsewhere."""
    logprobs = torch.full(rollout.input_ids.shape, torch.nan, dtype=torch.float64)
    entropy = logprobs.clone()
    for row, length in enumerate(rollout.attention_mask.sum(dim=1).tolist()):
        ids = rollout.input_ids[row, :length]
        p = (model(ids[None]).logits[0].double() / temperature).softmax(dim=-1)
        for t in range(int(rollout.prompt_lens[row]), length):
            logprobs[row, t] = p[t - 1, ids[t]].log()
            entropy[row, t] = -(p[t - 1] * p[t - 1].log()).sum()
    return logprobs.float(), entropy.float()


@pytest.mark.parametrize("chunk", [1, 5, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_against_the_full_softmax(
    model: Any, make_rollout: Callable[..., Rollout], chunk: int, temperature: float
) -> None:
    rollout = make_rollout()
    with torch.no_grad():
        actual = response_logprobs(model, rollout, temperature=temperature, chunk=chunk)
        logprobs, entropy = naive(model, rollout, temperature)
    torch.testing.assert_close(actual.logprobs, logprobs, equal_nan=True, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.entropy, entropy, equal_nan=True, rtol=1e-4, atol=1e-5)
    assert (actual.logprobs.isnan() == ~rollout.response_mask).all()


def test_gradients_through_the_chunks(model: Any, make_rollout: Callable[..., Rollout]) -> None:
    rollout = make_rollout()
    weights = torch.linspace(-1, 1, rollout.input_ids.numel()).reshape(rollout.input_ids.shape)

    def gradients(logprobs: torch.Tensor, entropy: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        inside = rollout.response_mask
        (logprobs[inside] * weights[inside] + 0.3 * entropy[inside]).sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    actual = response_logprobs(model, rollout, temperature=0.8, chunk=4)
    chunked = gradients(actual.logprobs, actual.entropy)
    expected = gradients(*naive(model, rollout, 0.8))
    for ours, theirs in zip(chunked, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "cls", "message"),
    [
        (Gemma2Config(**SMALL, **HEADS, **NO_SPECIALS), Gemma2ForCausalLM, "final_logit_softcapping=30"),
        (
            CohereConfig(**SMALL, num_attention_heads=2, num_key_value_heads=2, **NO_SPECIALS),
            CohereForCausalLM,
            "logit_scale=0.0625",
        ),
    ],
)
def test_scaled_and_capped_logits_are_refused(config: Any, cls: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_output_head(cls(config))


def test_a_model_without_a_base_is_refused() -> None:
    config = Llama4TextConfig(**SMALL, **HEADS, **NO_SPECIALS, num_local_experts=2, intermediate_size_mlp=32)
    with pytest.raises(ValueError, match="model: Llama4ForCausalLM names no base model"):
        check_output_head(Llama4ForCausalLM(config))


def test_other_models_pass_and_agree(make_rollout: Callable[..., Rollout]) -> None:
    torch.manual_seed(0)
    neox = GPTNeoXForCausalLM(
        GPTNeoXConfig(**{**SMALL, "vocab_size": 101}, num_attention_heads=2, **NO_SPECIALS)
    ).eval()
    check_output_head(neox)
    rollout = make_rollout()
    with torch.no_grad():
        actual = response_logprobs(neox, rollout, temperature=1.0, chunk=7)
        logprobs, _ = naive(neox, rollout, 1.0)
    torch.testing.assert_close(actual.logprobs, logprobs, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_a_head_that_does_more_is_refused(model: Any) -> None:
    class Doubled(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 2
            return out

    model.__class__ = Doubled
    with pytest.raises(ValueError, match="the logits of Doubled are not its output embedding"):
        check_output_head(model)
