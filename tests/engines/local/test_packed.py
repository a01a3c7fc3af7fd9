"""Rows packed into one are to a model what they are padded, and alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import models
import pytest
import torch
import transformers
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rhythm.engines.batches import take_rows
from rhythm.engines.interfaces import Rollout
from rhythm.engines.local import packed
from rhythm.engines.local.logprobs import padded_states
from rhythm.engines.local.packed import packed_states, packing_refusal
from rhythm.tap.attention_form import UnsupportedAttention
from rhythm.tap.attention_tap import AttentionTap
from rhythm.tap.signals_config import SignalsConfig

SIZES = models.SIZES | {"vocab_size": 100, "num_hidden_layers": 4}
ALTERNATING = ["sliding_attention", "full_attention"] * 2


def qwen3(**options: Any) -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, **models.GQA, **options))


def mistral() -> Any:
    config = transformers.MistralConfig(**SIZES, **models.GQA, sliding_window=6)  # layers are of no kind
    return transformers.MistralForCausalLM(config)


def gemma2() -> Any:
    config = transformers.Gemma2Config(
        **SIZES, **models.GQA, layer_types=ALTERNATING, sliding_window=6, attn_logit_softcapping=1.5
    )
    return transformers.Gemma2ForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=4, n_head=4, initializer_range=0.3)
    return transformers.GPT2LMHeadModel(config)


def linear() -> Any:
    config = transformers.Qwen3NextConfig(
        **SIZES,
        **models.GQA,
        layer_types=["linear_attention", "full_attention"] * 2,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    return transformers.Qwen3NextForCausalLM(config)


def bloom() -> Any:
    return transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=4))


def made(build: Callable[[], Any], implementation: str = "sdpa") -> Any:
    torch.manual_seed(0)
    model = build().eval()
    model.set_attn_implementation(implementation)
    return model


def states_and_gradients(model: Any, states: Callable[[Any, Rollout], Tensor], rollout: Rollout) -> list[Tensor]:
    model.zero_grad()
    hidden = states(model, rollout)
    weights = torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)
    (hidden * weights).sum().backward()
    return [
        hidden.detach(),
        *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None),
    ]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [qwen3, mistral, gemma2, gpt2])
def test_states_and_gradients_are_those_of_padded_rows(
    build: Callable[[], Any], implementation: str, make_rollout: Callable[..., Rollout]
) -> None:
    model, rollout = made(build, implementation), make_rollout()
    assert packing_refusal(model) is None
    expected = states_and_gradients(model, padded_states, rollout)
    actual = states_and_gradients(model, packed_states, rollout)
    assert len(actual) == len(expected) > 10
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def two_prompts(make_rollout: Callable[..., Rollout]) -> Rollout:
    """Rows 0 and 2 answer one prompt, 1 and 3 the other."""
    rollout = make_rollout((5, 5, 7, 7), (4, 9, 1, 6))
    rollout.input_ids[1, :5], rollout.input_ids[3, :7] = rollout.input_ids[0, :5], rollout.input_ids[2, :7]
    return take_rows(rollout, torch.tensor([2, 0, 3, 1]))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [qwen3, mistral, gemma2, gpt2])
def test_a_prompt_packed_once_has_the_gradients_of_all_its_rows(
    build: Callable[[], Any], implementation: str, make_rollout: Callable[..., Rollout]
) -> None:
    model, mixed = made(build, implementation), two_prompts(make_rollout)
    expected = states_and_gradients(model, padded_states, mixed)
    actual = states_and_gradients(model, partial(packed_states, share_prompts=True), mixed)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_a_prompt_packed_once_is_once_in_attention(
    make_rollout: Callable[..., Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prompts of 7 and 5 tokens, and four responses, the longest of 9. A tap changes no bit, and reads all rows."""
    model, mixed = made(qwen3), two_prompts(make_rollout)
    queries: list[tuple[int, int]] = []
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def counted(module: Any, query: Tensor, *args: Any, **options: Any) -> Any:
        queries.append((query.shape[0], query.shape[2]))
        return own(module, query, *args, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", counted)

    def tap() -> AttentionTap:
        options = SignalsConfig(layers=[1, 3], horizon=(2, 6))
        return AttentionTap(model, attention_mask=mixed.attention_mask, prompt_lens=mixed.prompt_lens, signals=options)

    shared, of_all = tap(), tap()
    with torch.no_grad():
        alone = packed_states(model, mixed, share_prompts=True)
        assert queries == [(2, 7), (4, 9)] * 4
        tapped = packed_states(model, mixed, shared, share_prompts=True)
        assert queries == [(2, 7), (4, 9)] * 8
        packed_states(model, mixed, of_all)
        monkeypatch.setattr(packed, "LARGEST", 9 * 14 - 1)
        queries.clear()
        longer = packed_states(model, mixed, share_prompts=True)
        assert queries == [(4, 14)] * 4, "longer rows are causal attention's"
    torch.testing.assert_close(longer, alone, rtol=1e-4, atol=1e-4)
    assert torch.equal(tapped, alone)
    expected, actual = of_all.statistics(), shared.statistics()
    for name in ("span", "waad", "fai"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), equal_nan=True, rtol=1e-4, atol=1e-4)


def test_a_row_has_the_same_states_in_any_company(make_rollout: Callable[..., Rollout]) -> None:
    model, rollout = made(qwen3), make_rollout()
    with torch.no_grad():
        together = packed_states(model, rollout).split(rollout.response_lens.tolist())
        for row, states in enumerate(together):
            alone = Rollout(**{name: value[row : row + 1] for name, value in vars(rollout).items()})
            torch.testing.assert_close(states, padded_states(model, alone), rtol=1e-4, atol=1e-4)


def test_a_tap_reads_the_same_of_packed_rows(make_rollout: Callable[..., Rollout]) -> None:
    model, rollout = made(qwen3), make_rollout()

    def tap() -> AttentionTap:
        options = SignalsConfig(layers=[1, 3], horizon=(2, 6))
        return AttentionTap(
            model, attention_mask=rollout.attention_mask, prompt_lens=rollout.prompt_lens, signals=options
        )

    with tap() as entered, torch.no_grad():
        padded_states(model, rollout)
    given = tap()
    with torch.no_grad():
        packed_states(model, rollout, given)
    expected, actual = entered.statistics(), given.statistics()
    assert actual.heads == expected.heads
    for name in ("span", "waad", "fai"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), equal_nan=True, rtol=1e-4, atol=1e-4)


def test_the_model_runs_one_row_without_padding_or_mask(make_rollout: Callable[..., Rollout]) -> None:
    model, rollout = made(qwen3), make_rollout()
    seen = []
    layer = model.model.layers[0]
    layer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0].shape, kwargs["attention_mask"])), with_kwargs=True
    )
    packed_states(model, rollout)
    assert seen == [((1, int(rollout.lens.sum()), SIZES["hidden_size"]), None)]


@pytest.mark.parametrize(
    ("build", "why"),
    [(linear, "has layers of kind linear_attention"), (bloom, "does not go through transformers' attention interface")],
)
def test_models_whose_rows_would_mix_are_refused(build: Callable[[], Any], why: str) -> None:
    refusal = packing_refusal(made(build))
    assert refusal is not None
    assert why in refusal


def test_activations_computed_again_are_refused() -> None:
    model = made(qwen3)
    model.gradient_checkpointing_enable()
    assert "computed again" in str(packing_refusal(model))


def test_a_model_that_looks_at_the_row_before_is_refused() -> None:
    """It mixes a token with the one before it in its row, which attention masks don't show."""
    model = made(qwen3)
    first = model.model.layers[0].mlp
    inner = first.forward
    first.forward = lambda x: inner(x + 0.5 * x.roll(1, dims=1))
    assert "see each other" in str(packing_refusal(model))
    assert not model.training


def test_a_mask_of_the_models_own_is_refused(make_rollout: Callable[..., Rollout]) -> None:
    model = made(qwen3)
    for layer in model.model.layers:
        inner = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, inner=inner, **options: inner(
            *args, **options | {"attention_mask": torch.zeros(1, 1, 1, 1)}
        )
    with pytest.raises(UnsupportedAttention, match="mask of the model's own"):
        packed_states(model, make_rollout())
    assert "mask of the model's own" in str(packing_refusal(model))


def test_the_probe_leaves_the_model_as_it_was() -> None:
    model = made(qwen3).train()
    before = copy.deepcopy(model.state_dict())
    assert packing_refusal(model) is None
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
