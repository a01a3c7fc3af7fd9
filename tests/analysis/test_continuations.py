"""Continuations from a shared prefix against transformers' generate from scratch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
)

from rhythm.analysis.continuations import Branch, check_cache, continue_greedily, prefill

V, N = 50, 40
END_IDS = (3, 4)
SHAPE = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def build(kind: str) -> Any:
    torch.manual_seed(1)
    if kind == "qwen3":
        model: Any = Qwen3ForCausalLM(Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=16))
    elif kind == "sliding":  # a window shorter than the prefixes
        model = MistralForCausalLM(MistralConfig(**SHAPE, num_key_value_heads=1, sliding_window=6))
    else:  # learned positions: a wrong one shows, and one past the end is an error
        model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=N + 6))
    model.generation_config = GenerationConfig()
    with torch.no_grad():  # a fresh model is nearly uniform: sharper weights tell right from wrong
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return model.eval()


@pytest.fixture(scope="module", params=["qwen3", "sliding", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@pytest.fixture
def ids_N() -> Tensor:
    return torch.randint(5, V, (N,), generator=torch.Generator().manual_seed(2))


def naive(model: Any, ids_N: Tensor, branch: Branch) -> list[int]:
    """From scratch: the whole prefix, the token, and generate."""
    start = torch.cat([ids_N[: branch.position], torch.tensor([branch.token])])
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=branch.limit, eos_token_id=list(END_IDS), pad_token_id=0
    )
    out = model.generate(start[None], attention_mask=torch.ones_like(start[None]), generation_config=settings)
    tokens: list[int] = out[0, len(start) :].tolist()
    return tokens


POSITIONS = (1, 5, 6, 20, 33, N - 1)
BRANCHES = [
    Branch(position, token, min(limit, N + 6 - position - 1))
    for position in reversed(POSITIONS)  # not in the order in which they are run
    for token, limit in ((7, 12), (11, 30), (19, 1))
]


@pytest.mark.parametrize("rows_at_once", [1, 4, 100])
def test_they_are_what_generate_finds_from_scratch(model: Any, ids_N: Tensor, rows_at_once: int) -> None:
    prefilled = prefill(model, ids_N, POSITIONS)
    generated = continue_greedily(model, [prefilled], BRANCHES, end_ids=END_IDS, rows_at_once=rows_at_once)
    assert generated == [naive(model, ids_N, branch) for branch in BRANCHES]
    assert len({tuple(tokens) for tokens in generated}) > len(POSITIONS)  # the model does tell them apart


def test_continuations_end_early_in_these_cases(ids_N: Tensor) -> None:
    model = build("qwen3")
    generated = continue_greedily(
        model, [prefill(model, ids_N, POSITIONS)], BRANCHES, end_ids=END_IDS, rows_at_once=100
    )
    ended = [tokens[-1] in END_IDS for tokens in generated]
    assert any(ended)
    assert not all(ended)
    assert all(not set(END_IDS) & set(tokens[:-1]) for tokens in generated)


def test_logits_are_those_of_a_plain_pass(model: Any, ids_N: Tensor) -> None:
    with torch.no_grad():
        logits_NV = model(ids_N[None]).logits[0]
    logits_KV = prefill(model, ids_N, POSITIONS).logits_KV
    torch.testing.assert_close(logits_KV, logits_NV[torch.tensor(POSITIONS) - 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows_at_once", [3, 100])
def test_no_token_is_run_twice(model: Any, ids_N: Tensor, rows_at_once: int) -> None:
    calls: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        generated = continue_greedily(
            model, [prefill(model, ids_N, POSITIONS)], BRANCHES, end_ids=END_IDS, rows_at_once=rows_at_once
        )
    finally:
        handle.remove()
    assert calls[0] == POSITIONS[-1]  # the sequence, once
    assert sum(calls[1:]) == sum(map(len, generated))  # then one token for each token found
    assert max(calls[1:]) <= rows_at_once
    # What k full generations would have run, had they no cache of the sequence:
    assert (
        sum(calls) < sum(branch.position + len(tokens) for branch, tokens in zip(BRANCHES, generated, strict=True)) / 2
    )


def test_nothing_follows_an_end_token(model: Any, ids_N: Tensor) -> None:
    branches = [Branch(5, END_IDS[0], 9), Branch(6, 7, 3)]
    generated = continue_greedily(model, [prefill(model, ids_N, [5, 6])], branches, end_ids=END_IDS, rows_at_once=8)
    assert generated == [[], naive(model, ids_N, branches[1])]


def test_the_prefill_serves_again(model: Any, ids_N: Tensor) -> None:
    prefilled = prefill(model, ids_N, POSITIONS)
    first = continue_greedily(model, [prefilled], BRANCHES, end_ids=END_IDS, rows_at_once=4)
    assert continue_greedily(model, [prefilled], BRANCHES, end_ids=END_IDS, rows_at_once=4) == first


def test_a_model_in_training_stays_so_but_is_not_used_so(ids_N: Tensor) -> None:
    model = build("gpt2")
    expected = continue_greedily(model, [prefill(model, ids_N, POSITIONS)], BRANCHES, end_ids=(), rows_at_once=8)
    model.train()  # GPT-2 has dropout
    generated = continue_greedily(model, [prefill(model, ids_N, POSITIONS)], BRANCHES, end_ids=(), rows_at_once=8)
    assert generated == expected
    assert model.training


def test_models_that_cannot_share_a_prefix_are_refused() -> None:
    bert = BertModel(BertConfig(**SHAPE))
    with pytest.raises(ValueError, match="BertModel is not a causal language model"):
        check_cache(bert)
    linear = Qwen3NextConfig(**SHAPE, num_key_value_heads=2, layer_types=["linear_attention"] * 3)
    with pytest.raises(ValueError, match="keeps a LinearAttentionLayer in its cache"):
        check_cache(SimpleNamespace(can_generate=lambda: True, config=linear))
