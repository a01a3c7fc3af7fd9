"""Attention by plain products: sdpa's numbers and gradients, where it applies and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rhythm.engines.local import short_attention as module
from rhythm.engines.local.short_attention import LARGEST, short_attention

LONGEST = int(LARGEST**0.5)  # keys of as many queries


@pytest.fixture
def sdpa_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of keys of the calls that were left to sdpa."""
    seen: list[int] = []
    own = module.sdpa_attention_forward

    def recorded(layer: Any, query: Tensor, key: Tensor, *args: Any, **options: Any) -> Any:
        seen.append(key.shape[2])
        return own(layer, query, key, *args, **options)

    monkeypatch.setattr(module, "sdpa_attention_forward", recorded)
    return seen


def logits_and_gradients(model: Any, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """On the tokens that `mask` keeps."""
    logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    return [logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("length", [5, LONGEST])
def test_a_models_logits_and_gradients(model: Any, side: str, length: int, sdpa_calls: list[int]) -> None:
    ids = torch.randint(4, 100, (3, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :2], mask[2, :4] = 0, 0
    mask = mask if side == "left" else mask.flip(1)
    expected = logits_and_gradients(model, ids, mask)
    with short_attention(model):
        actual = logits_and_gradients(model, ids, mask)
    assert sdpa_calls == []
    assert model.config._attn_implementation == "sdpa"
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.detach().abs().max()))


@pytest.mark.parametrize("padded", [False, True])
def test_single_queries_of_any_length(model: Any, padded: bool, sdpa_calls: list[int]) -> None:
    """The step after a cache of more than LONGEST keys."""
    ids = torch.randint(4, 100, (2, LONGEST + 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, : 7 * padded] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits[:, -1]
        with short_attention(model):
            start = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
            assert sdpa_calls == [LONGEST + 19] * 3, "many queries at once are sdpa's"
            actual = model(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=start.past_key_values)
    assert len(sdpa_calls) == 3
    torch.testing.assert_close(actual.logits[:, -1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_single_queries_in_bfloat16_are_torchs_without_copies(model: Any, padded: bool, sdpa_calls: list[int]) -> None:
    model = model.bfloat16()
    ids = torch.randint(4, 100, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, : 7 * padded] = 0

    def step() -> Tensor:
        start = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
        sdpa_calls.clear()
        return model(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=start.past_key_values).logits[:, -1]

    with torch.no_grad():
        expected = step()
        with short_attention(model):
            actual = step()
    assert sdpa_calls == []
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def test_what_is_left_to_sdpa(model: Any, sdpa_calls: list[int]) -> None:
    ids, mask = torch.arange(4, 24).reshape(2, 10), torch.ones(2, 10, dtype=torch.long)
    padded = mask.clone()
    padded[1, 8:] = 0
    with short_attention(model), torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
        assert len(sdpa_calls) == 3, "without a mask: sdpa needs none"
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids, attention_mask=padded)
        assert len(sdpa_calls) == 6
        model(input_ids=ids, attention_mask=padded)
        assert len(sdpa_calls) == 6
        model.double()(input_ids=ids, attention_mask=padded)
        assert len(sdpa_calls) == 9


def test_other_implementations_stay(model: Any) -> None:
    model.set_attn_implementation("eager")
    with short_attention(model):
        assert model.config._attn_implementation == "eager"
