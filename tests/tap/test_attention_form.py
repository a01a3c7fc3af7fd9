"""Unsupported attention is refused by name: by layer type, by argument or by mask."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface

from rhythm.tap import attention_form
from rhythm.tap.attention_form import UnsupportedAttention
from rhythm.tap.attention_tap import AttentionTap
from rhythm.tap.observe import observe
from rhythm.tap.padding import PaddedBatch
from rhythm.tap.signals_config import SignalsConfig

SIZES = models.SIZES | {"num_hidden_layers": 4}  # of which 1 and 2 are sampled
GQA: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
MOE: dict[str, Any] = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16,
}
T = 20
SDPA = AttentionInterface()["sdpa"]


def llama(implementation: str = "sdpa", **config: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | {"num_key_value_heads": 2} | config))
    model.eval().set_attn_implementation(implementation)
    return model


def bloom() -> Any:
    return transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=4, n_head=4))


def t5() -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=32, num_layers=4, num_heads=4)
    )


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


def qwen3_next() -> Any:
    kinds = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
    config = transformers.Qwen3NextConfig(**SIZES | GQA | MOE | LINEAR, layer_types=kinds)
    return transformers.Qwen3NextForCausalLM(config)


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(1))


def refused(message: str) -> Any:
    return pytest.raises(UnsupportedAttention, match=re.escape(message))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (bloom, "bloom: its attention does not go through transformers' attention interface"),
        (t5, "t5: an encoder-decoder"),
        (bert, "bert, layer 1: bidirectional attention"),
        (qwen3_next, "qwen3_next: can't read the attention of layers 1 (linear_attention); layers= may name"),
    ],
)
def test_models_refused_by_name(build: Callable[[], Any], message: str) -> None:
    model = build().eval()
    with refused(message):
        observe(model, tokens(2, T), prompt_lens=[2, 3])
    assert not model.config._attn_implementation.startswith("rhythm")


def test_attention_layers_of_hybrid_models_can_be_named() -> None:
    torch.manual_seed(0)
    model, input_ids = qwen3_next().eval(), tokens(1, T)
    signals = observe(model, input_ids, prompt_lens=[3], signals=SignalsConfig(layers=[2]))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(input_ids, output_attentions=True, use_cache=False).attentions
    (map_HTT,) = [layer[0] for layer in maps if layer is not None and layer.ndim == 4]
    distance = (torch.arange(T)[:, None] - torch.arange(T)).clamp(min=0)
    torch.testing.assert_close(signals.span[0], (map_HTT * distance).sum(-1)[:, 3:].mean(-1), rtol=0, atol=1e-5)
    with refused("can't read the attention of layers 0 (linear_attention); layers= may name some of [2]"):
        observe(model, input_ids, prompt_lens=[3], signals=SignalsConfig(layers=[0, 2]))


def test_layers_that_never_reach_the_interface() -> None:
    model, input_ids = llama(), tokens(1, T)
    tap = AttentionTap(model, prompt_lens=[2])
    with tap:
        pass
    with refused("llama: layers 1 (full_attention), 2 (full_attention) never reached"):
        tap.signals()
    # As if the layers had attention of their own, or had no index.
    model.model.layers[2].self_attn.layer_idx = None
    with refused("llama: layers 2 (full_attention) never reached transformers' attention interface"):
        observe(model, input_ids, prompt_lens=[2])
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.config = copy.copy(model.config)
    with refused("never reached transformers' attention interface (no layer did: has a forward pass run?)"):
        observe(model, input_ids, prompt_lens=[2])


def test_a_copied_model_inside_a_tap_is_an_error() -> None:
    model = llama()
    with AttentionTap(model, prompt_lens=[2]):
        copied = copy.deepcopy(model)
        with pytest.raises(RuntimeError, match="LlamaAttention holds a copy of the configuration"):
            copied(tokens(1, T))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_dropout(implementation: str) -> None:
    model = llama(implementation, attention_dropout=0.1)
    observe(model, tokens(1, T), prompt_lens=[2])
    with refused("llama, layer 1: attention dropout, active in train mode"):
        observe(model.train(), tokens(1, T), prompt_lens=[2])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"position_bias": torch.zeros(1, 4, T, T)}, "a position bias (position_bias)"),
        ({"seq_idx": torch.zeros(1, T)}, "sequences packed into one row (seq_idx)"),
        ({"novelty": 0.5}, "an argument that may change the scores (novelty)"),
        ({"is_causal": False}, "bidirectional attention"),
    ],
)
def test_arguments_of_the_forward_pass(argument: dict[str, Any], message: str) -> None:
    model = llama()
    with refused(f"llama, layer 1: {message}"), AttentionTap(model, prompt_lens=[2]):
        model(tokens(1, T), **argument)
    assert model.config._attn_implementation == "sdpa"


def test_harmless_arguments_of_the_forward_pass() -> None:
    model, input_ids = llama(), tokens(1, T)
    with AttentionTap(model, prompt_lens=[2]) as tap:
        model(
            input_ids,
            is_causal=True,
            num_items_in_batch=torch.tensor(3),
            output_hidden_states=True,
            s_aux=None,
            use_cache=False,
        )
    torch.testing.assert_close(
        tap.signals().waad, observe(model, input_ids, prompt_lens=[2]).waad, rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("is_cross_attention", True, "cross-attention (is_cross_attention)"),
        ("reorder_and_upcast_attn", True, "reordered, upcast attention (reorder_and_upcast_attn)"),
        ("is_causal", False, "bidirectional attention"),
        ("scaling", torch.tensor(0.3), "a softmax scale that is not one number but a Tensor"),
    ],
)
def test_attributes_of_the_attention_module(attribute: str, value: Any, message: str) -> None:
    model = llama()
    for layer in model.model.layers:
        setattr(layer.self_attn, attribute, value)
    with refused(f"llama, layer 1: {message}"):
        observe(model, tokens(1, T), prompt_lens=[2])


def test_sinks_only_where_the_implementation_heeds_them() -> None:
    """Llama's sdpa and eager attention know none: an argument is ignored as they do, and sinks in a module show."""
    model, input_ids = llama(), tokens(1, T)
    with AttentionTap(model, prompt_lens=[2]) as tap:
        model(input_ids, s_aux=torch.zeros(4), use_cache=False)
    expected = observe(model, input_ids, prompt_lens=[2])
    torch.testing.assert_close(tap.signals().waad, expected.waad, rtol=0, atol=0, equal_nan=True)
    model = llama("eager")
    for layer in model.model.layers:
        layer.self_attn.sinks = torch.zeros(4)
    with refused("llama, layer 1: an output of 'eager' attention that is not that of causal attention with"):
        observe(model, input_ids, prompt_lens=[2])
    for layer in model.model.layers:
        layer.self_attn.sinks = torch.zeros(3)
    with refused("llama, layer 1: attention sinks other than one per head, [4]"):
        observe(model, input_ids, prompt_lens=[2])


def test_the_forward_pass_must_have_the_masks_of_the_tap() -> None:
    model, input_ids = llama(), tokens(2, T)
    left, right = torch.ones(2, 2, T)
    left[1, :5] = right[1, -5:] = 0
    with refused("no mask on the padding"), AttentionTap(model, attention_mask=left, prompt_lens=[2, 2]):
        model(input_ids)
    packed = torch.cat([torch.arange(9), torch.arange(T - 9)]).expand(2, T)
    for of_tap, of_pass, message in (
        (None, {"attention_mask": left}, MASK_REFUSAL),
        (None, {"attention_mask": right}, MASK_REFUSAL),
        (left, {"attention_mask": right}, MASK_REFUSAL),
        (None, {"position_ids": packed, "use_cache": False}, PACKED_REFUSAL),
    ):
        with AttentionTap(model, attention_mask=of_tap, prompt_lens=[2, 2], stop=True) as tap:
            model(input_ids, **of_pass)
        for _ in range(2):  # what was refused once is never given
            with refused(f"llama, layer 1: {message}"):
                tap.signals()
    # Tokens don't see the padding after them, so its mask is not missed.
    with torch.no_grad(), AttentionTap(model, attention_mask=right, prompt_lens=[2, 2]) as tap:
        model(input_ids)
    expected = observe(model, input_ids, attention_mask=right, prompt_lens=[2, 2]).waad
    torch.testing.assert_close(tap.signals().waad, expected, rtol=0, atol=1e-5, equal_nan=True)


def test_batches_that_do_not_fit_the_forward_pass() -> None:
    model = llama()
    with (
        refused(f"queries of shape [1, 4, {T}, 8] for 2 sequences of {T} positions"),
        AttentionTap(model, attention_mask=torch.ones(2, T), prompt_lens=[2, 2]),
    ):
        model(tokens(1, T))
    with pytest.raises(ValueError, match=r"prompt_lens has shape \[2\]"), AttentionTap(model, prompt_lens=[2, 2]):
        model(tokens(1, T))


def test_eager_without_a_mask_is_bidirectional() -> None:
    call = call_with(None, implementation="eager")
    with refused("llama, layer 1: bidirectional attention"):
        attention_form.MaskReader(one_row()).window(call)
    one_token = PaddedBatch.from_mask(torch.ones(1, 1), [0])
    assert attention_form.MaskReader(one_token).window(call) is None


def test_attention_of_a_file_without_the_interface() -> None:
    model = llama()
    foreign: Any = torch.nn.Linear(1, 1)
    foreign.config = model.config
    x = torch.zeros(1, 4, T, 8)
    with AttentionTap(model, prompt_lens=[2]), refused("found no 'sdpa' attention in the model's own file"):
        AttentionInterface()[model.config._attn_implementation](foreign, x, x, x, None)


PACKED_REFUSAL = "packed rows, or chunks (position_ids or the mask start again within a row"
MASK_REFUSAL = "a mask other than the causal or sliding-window mask of the attention_mask given"


def mask4d(change: Callable[[Tensor], Any]) -> Tensor:
    mask = torch.ones(1, 1, T, T).tril().bool()
    change(mask)
    return mask


def additive(mask: Tensor, bias: float = 0.0) -> Tensor:
    return torch.where(mask, bias, torch.finfo(torch.float32).min)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (mask4d(lambda m: m[..., 5, 6].fill_(True)), "bidirectional attention"),
        (mask4d(lambda m: m[..., 9:, :9].fill_(False)), PACKED_REFUSAL),
        (mask4d(lambda m: m[..., 9, 9].fill_(False)), MASK_REFUSAL),
        (mask4d(lambda m: m[..., 9, 4].fill_(False)), MASK_REFUSAL),
        (mask4d(lambda m: m[..., -1, :-3].fill_(False)), MASK_REFUSAL),
        (mask4d(lambda m: m.fill_(False)), MASK_REFUSAL),
        (additive(mask4d(lambda m: None), bias=-1.0), "a position bias (in the mask)"),
        (mask4d(lambda m: None).long(), "a 4D mask of dtype torch.int64"),
        (mask4d(lambda m: None)[..., :-1], f"a mask of shape [1, 1, {T}, {T - 1}] for {T} positions"),
        (torch.ones(T, T), "a mask of unknown kind (2D tensor) for 'sdpa' attention"),
        ("block mask", "a mask of unknown kind (str) for 'sdpa' attention"),
    ],
)
def test_masks_refused(monkeypatch: pytest.MonkeyPatch, mask: Any, message: str) -> None:
    monkeypatch.setattr(attention_form, "MASK_ROWS", 8)
    with refused(f"llama, layer 1: {message}"):
        attention_form.MaskReader(one_row()).window(call_with(mask))


@pytest.mark.parametrize(
    ("mask", "window"),
    [
        (mask4d(lambda m: None), None),
        (additive(mask4d(lambda m: None)), None),
        (torch.where(mask4d(lambda m: None), 0.0, -torch.inf), None),
        (mask4d(lambda m: m.triu_(-6)), 7),
        (mask4d(lambda m: m.triu_(2 - T)), T - 1),
        (mask4d(lambda m: m.triu_(1 - T)), None),
        (mask4d(lambda m: None).expand(1, 4, T, T), None),
    ],
)
def test_windows_are_read_off_masks(monkeypatch: pytest.MonkeyPatch, mask: Tensor, window: int | None) -> None:
    monkeypatch.setattr(attention_form, "MASK_ROWS", 8)
    assert attention_form.MaskReader(one_row()).window(call_with(mask)) == window


def test_a_shared_mask_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    masks_read: list[Tensor] = []
    check = attention_form._check_mask
    monkeypatch.setattr(attention_form, "_check_mask", lambda *a: (masks_read.append(a[1]), check(*a))[1])
    observe(llama("eager"), tokens(1, T), prompt_lens=[2], signals=SignalsConfig(layers=[0, 1, 3]))
    assert len(masks_read) == 1


def one_row() -> PaddedBatch:
    return PaddedBatch.from_mask(torch.ones(1, T), [2])


def call_with(mask: Any, implementation: str = "sdpa") -> attention_form.AttentionCall:
    return attention_form.AttentionCall(
        where="llama, layer 1",
        layer=1,
        implementation=implementation,
        function=SDPA,
        module=torch.nn.Linear(1, 1),
        query=torch.zeros(1, 4, T, 8),
        key=torch.zeros(1, 2, T, 8),
        value=torch.zeros(1, 2, T, 8),
        mask=mask,
        options={},
    )
