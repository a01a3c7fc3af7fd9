"""The decode loop against transformers' generate, and that it does no more than it must."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from rhythm.engines.interfaces import SamplingConfig
from rhythm.engines.local.decoding import decode
from rhythm.engines.local.draws import draw_for

PROMPTS = [[1, 20, 30, 40, 50], [1, 60], [1, 20, 30, 40, 50], [1, 7, 8, 9], [1, 60], [1, 60]]
ENDS, PAD = list(range(2, 100, 12)), 0
ROOM = 12


def decoded(model: Any, sampling: SamplingConfig, seed: int = 3, room: Tensor | None = None, **options: Any) -> Any:
    room = torch.full((len(PROMPTS),), ROOM) if room is None else room
    torch.manual_seed(seed)
    draw = draw_for(sampling, len(PROMPTS), model.device, None)
    return decode(
        model.eval(), PROMPTS, room, draw, temperature=sampling.temperature or 1.0, end_ids=ENDS, pad_id=PAD, **options
    )


def generated(model: Any, sampling: SamplingConfig, seed: int = 3) -> Tensor:
    """[B, G] by transformers' generate, every prompt computed by itself."""
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in PROMPTS])
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    torch.manual_seed(seed)
    config = GenerationConfig(
        do_sample=sampling.temperature > 0,
        max_new_tokens=ROOM,
        eos_token_id=ENDS,
        pad_token_id=PAD,
        **(drawn if sampling.temperature else {}),
    )
    sequences: Tensor = model.eval().generate(ids, attention_mask=(ids != PAD).long(), generation_config=config)
    return sequences[:, width:]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(),
        SamplingConfig(temperature=0),
        SamplingConfig(temperature=0.6, top_k=20, top_p=0.8),
    ],
)
def test_tokens_are_those_of_generate(model: Any, sampling: SamplingConfig) -> None:
    for seed in (3, 4):
        assert decoded(model, sampling, seed).tokens.equal(generated(model, sampling, seed))


def test_layers_with_a_sliding_window() -> None:
    """Their cache is transformers' own, and gets each prompt's rows too."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, use_sliding_window=True, sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        )
    )  # fmt: skip
    assert decoded(model, SamplingConfig()).tokens.equal(generated(model, SamplingConfig()))


def test_each_prompt_is_computed_once_and_ended_rows_not_at_all(model: Any) -> None:
    shapes: list[tuple[int, ...]] = []
    counts: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, __, named: shapes.append((*named["input_ids"].shape,)), with_kwargs=True
    )
    out = decoded(model, SamplingConfig(), progress=counts.append)
    assert shapes[0] == (3, 5), "three different prompts of at most five tokens"
    longest = int(out.lens.max())
    assert counts == list(range(1, longest + 1))
    assert shapes[1:] == [(int((out.lens > done).sum()), 1) for done in range(1, longest)], (
        "of six rows each is dropped"
    )
    assert len(set(shapes[1:])) > 2


def test_what_comes_after_the_end_is_padding(model: Any) -> None:
    out = decoded(model, SamplingConfig())
    for tokens, logprobs, length in zip(out.tokens, out.logprobs, out.lens.tolist(), strict=True):
        assert (tokens[length:] == PAD).all()
        assert (logprobs[length:] == 0).all()
        assert (logprobs[:length] < 0).all()
        assert not set(tokens[: length - 1].tolist()) & set(ENDS)
        assert length == ROOM or int(tokens[length - 1]) in ENDS


def test_a_row_ends_with_its_room(model: Any) -> None:
    """And the others go on as they would."""
    room = torch.tensor([1, ROOM, 3, ROOM, ROOM, 2])
    whole, short = decoded(model, SamplingConfig()), decoded(model, SamplingConfig(), room=room)
    assert short.lens.equal(torch.minimum(whole.lens, room))
    within = torch.arange(ROOM) < short.lens[:, None]
    assert short.tokens.equal(whole.tokens.where(within, PAD)[:, : short.tokens.shape[1]])


def test_nan_is_refused(model: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="the model's logits are NaN"):
        decoded(model, SamplingConfig())
