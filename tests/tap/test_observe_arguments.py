"""The arguments of observe(): which are refused by name, and the forms of responses, layers and presets."""

from __future__ import annotations

import re
from typing import Any

import models
import pytest
import torch
import transformers
from models import GQA
from tensors import assert_same
from torch import Tensor

from rhythm.credit.heads import sampled_layers
from rhythm.tap.attention_form import UnsupportedAttention
from rhythm.tap.observe import observe
from rhythm.tap.signals_config import SignalsConfig

LAYERS = 6  # of which 2, 3 and 4 are sampled


def qwen3() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**models.SIZES | {"num_hidden_layers": LAYERS}, **GQA)
    model = transformers.Qwen3ForCausalLM(config).eval()
    model.set_attn_implementation("sdpa")
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(1))


HOLE = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": tokens(6)}, "input_ids has shape [6]; it must be [B, T]"),
        ({"input_ids": tokens(2, 0)}, "input_ids has shape [2, 0]"),
        ({"attention_mask": torch.ones(2, 5)}, "attention_mask has shape [2, 5]; it must be [2, 6]"),
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, "attention_mask has shape [2, 1, 6, 6]"),
        ({"attention_mask": HOLE}, "attention_mask has padding between the tokens of row 0"),
        ({"attention_mask": torch.full((2, 6), 2)}, "attention_mask holds values other than 0 and 1"),
        ({"prompt_lens": [1, 7]}, "prompt_lens[1] is 7; its sequence allows 0 to 6"),
        ({"prompt_lens": [-1, 2]}, "prompt_lens[0] is -1; its sequence allows 0 to 6"),
        ({"prompt_lens": [1]}, "prompt_lens has shape [1]; it must be [2]"),
        ({"prompt_lens": 3}, "prompt_lens is 3; it must be int32 or int64 [B], or a sequence of integers ([3] for one"),
        ({"prompt_lens": torch.tensor(3)}, "prompt_lens is 3; it must be int32 or int64 [B]"),
        ({"prompt_lens": [1.0, 2.0]}, "prompt_lens[0] is 1.0; it must be an integer"),
        ({"prompt_lens": torch.tensor([1.0, 2.0])}, "prompt_lens has dtype torch.float32"),
        ({"prompt_lens": [1, None]}, "prompt_lens[1] is None; it must be an integer"),
        (
            {"input_ids": torch.tensor([[3, 61, 0, 0, 0, 0]] * 2)},
            "input_ids holds 61; the model's vocabulary allows 0 to 60",
        ),
        (
            {"input_ids": torch.tensor([[3, -1, 0, 0, 0, 0]] * 2)},
            "input_ids holds -1; the model's vocabulary allows 0 to 60",
        ),
        ({"input_ids": torch.ones(2, 6)}, "input_ids has dtype torch.float32; allowed are"),
        (
            {"attention_mask": HOLE[[1, 1]], "prompt_lens": [1, 5]},
            "prompt_lens[1] is 5; its sequence allows 0 to 4",
        ),
        ({"signals": SignalsConfig(layers=[2, 6])}, "layers is [2, 6]; the model has layers 0 to 5"),
        ({"prompt_lens": None}, "prompt_lens and response_mask: neither is given; it must be exactly one of them"),
        ({"response_mask": torch.ones(2, 6)}, "prompt_lens and response_mask: both are given"),
        ({"prompt_lens": None, "response_mask": torch.ones(2, 5)}, "response_mask has shape [2, 5]; it must be [2, 6]"),
        (
            {"prompt_lens": None, "response_mask": torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 0]])},
            "response_mask must mark the last tokens of each row, in one run, and no padding; that of row 1 does not",
        ),
        ({"model": torch.nn.Linear(2, 2)}, "model is a Linear"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"model": qwen3(), "input_ids": tokens(2, 6), "prompt_lens": [1, 2]}
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        observe(**(arguments | change))
    assert not isinstance(error.value, UnsupportedAttention)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_response_mask_says_what_prompt_lens_say(side: str) -> None:
    model, input_ids = qwen3(), tokens(3, 20)
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[1, slice(0, 6) if side == "left" else slice(14, 20)] = 0
    response = mask.clone()
    response[0, :4] = 0
    response[1, : 6 + 5 if side == "left" else 5] = 0
    response[2] = 0
    options: dict[str, Any] = {"attention_mask": mask, "entropy": True}
    by_mask = observe(model, input_ids, response_mask=response, **options)
    assert_same(by_mask, observe(model, input_ids, prompt_lens=[4, 5, 20], **options))
    assert by_mask.waad[2].isnan().all()
    assert_same(
        observe(model, input_ids[:1], response_mask=response[:1]), observe(model, input_ids[:1], prompt_lens=[4])
    )


def test_signals_know_their_layers_and_heads() -> None:
    model, input_ids = qwen3(), tokens(2, 20)
    signals = observe(model, input_ids, prompt_lens=[3, 4], signals=SignalsConfig(layers=[1, 4]))
    heads = signals.span.shape[1] // 2
    assert signals.layers == [1, 4]
    assert signals.heads == tuple((layer, head) for layer in (1, 4) for head in range(heads))
    assert repr(signals) == f"RhythmSignals(waad, fai [2, 20]; {2 * heads} heads of layers [1, 4])"
    # The last column is the last head of layer 4, whichever layers stand before it.
    only = observe(model, input_ids, prompt_lens=[3, 4], signals=SignalsConfig(layers=[4]))
    assert only.heads == signals.heads[heads:]
    assert only.span.equal(signals.span[:, heads:])
    everywhere = observe(model, input_ids, prompt_lens=[3, 4], signals=SignalsConfig(layers="all"))
    assert everywhere.layers == list(range(LAYERS))
    few = observe(model, input_ids, prompt_lens=[3, 4], signals=SignalsConfig(layers=2))
    assert few.layers == sampled_layers(LAYERS, 2)


def test_presets_of_the_horizon() -> None:
    model, input_ids = qwen3(), tokens(1, 120)
    for name, pair in (("paper", (10, 50)), ("revised", (10, 100))):
        named = observe(model, input_ids, prompt_lens=[3], signals=SignalsConfig(horizon=name))
        assert_same(named, observe(model, input_ids, prompt_lens=[3], signals=SignalsConfig(horizon=pair)))
