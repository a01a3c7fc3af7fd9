"""The cache that grows in place, against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from rhythm.analysis.decoding import BLOCK, RowsLayer, compacted
from rhythm.engines.local.short_attention import short_attention

ROWS, PROMPT = 5, 7


def model() -> Any:
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = Qwen3Config(**shape, num_attention_heads=6, num_key_value_heads=2, head_dim=8, initializer_range=0.3)
    return Qwen3ForCausalLM(config).eval()


@torch.no_grad()
def decoded(model: Any, cache: DynamicCache, steps: int, mask_RP: torch.Tensor) -> torch.Tensor:
    """Logits of a left-padded prompt's last token and of `steps` tokens after it."""
    tokens = torch.randint(50, (ROWS, PROMPT + steps), generator=torch.Generator().manual_seed(1))
    mask = torch.cat([mask_RP, torch.ones(ROWS, steps, dtype=torch.int64)], dim=1)
    places = mask.cumsum(dim=1) - 1
    logits, start = [], 0
    for end in range(PROMPT, PROMPT + steps + 1):
        options = {"attention_mask": mask[:, :end], "position_ids": places[:, start:end].clamp(min=0)}
        logits.append(model(tokens[:, start:end], past_key_values=cache, use_cache=True, **options).logits[:, -1])
        start = end
    return torch.stack(logits)


@pytest.mark.parametrize("padded", [False, True])
def test_logits_are_those_of_transformers_own(padded: bool) -> None:
    """Over more tokens than a block of the cache has."""
    causal, steps = model(), BLOCK + 3
    mask = torch.ones(ROWS, PROMPT, dtype=torch.int64)
    if padded:
        mask[1, :3] = mask[4, :6] = 0
    expected = decoded(causal, DynamicCache(), steps, mask)
    cache = DynamicCache()
    cache.layers = [RowsLayer(*torch.zeros(2, ROWS, 2, 0, 8)) for _ in range(2)]
    with short_attention(causal):
        actual = decoded(causal, cache, steps, mask)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() == PROMPT + steps


def test_dropped_rows_leave_the_others_as_they_were() -> None:
    keys, values = torch.randn(2, 6, 2, 3, 4)
    layer = RowsLayer(keys, values)
    order = compacted([1, 4, 5])
    assert order == [4, 1, 5]  # row 1 stays, the others fill the gaps
    layer.keep(order)
    assert layer.keys.equal(keys[order])
    new = torch.randn(3, 2, 1, 4)
    seen, _ = layer.update(new, new)
    assert seen.equal(torch.cat([keys[order], new], dim=2))
    layer.keep(compacted([0, 1]))
    assert layer.values.equal(torch.cat([values[[4, 1]], new[:2]], dim=2))


@pytest.mark.parametrize("kept", [[0, 1, 2], [2], [0, 3], [1, 2, 5, 6, 7]])
def test_compacted_keeps_each_row_once(kept: list[int]) -> None:
    order = compacted(kept)
    assert sorted(order) == kept
    assert all(row == place or row >= len(kept) for place, row in enumerate(order))
