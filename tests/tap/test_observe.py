"""observe() against the maps that output_attentions=True gives under eager attention."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import transformers
from models import GQA
from tensors import assert_same
from torch import Tensor

from rhythm.credit.heads import HeadGroups, sampled_layers, select_heads
from rhythm.credit.signals import RhythmSignals
from rhythm.ops import reference
from rhythm.tap.attention_form import UnsupportedAttention
from rhythm.tap.attention_tap import AttentionTap
from rhythm.tap.observe import observe
from rhythm.tap.signals_config import SignalsConfig

WINDOW, HORIZON = 4, (2, 9)
LAYERS = 6  # of which 2, 3 and 4 are sampled
# Weights large enough for attention far from uniform.
SIZES = models.SIZES | {"num_hidden_layers": LAYERS}
ALTERNATING = ["sliding_attention", "full_attention"] * (LAYERS // 2)


def qwen3() -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, **GQA))


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=1))


def gpt_neox() -> Any:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES))


def gpt2() -> Any:  # learned positions
    config = transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=LAYERS, n_head=4, initializer_range=0.3)
    return transformers.GPT2LMHeadModel(config)


def gemma3(sliding_window: int = 8) -> Any:
    config = transformers.Gemma3TextConfig(
        **SIZES, **GQA, layer_types=ALTERNATING, sliding_window=sliding_window, query_pre_attn_scalar=5
    )
    return transformers.Gemma3ForCausalLM(config)


def gemma2(softcap: float | None = 1.5, sliding_window: int = 8) -> Any:
    config = transformers.Gemma2Config(
        **SIZES,
        **GQA,
        layer_types=ALTERNATING,
        sliding_window=sliding_window,
        query_pre_attn_scalar=5,
        attn_logit_softcapping=softcap,
        final_logit_softcapping=3.0,
    )
    return transformers.Gemma2ForCausalLM(config)


def gpt_oss() -> Any:  # sinks, and a window in every second layer
    config = transformers.GptOssConfig(
        **SIZES, **GQA, layer_types=ALTERNATING, sliding_window=8, num_local_experts=2, num_experts_per_tok=1
    )
    model = transformers.GptOssForCausalLM(config)
    for i, layer in enumerate(model.model.layers):
        torch.nn.init.normal_(layer.self_attn.sinks, mean=1.0, generator=torch.Generator().manual_seed(i))
    return model


def mistral() -> Any:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, **GQA, sliding_window=6))


def qwen2() -> Any:
    config = transformers.Qwen2Config(
        **SIZES, num_key_value_heads=2, use_sliding_window=True, sliding_window=7, max_window_layers=3
    )
    return transformers.Qwen2ForCausalLM(config)


def phi3() -> Any:
    config = transformers.Phi3Config(**SIZES, num_key_value_heads=2, sliding_window=9, pad_token_id=0)
    return transformers.Phi3ForCausalLM(config)


def llama4(chunk: int = 7) -> Any:  # chunks in three layers of four
    config = transformers.Llama4TextConfig(
        **SIZES, **GQA, num_local_experts=2, intermediate_size_mlp=32, pad_token_id=None, attention_chunk_size=chunk
    )
    return transformers.Llama4ForCausalLM(config)


MODELS: dict[str, Callable[[], Any]] = {
    "qwen3": qwen3,
    "llama": llama,
    "gpt_neox": gpt_neox,
    "gpt2": gpt2,
    "gemma3, window bites": gemma3,
    "gemma3, window as long": lambda: gemma3(sliding_window=24),
    "gemma2": gemma2,
    "gpt_oss": gpt_oss,
    "mistral": mistral,
    "qwen2, windows": qwen2,
    "phi3": phi3,
    "llama4, chunks": llama4,
    "llama4, chunk as long": lambda: llama4(24),
}


def made(build: Callable[[], Any], implementation: str = "sdpa", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = build().eval()
    model.set_attn_implementation(implementation)
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(1))


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask [B, T]; the padding holds a token that occurs in the rows too."""
    width = max(len(row) for row in rows) + (2 if side == "both" else 0)
    input_ids, mask = torch.full((len(rows), width), 7), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        start = {"right": 0, "left": width - len(row), "both": 1}[side]
        input_ids[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = 1
    return input_ids, mask


def by_maps(model: Any, row: Tensor, prompt_len: int, layers: list[int]) -> RhythmSignals:
    signals = SignalsConfig(layers=layers, window=WINDOW, horizon=HORIZON)
    return models.signals_by_maps(model, row, prompt_len, signals)


def assert_close(actual: Tensor | None, expected: Tensor | None, atol: float = 1e-5) -> None:
    assert actual is not None
    assert expected is not None
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol, equal_nan=True)


# sdpa ignores Gemma 2's softcap: see test_softcap_only_where_the_implementation_heeds_it.
# gpt-oss has no sdpa attention.
EAGER_ALONE = ("gemma2", "gpt_oss")
CASES = [(name, i) for name in MODELS for i in ("sdpa", "eager") if i == "eager" or name not in EAGER_ALONE]


@pytest.mark.parametrize("side", ["right", "left", "both"])
@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_rows_equal_their_attention_maps(name: str, implementation: str, side: str) -> None:
    model = made(MODELS[name], implementation)
    rows, prompt_lens = list(tokens(3, 24)), [5, 0, 11]
    rows[1], rows[2] = rows[1][:7], rows[2][:19]
    input_ids, mask = padded(rows, side)
    signals = observe(
        model,
        input_ids,
        attention_mask=mask,
        prompt_lens=prompt_lens,
        entropy=True,
        signals=SignalsConfig(window=WINDOW, horizon=HORIZON),
    )
    assert signals.waad.dtype == signals.fai.dtype == signals.span.dtype == torch.float32
    for i, (row, prompt_len) in enumerate(zip(rows, prompt_lens, strict=True)):
        alone, real = by_maps(model, row, prompt_len, sampled_layers(LAYERS)), mask[i].bool()
        assert signals.groups.local[i].equal(alone.groups.local[0])
        assert signals.groups.global_[i].equal(alone.groups.global_[0])
        assert_close(signals.span[i], alone.span[0])
        for field in ("waad", "fai", "entropy"):
            value = getattr(signals, field)[i]
            assert_close(value[real], getattr(alone, field)[0])
            assert value[~real].isnan().all()
        assert alone.waad.isnan().sum() == prompt_len
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_no_mask_is_no_padding(implementation: str) -> None:
    model, input_ids = made(qwen3, implementation), tokens(2, 20)
    bare = observe(
        model, input_ids, prompt_lens=torch.tensor([3, 9]), signals=SignalsConfig(window=WINDOW, horizon=HORIZON)
    )
    masked = observe(
        model,
        input_ids,
        attention_mask=torch.ones_like(input_ids).bool(),
        prompt_lens=[3, 9],
        signals=SignalsConfig(window=WINDOW, horizon=HORIZON),
    )
    assert_same(bare, masked)
    assert bare.entropy is None
    assert_close(bare.waad[1], by_maps(model, input_ids[1], 9, [2, 3, 4]).waad[0])


def test_default_window_and_horizon() -> None:
    model, input_ids = made(llama), tokens(1, 70)
    default = observe(model, input_ids, prompt_lens=[4])
    named = observe(model, input_ids, prompt_lens=[4], signals=SignalsConfig(window=10, horizon=(10, 50)))
    assert_same(default, named)
    assert not observe(model, input_ids, prompt_lens=[4], signals=SignalsConfig(horizon=(10, None))).fai.equal(
        default.fai
    )


@pytest.mark.parametrize("build", [gemma3, gemma2, gpt_oss], ids=lambda build: build.__name__)
def test_no_map_is_made(monkeypatch: pytest.MonkeyPatch, build: Callable[[], Any]) -> None:
    """Windows, capped scores and sinks go through the kernels, as plain attention does."""

    def reference_alone(*_: Any, **__: Any) -> Any:
        raise AssertionError("the reference ran")

    model, options = made(build, "eager"), {"prompt_lens": [1, 2]}
    expected = observe(model, tokens(2, 30), signals=SignalsConfig(backend="reference"), **options)
    monkeypatch.setattr(reference, "attention_weights", reference_alone)
    for backend in ("auto", "cpu"):
        signals = observe(model, tokens(2, 30), signals=SignalsConfig(backend=backend), **options)
        assert_same(signals, expected, rtol=1e-4, atol=1e-4)


def test_softcap_only_where_the_implementation_heeds_it() -> None:
    rows = tokens(1, 24)
    capped, plain = made(gemma2, "sdpa"), made(lambda: gemma2(softcap=None), "eager")
    options: dict[str, Any] = {"prompt_lens": [5], "signals": SignalsConfig(window=WINDOW, horizon=HORIZON)}
    # What ran is attention without the cap, so these are its statistics.
    assert_close(observe(capped, rows, **options).waad, by_maps(plain, rows[0], 5, [2, 3, 4]).waad)
    capped.set_attn_implementation("eager")
    difference = observe(capped, rows, **options).waad - observe(plain, rows, **options).waad
    assert difference[0, 5:].abs().max() > 0.1


def test_scale_is_the_layers_own() -> None:
    model, input_ids = made(qwen3), tokens(1, 20)
    before = observe(model, input_ids, prompt_lens=[0]).waad
    for layer in model.model.layers:
        layer.self_attn.scaling /= 4
    after = observe(model, input_ids, prompt_lens=[0]).waad
    assert (after - before).abs().max() > 0.1


def test_stops_after_the_last_sampled_layer() -> None:
    model, input_ids = made(qwen3), tokens(1, 12)
    ran: list[int] = []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    observe(model, input_ids, prompt_lens=[2])
    assert ran == [0, 1, 2, 3, 4]
    observe(model, input_ids, prompt_lens=[2], signals=SignalsConfig(layers=[1]))
    assert ran == [0, 1, 2, 3, 4, 0, 1]
    ran.clear()
    observe(model, input_ids, prompt_lens=[2], entropy=True, signals=SignalsConfig(layers=[1]))
    assert ran == list(range(LAYERS))


def test_runs_without_gradients_and_leaves_the_mode() -> None:
    model = made(qwen3).train()
    signals = observe(model, tokens(1, 12), prompt_lens=[2], entropy=True)
    assert model.training
    assert signals.entropy is not None
    assert not any(t.requires_grad for t in (signals.waad, signals.fai, signals.entropy, signals.span))


def test_explicit_layers_are_the_pool() -> None:
    model, input_ids = made(qwen3), tokens(1, 20)
    signals = observe(
        model,
        input_ids,
        prompt_lens=[3],
        entropy=True,
        signals=SignalsConfig(layers=[0, 5], window=WINDOW, horizon=HORIZON),
    )
    alone = by_maps(model, input_ids[0], 3, [0, 5])
    assert signals.span.shape == (1, 8)
    assert_close(signals.span, alone.span)
    assert_close(signals.fai, alone.fai)


def test_grouping_and_fixed_groups() -> None:
    model, input_ids = made(qwen3), tokens(3, 20)
    prompt_lens = [3, 4, 5]
    options: dict[str, Any] = {"prompt_lens": prompt_lens, "signals": SignalsConfig(quantile=0.2)}
    own = observe(model, input_ids, **options)
    for grouping in ("batch", "calibrated"):
        signals = SignalsConfig(quantile=0.2, grouping=grouping)
        joint = observe(model, input_ids, prompt_lens=prompt_lens, signals=signals)
        assert joint.groups.local.equal(select_heads(own.span, 0.2, per="batch").local)
    assert not own.groups.local[0].equal(own.groups.local[1])
    chosen = torch.zeros(2, 1, 12, dtype=torch.bool)
    chosen[0, 0, 1] = chosen[1, 0, 7] = True
    fixed = observe(model, input_ids, **options, groups=HeadGroups(chosen[0], chosen[1]))
    alone = observe(model, input_ids[2:], prompt_lens=[5], groups=HeadGroups(chosen[0], chosen[1]))
    assert_close(fixed.waad[2], alone.waad[0])
    with pytest.raises(ValueError, match=r"groups\.local has shape \[1, 11\]"):
        observe(model, input_ids, **options, groups=HeadGroups(chosen[0, :, 1:], chosen[1, :, 1:]))


def test_rows_without_a_response_and_empty_rows_are_nan() -> None:
    model = made(qwen3)
    input_ids, mask = padded([tokens(10), tokens(8), tokens(0)], "right")
    signals = observe(model, input_ids, attention_mask=mask, prompt_lens=[4, 8, 0], entropy=True)
    assert signals.waad[0, 4:].isfinite().all()
    for value in (signals.waad, signals.fai, signals.entropy, signals.span):
        assert value is not None
        assert value[1:].isnan().all()
    assert not signals.groups.local[1:].any()


def test_padding_has_no_influence_even_if_it_breaks_the_model() -> None:
    model, rows = made(qwen3), [tokens(12), tokens(9)]
    input_ids, mask = padded(rows, "right")
    before = observe(model, input_ids, attention_mask=mask, prompt_lens=[2, 3])
    input_ids[~mask.bool()] = 60
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = 1e30
    assert not (tokens(12) == 60).any()
    assert_same(observe(model, input_ids, attention_mask=mask, prompt_lens=[2, 3]), before)


def test_entropy_is_chunked_over_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, input_ids = made(qwen3), tokens(2, 20)
    whole = observe(model, input_ids, prompt_lens=[3, 0], entropy=True).entropy
    sizes: list[int] = []
    entr = torch.special.entr
    # By name rhythm.observe is the function.
    monkeypatch.setattr(sys.modules["rhythm.tap.observe"], "ENTROPY_ELEMENTS", 5 * 61)
    monkeypatch.setattr(torch.special, "entr", lambda p: (sizes.append(p.shape[0]), entr(p))[1])
    assert_close(observe(model, input_ids, prompt_lens=[3, 0], entropy=True).entropy, whole, atol=1e-6)
    assert sizes == [5] * 7 + [1]  # 17 + 19 positions: the first token of row 1 was drawn from nothing


def test_half_precision_and_float64_models() -> None:
    input_ids = tokens(1, 24)
    exact = observe(made(qwen3), input_ids, prompt_lens=[4])
    for dtype, atol in ((torch.bfloat16, 0.3), (torch.float16, 0.05), (torch.float64, 1e-5)):
        for implementation in ("sdpa", "eager"):
            signals = observe(made(qwen3, implementation).to(dtype), input_ids, prompt_lens=[4])
            assert signals.waad.dtype == torch.float32
            assert_close(signals.span, exact.span, atol=atol)


def test_base_model_without_a_head() -> None:
    model, input_ids = made(qwen3), tokens(1, 12)
    assert_same(observe(model.model, input_ids, prompt_lens=[2]), observe(model, input_ids, prompt_lens=[2]))
    with pytest.raises(ValueError, match="Qwen3Model gives no logits"):
        observe(model.model, input_ids, prompt_lens=[2], entropy=True)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("build", [qwen3, gemma3], ids=["qwen3", "gemma3, window bites"])
@torch.no_grad()
def test_flex_attention(build: Callable[[], Any], side: str) -> None:
    """The signals of its BlockMask are those of sdpa's mask; a packed row is refused like any other."""
    input_ids, mask = padded([tokens(24), tokens(17)], side)
    options = SignalsConfig(window=WINDOW, horizon=HORIZON)
    arguments: dict[str, Any] = {"attention_mask": mask, "prompt_lens": [4, 3], "signals": options}
    flex, expected = made(build, "flex_attention"), observe(made(build), input_ids, **arguments)
    with torch.compiler.set_stance("force_eager"):  # compiling it takes a minute
        signals = observe(flex, input_ids, **arguments)
        with AttentionTap(flex, prompt_lens=[2, 2], stop=True) as packed:
            flex(tokens(2, 24), position_ids=torch.arange(24).remainder(10).expand(2, 24), use_cache=False)
    for name in ("waad", "fai", "span"):
        x, y = getattr(signals, name), getattr(expected, name)
        torch.testing.assert_close(x, y, rtol=0, atol=1e-4, equal_nan=True)
    with pytest.raises(UnsupportedAttention, match="packed rows"):
        packed.signals()
