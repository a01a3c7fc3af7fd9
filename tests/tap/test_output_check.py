"""Attention whose output differs from that of the assumed map is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface

from rhythm.tap.attention_form import UnsupportedAttention
from rhythm.tap.observe import observe
from rhythm.tap.output_check import CHECKED_SEQUENCES
from rhythm.tap.signals_config import SignalsConfig

T, PROMPT = 20, 2


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**models.SIZES | {"num_hidden_layers": 4, "num_key_value_heads": 2})
    model = transformers.LlamaForCausalLM(config)
    model.eval().set_attn_implementation("sdpa")
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(1))


def refused(message: str) -> Any:
    return pytest.raises(UnsupportedAttention, match=re.escape(message))


def scores(module: Any, query: Tensor, key: Tensor, scaling: float) -> Tensor:
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    return (query @ key.transpose(2, 3) * scaling).masked_fill(~torch.ones(T, T).tril().bool(), -torch.inf)


def attended(module: Any, weights: Tensor, value: Tensor) -> Any:
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    return (weights.to(value.dtype) @ value).transpose(1, 2), None


def plain(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
    return attended(module, scores(module, query, key, scaling).softmax(-1), value)


def with_alibi(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
    distance = torch.arange(T)[:, None] - torch.arange(T)
    return attended(module, (scores(module, query, key, scaling) - 0.1 * distance).softmax(-1), value)


def with_sink(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
    score = torch.nn.functional.pad(scores(module, query, key, scaling), (1, 0))
    return attended(module, score.softmax(-1)[..., 1:], value)


def with_other_scale(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
) -> Any:
    return attended(module, scores(module, query, key, 1.1 * scaling).softmax(-1), value)


def with_window(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
    hidden = ~torch.ones(T, T).triu(1 - T // 2).bool()
    return attended(module, scores(module, query, key, scaling).masked_fill(hidden, -torch.inf).softmax(-1), value)


def with_one_head_cut(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
) -> Any:
    output, _ = plain(module, query, key, value, mask, scaling)
    output[:, (PROMPT + T) // 2, 3] = 0  # the middle of the response
    return output, None


def with_nan(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
    output, _ = plain(module, query, key, value, mask, scaling)
    output[:, -1] = torch.nan
    return output, None


def bidirectional(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    return attended(module, (query @ key.transpose(2, 3) * scaling).softmax(-1), value)


def heads_first(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
    return plain(module, query, key, value, mask, scaling)[0].transpose(1, 2), None


def wrong_in_the_last_row(*args: Any, **options: Any) -> Any:
    output, _ = plain(*args, **options)
    output[-1] *= 1.5
    return output, None


def observed_with(function: Callable[..., Any], model: Any, lens: tuple[int, ...] = (T,)) -> Any:
    AttentionInterface.register("test_custom", function)
    model.set_attn_implementation("test_custom")
    mask = torch.arange(T) < torch.tensor(lens)[:, None]
    prompt_lens = [PROMPT] * len(lens)
    signals = SignalsConfig(layers=[0])
    return observe(model, tokens(len(lens), T), attention_mask=mask, prompt_lens=prompt_lens, signals=signals)


IN_BF16 = (with_alibi, with_sink, with_window, with_one_head_cut, with_nan, bidirectional)
"""A tenth of a scale is within the tolerance of half precision."""


@pytest.mark.parametrize(
    ("function", "dtype"),
    [*((function, torch.float32) for function in (*IN_BF16, with_other_scale)),
     *((function, torch.bfloat16) for function in IN_BF16)],
)  # fmt: skip
def test_output_that_is_not_of_the_assumed_map(function: Callable[..., Any], dtype: torch.dtype) -> None:
    with refused("llama, layer 0: an output of 'test_custom' attention that is not that of causal attention with"):
        observed_with(function, llama().to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_custom_implementations_that_are_plain_pass(dtype: torch.dtype) -> None:
    model = llama().to(dtype)
    expected = observe(model, tokens(1, T), prompt_lens=[2], signals=SignalsConfig(layers=[0]))
    actual = observed_with(plain, model)
    torch.testing.assert_close(actual.waad, expected.waad, rtol=0, atol=0.1, equal_nan=True)
    with refused(f"an attention output of shape [1, 4, {T}, 8], not [1, {T}, 4, …]"):
        observed_with(heads_first, model)


def test_values_that_are_zero_or_nan_pass_the_check() -> None:
    model = llama()
    expected = observe(model, tokens(1, T), prompt_lens=[2], signals=SignalsConfig(layers=[1]))
    for value in (0.0, torch.nan):
        with torch.no_grad():
            model.model.layers[1].self_attn.v_proj.weight.fill_(value)
        signals = observe(model, tokens(1, T), prompt_lens=[2], signals=SignalsConfig(layers=[1]))
        torch.testing.assert_close(signals.waad, expected.waad, rtol=0, atol=0, equal_nan=True)


def test_sequences_beyond_those_that_are_checked() -> None:
    """Of more rows than are looked at, of different lengths, each is compared with its own; packed ones, too."""
    many = tuple(3 + (7 * i) % (T - 2) for i in range(2 * CHECKED_SEQUENCES + 5))
    observed_with(plain, llama(), many)
    with refused("an output of 'test_custom' attention that is not that of causal attention with"):
        observed_with(wrong_in_the_last_row, llama(), many)
    packed = {"cu_seqlens": torch.tensor([0, *many]).cumsum(0), "prompt_lens": [2] * len(many)}
    observe(llama(), tokens(1, sum(many)), **packed, signals=SignalsConfig(layers=[0]))
