"""Sequences packed into one row: their signals, and γ, are those of the rows alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import transformers
from models import GQA
from tensors import assert_same
from torch import Tensor

from rhythm.credit.heads import HeadGroups
from rhythm.tap import attention_form
from rhythm.tap.attention_form import UnsupportedAttention
from rhythm.tap.attention_tap import AttentionTap
from rhythm.tap.observe import observe, response_entropy
from rhythm.tap.rhythm_credit import RhythmCredit
from rhythm.tap.signals_config import SignalsConfig

SIZES = models.SIZES | {"num_hidden_layers": 6}
ALTERNATING = ["sliding_attention", "full_attention"] * 3
LENS, PROMPTS = [24, 1, 9, 40], [5, 0, 9, 11]
T = sum(LENS)
CU_SEQLENS = torch.tensor([0, *LENS]).cumsum(0).to(torch.int32)
SIGNALS = SignalsConfig(window=4, horizon=(2, 9))


def qwen3() -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, **GQA))


def gemma3() -> Any:
    config = transformers.Gemma3TextConfig(**SIZES, **GQA, layer_types=ALTERNATING, sliding_window=8)
    return transformers.Gemma3ForCausalLM(config)


def gpt_oss() -> Any:
    more = {"num_local_experts": 2, "num_experts_per_tok": 1}
    return transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**SIZES, **GQA, layer_types=ALTERNATING, sliding_window=8, **more)
    )


def made(build: Callable[[], Any], implementation: str) -> Any:
    torch.manual_seed(0)
    model = build().eval()
    model.set_attn_implementation(implementation)
    return model


def row() -> Tensor:
    return torch.randint(0, 61, (1, T), generator=torch.Generator().manual_seed(1))


def response_mask() -> Tensor:
    return torch.cat([torch.arange(n) >= p for n, p in zip(LENS, PROMPTS, strict=True)])[None]


def positions() -> Tensor:
    return torch.cat([torch.arange(n) for n in LENS])[None]


CASES = [(qwen3, "sdpa"), (qwen3, "eager"), (gemma3, "sdpa"), (gemma3, "eager")]


@pytest.mark.parametrize(("build", "implementation"), CASES, ids=lambda one: getattr(one, "__name__", one))
def test_signals_are_those_of_the_rows_alone(build: Callable[[], Any], implementation: str) -> None:
    model = made(build, implementation)
    packed = observe(model, row(), prompt_lens=PROMPTS, cu_seqlens=CU_SEQLENS, signals=SIGNALS, entropy=True)
    assert packed.waad.shape == packed.fai.shape == packed.entropy.shape == (1, T)
    assert packed.span.shape[0] == len(LENS)
    by_mask = observe(model, row(), response_mask=response_mask(), cu_seqlens=CU_SEQLENS.long(), signals=SIGNALS)
    assert_same(by_mask, packed)
    with torch.no_grad(), AttentionTap(model, prompt_lens=PROMPTS, cu_seqlens=CU_SEQLENS, signals=SIGNALS) as tap:
        model(row(), position_ids=positions(), use_cache=False)
    assert_same(tap.signals(packed.entropy), packed)
    assert_same(tap.signals(packed.entropy).entropy, packed.entropy)
    for i, (start, end) in enumerate(zip(CU_SEQLENS[:-1].tolist(), CU_SEQLENS[1:].tolist(), strict=True)):
        alone = observe(model, row()[:, start:end], prompt_lens=[PROMPTS[i]], signals=SIGNALS, entropy=True)
        assert packed.groups.local[i].equal(alone.groups.local[0])
        assert packed.groups.global_[i].equal(alone.groups.global_[0])
        torch.testing.assert_close(packed.span[i], alone.span[0], rtol=1e-5, atol=1e-5, equal_nan=True)
        for name in ("waad", "fai", "entropy"):
            of_row, wanted = getattr(packed, name)[0, start:end], getattr(alone, name)[0]
            torch.testing.assert_close(of_row, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert alone.waad[0, PROMPTS[i] :].isfinite().all()


def test_fixed_groups() -> None:
    model = made(qwen3, "sdpa")
    local = torch.zeros(1, 12, dtype=torch.bool)
    local[0, :4] = True
    groups = HeadGroups(local=local, global_=~local)
    packed = observe(model, row(), prompt_lens=PROMPTS, cu_seqlens=CU_SEQLENS, groups=groups)
    alone = observe(model, row()[:, -40:], prompt_lens=[11], groups=groups)
    torch.testing.assert_close(packed.waad[:, -40:], alone.waad, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("strategy", ["coupled", "entropy", "local_chunk", "none"])
def test_credit_is_that_of_the_rows_alone(strategy: str) -> None:
    model, credit = made(qwen3, "sdpa"), RhythmCredit(strategy=strategy, signals=SIGNALS)
    gamma = credit(model, row(), None, response_mask(), cu_seqlens=CU_SEQLENS)
    assert gamma.shape == (1, T)
    assert strategy == "none" or gamma[:, -40:].max() > 1
    for start, end in zip(CU_SEQLENS[:-1].tolist(), CU_SEQLENS[1:].tolist(), strict=True):
        alone = credit(model, row()[:, start:end], None, response_mask()[:, start:end])
        torch.testing.assert_close(gamma[:, start:end], alone)


def test_entropy_alone() -> None:
    model = made(qwen3, "sdpa")
    expected = observe(model, row(), prompt_lens=PROMPTS, cu_seqlens=CU_SEQLENS, entropy=True).entropy
    assert_same(response_entropy(model, row(), prompt_lens=PROMPTS, cu_seqlens=CU_SEQLENS), expected)


def refused(message: str) -> Any:
    return pytest.raises(UnsupportedAttention, match=re.escape(message))


def test_a_pass_that_does_not_keep_them_apart_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_form, "MASK_ROWS", 16)
    model, options = made(qwen3, "sdpa"), {"prompt_lens": PROMPTS, "cu_seqlens": CU_SEQLENS}
    with (
        refused("qwen3, layer 2: no mask that keeps the sequences of cu_seqlens apart"),
        AttentionTap(model, **options),
    ):
        model(row(), use_cache=False)
    # transformers' gpt-oss builds its masks without position_ids: its eager attention mixes packed texts.
    with refused("gpt_oss, layer 2: a mask other than the causal or sliding-window mask of the cu_seqlens given"):
        observe(made(gpt_oss, "eager"), row(), **options)
    other = torch.arange(T).remainder(30)[None]
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with torch.no_grad(), AttentionTap(model, **options) as tap:
            model(row(), position_ids=other, use_cache=False)
        with refused("qwen3, layer 2: a mask other than the causal or sliding-window mask of the cu_seqlens given"):
            tap.signals()


def test_the_output_of_each_sequence_is_checked() -> None:
    """An attention without masks, as flash attention has them: only its output tells that it mixed the texts."""

    def flash_like(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
        apart = torch.arange(len(LENS)).repeat_interleave(torch.tensor(LENS)) if keeps_apart else torch.zeros(T)
        visible = torch.ones(T, T).tril().bool() & (apart[:, None] == apart)
        score = (query @ key.transpose(2, 3) * scaling).masked_fill(~visible, -torch.inf)
        return (score.softmax(-1) @ value).transpose(1, 2), None

    transformers.AttentionInterface.register("test_flash_packed", flash_like)
    flash_mask = transformers.AttentionMaskInterface()["flash_attention_2"]
    transformers.AttentionMaskInterface.register("test_flash_packed", flash_mask)
    model, options = made(qwen3, "sdpa"), {"prompt_lens": PROMPTS, "cu_seqlens": CU_SEQLENS, "signals": SIGNALS}
    expected = observe(model, row(), **options)
    model.config._attn_implementation = "test_flash_packed"  # set_attn_implementation would look for such a kernel
    of_pass = {"position_ids": positions(), "cu_seq_lens_q": CU_SEQLENS, "max_length_q": 40, "use_cache": False}
    keeps_apart = True
    with torch.no_grad(), AttentionTap(model, **options) as tap:
        model(row(), **of_pass)
    assert_same(tap.signals(), expected, rtol=1e-5, atol=1e-5)
    keeps_apart = False
    with torch.no_grad(), AttentionTap(model, **options) as tap:
        model(row(), **of_pass)
    with refused("qwen3, layer 2: an output of 'test_flash_packed' attention that is not that of causal attention"):
        tap.signals()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens of shape [2] ends at 5 for input_ids of shape [1, 74]"),
        ({"input_ids": torch.zeros(2, 37, dtype=torch.int64)}, "ends at 74 for input_ids of shape [2, 37]"),
        ({"cu_seqlens": torch.tensor([1, 74])}, "cu_seqlens is [1, 74]; it must begin at 0 and not fall"),
        ({"cu_seqlens": torch.tensor([0, 60, 50, 74])}, "it must begin at 0 and not fall"),
        ({"cu_seqlens": CU_SEQLENS.float()}, "cu_seqlens has shape [5] and dtype torch.float32; it must be int32 or"),
        ({"cu_seqlens": [0, 74]}, "cu_seqlens is of type list; it must be a torch.Tensor"),
        ({"attention_mask": torch.ones(1, 74)}, "cu_seqlens and attention_mask are both given"),
        ({"prompt_lens": [1, 2]}, "prompt_lens has shape [2]; it must be [4]"),
        ({"prompt_lens": [25, 0, 0, 0]}, "prompt_lens[0] is 25; its sequence allows 0 to 24"),
        (
            {"prompt_lens": None, "response_mask": response_mask().flip(1)},
            "response_mask must mark the last tokens of each sequence of cu_seqlens",
        ),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    call = {"input_ids": row(), "prompt_lens": PROMPTS, "cu_seqlens": CU_SEQLENS} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        observe(made(qwen3, "sdpa"), **call)
