"""AttentionTap around other code's forward passes."""

from __future__ import annotations

import threading
from typing import Any

import models
import pytest
import torch
import transformers
from tensors import assert_same
from torch import Tensor
from transformers.masking_utils import sdpa_mask
from transformers.utils.generic import is_flash_attention_requested

from rhythm.credit.config import CreditConfig
from rhythm.credit.gamma import batch_credit_weights
from rhythm.ops.backends.cpu import CpuBackend
from rhythm.ops.plugins import only_plain
from rhythm.tap.attention_form import UnsupportedAttention
from rhythm.tap.attention_tap import AttentionTap
from rhythm.tap.observe import observe
from rhythm.tap.signals_config import SignalsConfig

SIZES = models.SIZES | models.GQA | {"num_hidden_layers": 6}


def qwen3(implementation: str = "sdpa", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES)).eval()
    model.set_attn_implementation(implementation)
    return model


def gemma(kind: str, implementation: str) -> Any:
    torch.manual_seed(0)
    window: dict[str, Any] = {
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "sliding_window": 8,
    }
    if kind == "gemma3":
        model: Any = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SIZES, **window))
    else:
        model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, **window))
    model.eval().set_attn_implementation(implementation)
    return model


T, PROMPT_LENS = 60, [6, 3]


def batch(side: str = "right") -> tuple[Tensor, Tensor]:
    """Two rows of 60 and 48 tokens."""
    input_ids = torch.randint(0, 61, (2, T), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(input_ids)
    mask[1, slice(48, None) if side == "right" else slice(0, 12)] = 0
    return input_ids, mask


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "gemma2"])
def test_same_forward_pass_and_same_gamma_as_observe(kind: str, implementation: str, side: str, grad: bool) -> None:
    model = qwen3(implementation) if kind == "qwen3" else gemma(kind, implementation)
    input_ids, mask = batch(side)
    inputs: dict[str, Any] = {"attention_mask": mask, "use_cache": False}
    if side == "left":
        inputs["position_ids"] = positions(mask)
    with torch.set_grad_enabled(grad):
        bare = model(input_ids, **inputs).logits
        with AttentionTap(model, attention_mask=mask, prompt_lens=PROMPT_LENS) as tap:
            logits = model(input_ids, **inputs).logits
    assert logits.equal(bare)
    signals = tap.signals()
    assert not signals.waad.requires_grad
    observed = observe(model, input_ids, attention_mask=mask, prompt_lens=PROMPT_LENS)
    assert_same(signals, observed)
    response = mask.bool() & (positions(mask) >= torch.tensor(PROMPT_LENS)[:, None])
    config = CreditConfig(strategy="coupled")
    gamma = batch_credit_weights(signals, response, config)
    assert gamma.equal(batch_credit_weights(observed, response, config))
    assert (gamma > 1).any(dim=1).all()
    if grad:
        logits.sum().backward()
        grads = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        bare.sum().backward()
        assert all(g.equal(p.grad) for g, p in zip(grads, model.parameters(), strict=True))


def test_gradient_checkpointing_recomputes_after_the_tap() -> None:
    model, (input_ids, mask) = qwen3().train(), batch()
    model(input_ids, attention_mask=mask).logits.sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    with AttentionTap(model, attention_mask=mask, prompt_lens=PROMPT_LENS) as tap:
        loss = model(input_ids, attention_mask=mask).logits.sum()
    loss.backward()
    assert all(g.equal(p.grad) for g, p in zip(plain, model.parameters(), strict=True))
    assert_same(tap.signals(), observe(model, input_ids, attention_mask=mask, prompt_lens=PROMPT_LENS))


def test_recomputing_inside_the_tap_is_refused() -> None:
    model, (input_ids, mask) = qwen3().train(), batch()
    model.gradient_checkpointing_enable()
    with AttentionTap(model, attention_mask=mask, prompt_lens=PROMPT_LENS):
        loss = model(input_ids, attention_mask=mask).logits.sum()
        with pytest.raises(RuntimeError, match="qwen3, layer 4: ran twice in one tap"):
            loss.backward()
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("use_cache", [True, False])
def test_generating_inside_the_tap_is_refused(use_cache: bool) -> None:
    model, (input_ids, _) = qwen3(), batch()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "use_cache": use_cache}
    message = r"ran twice in one tap; open one for each forward pass \(generate\(\) runs many: generate before the tap"
    with AttentionTap(model, prompt_lens=PROMPT_LENS), pytest.raises(RuntimeError, match=message):
        model.generate(input_ids, **options)


def test_micro_batches_one_tap_each() -> None:
    model, (input_ids, _) = qwen3(), batch()
    signals = []
    for i in range(2):
        with AttentionTap(model, prompt_lens=PROMPT_LENS[i : i + 1]) as tap:
            model(input_ids[i : i + 1], use_cache=False)
        signals.append(tap.signals())
    with pytest.raises(RuntimeError, match="this tap has served its forward pass"), tap:
        pass
    assert model.config._attn_implementation == "sdpa"
    for i, one in enumerate(signals):
        assert_same(one, observe(model, input_ids[i : i + 1], prompt_lens=PROMPT_LENS[i : i + 1]))
    with AttentionTap(model, prompt_lens=PROMPT_LENS[:1]):
        model(input_ids[:1])
        with pytest.raises(RuntimeError, match="layer 2: ran twice in one tap; open one for each forward"):
            model(input_ids[:1])


def test_entropy_is_passed_through() -> None:
    model, (input_ids, mask) = qwen3(), batch()
    with AttentionTap(model, attention_mask=mask, prompt_lens=PROMPT_LENS) as tap:
        model(input_ids, attention_mask=mask)
    entropy = torch.rand(2, T)
    assert tap.signals().entropy is None
    passed = tap.signals(entropy).entropy
    assert passed is not None
    assert passed[0, 6:].equal(entropy[0, 6:])
    assert passed[0, :6].isnan().all()
    with pytest.raises(ValueError, match=r"entropy has shape \[2, 59\]"):
        tap.signals(entropy[:, 1:])


def test_exceptions_pass_and_the_implementation_comes_back() -> None:
    model, (input_ids, mask) = qwen3("eager"), batch()
    tap, names = AttentionTap(model, attention_mask=mask, prompt_lens=PROMPT_LENS), []
    with pytest.raises(KeyError, match="mine"), tap:
        raise KeyError("mine", names.append(model.config._attn_implementation))
    assert names == ["rhythm_tap|eager"]
    assert model.config._attn_implementation == "eager"
    observe(model, input_ids, attention_mask=mask, prompt_lens=PROMPT_LENS)


def test_taps_do_not_nest() -> None:
    model, (input_ids, mask) = qwen3(), batch()
    with AttentionTap(model, attention_mask=mask, prompt_lens=PROMPT_LENS) as outer:
        for inner in (outer, AttentionTap(model, prompt_lens=PROMPT_LENS)):
            with pytest.raises(RuntimeError, match="a tap is already open on this qwen3 model"), inner:
                pass
        model(input_ids, attention_mask=mask)
    assert model.config._attn_implementation == "sdpa"
    assert_same(outer.signals(), observe(model, input_ids, attention_mask=mask, prompt_lens=PROMPT_LENS))


def test_nothing_is_read_from_other_models_or_after_closing() -> None:
    model, other, (input_ids, _) = qwen3(), qwen3(seed=1), batch()
    expected = observe(model, input_ids, prompt_lens=PROMPT_LENS)
    with AttentionTap(model, prompt_lens=PROMPT_LENS) as tap:
        other(input_ids)
        model(input_ids)
    model(input_ids)
    assert_same(tap.signals(), expected)


def test_models_in_threads_of_their_own() -> None:
    models, (input_ids, _) = [qwen3(seed=seed) for seed in range(2)], batch()
    expected = [observe(model, input_ids, prompt_lens=PROMPT_LENS) for model in models]
    both_open, results = threading.Barrier(2, timeout=30), {}

    def work(i: int) -> None:
        with torch.no_grad(), AttentionTap(models[i], prompt_lens=PROMPT_LENS) as tap:
            both_open.wait()
            models[i](input_ids)
            both_open.wait()
        results[i] = tap.signals()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert_same(results[i], expected[i])


def test_stop_leaves_the_block() -> None:
    model, (input_ids, mask) = qwen3(), batch()
    after = False
    with AttentionTap(model, attention_mask=mask, prompt_lens=PROMPT_LENS, stop=True) as tap:
        model(input_ids, attention_mask=mask)
        after = True
    assert not after
    assert tap.signals().waad[0, 6:].isfinite().all()


def test_a_key_value_cache_that_was_empty_is_fine() -> None:
    model, (input_ids, _) = qwen3(), batch()
    with AttentionTap(model, prompt_lens=PROMPT_LENS) as tap:
        output = model(input_ids, use_cache=True)
    assert output.past_key_values.get_seq_length() == T
    assert_same(tap.signals(), observe(model, input_ids, prompt_lens=PROMPT_LENS))
    with (
        AttentionTap(model, prompt_lens=[0, 0]),
        pytest.raises(UnsupportedAttention, match="62 keys for 2 queries: cross-attention, or a KV cache"),
    ):
        model(input_ids[:, :2], past_key_values=output.past_key_values)


def test_composite_models_keep_the_implementations_of_their_parts() -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = SIZES | {"layer_types": ["full_attention"] * 6}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28})
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "eager"})
    input_ids, mask = batch()
    with AttentionTap(model, attention_mask=mask, prompt_lens=PROMPT_LENS) as tap:
        assert model.config.vision_config._attn_implementation == "eager"
        model(input_ids, attention_mask=mask)
    assert model.config.text_config._attn_implementation == "sdpa"
    assert model.config.vision_config._attn_implementation == "eager"
    of_text = observe(model.model.language_model, input_ids, attention_mask=mask, prompt_lens=PROMPT_LENS)
    assert_same(tap.signals(), of_text)


def test_sub_models_under_the_text_configuration_keep_theirs() -> None:
    class WithVisionConfig(transformers.LlamaConfig):
        sub_configs = {"vision_config": transformers.CLIPVisionConfig}  # noqa: RUF012

    config = WithVisionConfig(**SIZES)
    config.vision_config = transformers.CLIPVisionConfig()
    model = transformers.LlamaForCausalLM(config).eval()
    config.vision_config._attn_implementation = "eager"
    with AttentionTap(model, prompt_lens=PROMPT_LENS):
        assert config.vision_config._attn_implementation == "eager"
        model(batch()[0])
    assert config.vision_config._attn_implementation == "eager"
    assert config._attn_implementation == "sdpa"


def test_autocast_does_not_reach_the_statistics() -> None:
    """fp32 queries and keys under bf16 autocast: the statistics are those without it, to fp32 rounding."""

    class Fp32Attention:
        """sdpa in fp32 with the queries and keys it got."""

        seen: list[tuple[Tensor, Tensor]] = []  # noqa: RUF012

        def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
            with torch.autocast("cpu", enabled=False):
                return SDPA(module, query.float(), key.float(), value.float(), mask, **kwargs)

    transformers.AttentionInterface.register("test_fp32", Fp32Attention())
    transformers.AttentionMaskInterface.register("test_fp32", sdpa_mask)
    model, (input_ids, _) = qwen3(), batch()
    model.set_attn_implementation("test_fp32")
    options: dict[str, Any] = {"prompt_lens": PROMPT_LENS, "signals": SignalsConfig(layers=[0], backend="reference")}
    layer = model.model.layers[0].self_attn
    hooks = [norm.register_forward_hook(lambda *a: a[2].float()) for norm in (layer.q_norm, layer.k_norm)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cast = observe(model, input_ids, **options)
        # The same queries and keys, their statistics by the fused kernel, which autocast can't reach.
        kernel = observe(model, input_ids, **options | {"signals": SignalsConfig(layers=[0], backend="cpu")})
    assert len(hooks) == 2
    torch.testing.assert_close(cast.waad, kernel.waad, rtol=0, atol=1e-5, equal_nan=True)


SDPA = transformers.AttentionInterface()["sdpa"]


def flash_like(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """Behaves like flash attention: takes its name from the configuration, unpads, has windows and softcaps."""
    assert module.config._attn_implementation == "test_flash"
    window, T = kwargs.pop("sliding_window", None), query.shape[2]
    real = torch.ones(query.shape[0], T) if attention_mask is None else attention_mask
    distance = torch.arange(T)[:, None] - torch.arange(T)
    visible = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    output, _ = SDPA(module, query, key, value, visible & real.bool()[:, None, None], **kwargs)
    return output * real[:, :, None, None], None


def flash_with_window(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> Any:
    return flash_like(module, query, key, value, attention_mask, sliding_window=sliding_window, **kwargs)


@pytest.fixture
def flash() -> str:
    transformers.AttentionInterface.register("test_flash", flash_with_window)
    flash_mask = transformers.AttentionMaskInterface()["flash_attention_2"]
    transformers.AttentionMaskInterface.register("test_flash", flash_mask)
    return "test_flash"


@pytest.mark.parametrize("side", ["right", "left", "none"])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
def test_implementations_with_2d_masks(flash: str, kind: str, side: str) -> None:
    model = qwen3() if kind == "qwen3" else gemma(kind, "sdpa")
    input_ids, mask = batch("right" if side == "none" else side)
    if side == "none":
        mask = torch.ones_like(mask)
    expected = observe(model, input_ids, attention_mask=mask, prompt_lens=PROMPT_LENS)
    model.config._attn_implementation = flash  # set_attn_implementation would look for such a kernel
    signals = observe(model, input_ids, attention_mask=mask, prompt_lens=PROMPT_LENS)
    torch.testing.assert_close(signals.waad, expected.waad, rtol=0, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(signals.span, expected.span, rtol=0, atol=2e-5, equal_nan=True)
    with AttentionTap(model, prompt_lens=PROMPT_LENS):
        assert is_flash_attention_requested(model.config)
    if side != "none":
        wrong = mask.flip(0) if side == "left" else torch.ones_like(mask)
        with AttentionTap(model, attention_mask=wrong, prompt_lens=PROMPT_LENS) as tap:
            model(input_ids, attention_mask=mask)
        with pytest.raises(UnsupportedAttention, match="a padding mask other than the attention_mask given"):
            tap.signals()


def test_a_window_as_long_as_the_sequence_does_not_bite(flash: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An implementation with 2D masks gives the window as it is; a backend without windows must still serve."""
    model, (input_ids, _) = gemma("gemma3", "sdpa"), batch()
    model.config._attn_implementation = flash
    monkeypatch.setattr(CpuBackend, "refuses", lambda self, request: only_plain(request))
    observe(model, input_ids[:, :8], prompt_lens=PROMPT_LENS, signals=SignalsConfig(backend="cpu"))
    with pytest.raises(ValueError, match="backend 'cpu' can't run: the call has sliding_window"):
        observe(model, input_ids[:, :9], prompt_lens=PROMPT_LENS, signals=SignalsConfig(backend="cpu"))


@pytest.mark.slow
def test_torch_compile_gives_the_same() -> None:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**SIZES | {"num_hidden_layers": 2})
    model, (input_ids, _) = transformers.Qwen3ForCausalLM(config).eval(), batch()
    options: dict[str, Any] = {"prompt_lens": PROMPT_LENS, "signals": SignalsConfig(layers=[1])}
    expected = observe(model, input_ids, **options)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), AttentionTap(compiled, **options) as tap:
        compiled(input_ids, use_cache=False)
    assert_same(tap.signals(), expected)
