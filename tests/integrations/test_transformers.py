"""attn_implementation="rhythm": outputs against sdpa and eager attention, statistics against the eager maps."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from registered_attention import (
    OPTIONS,
    PROMPT_LENS,
    T,
    assert_statistics_of_the_maps,
    batch,
    made,
)
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    chunked_causal_mask_function,
    create_causal_mask,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

import rhythm
from rhythm.integrations import short_masks
from rhythm.integrations import transformers as integration
from rhythm.integrations.transformers import LayerStatistics, collect_statistics, register
from rhythm.ops.answers import ALSO
from rhythm.tap.attention_form import UnsupportedAttention


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma3", "deepseek", "gemma2", "gpt_oss", "mistral", "llama4"])
def test_logits_and_statistics(kind: str, side: str, grad: bool) -> None:
    input_ids, inputs = batch(side)
    model, eager = made(kind), made(kind, "eager")
    sdpa = None if kind in ("gemma2", "gpt_oss") else made(kind, "sdpa")  # it ignores softcaps and sinks
    with torch.set_grad_enabled(grad), collect_statistics(prompt_lens=PROMPT_LENS, also=ALSO, **OPTIONS) as statistics:
        logits = model(input_ids, **inputs).logits
    assert list(statistics) == [0, 1, 2, 3]
    mask = inputs["attention_mask"]
    with torch.no_grad():
        for other in (eager, *([] if sdpa is None else [sdpa])):
            expected = other(input_ids, **inputs).logits
            atol = 3e-5 if kind == "gpt_oss" else 1e-5  # its experts make larger numbers of the same last digits
            torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=atol)
    assert_statistics_of_the_maps(statistics, eager, input_ids, mask, PROMPT_LENS)


def test_lse_and_scale_are_those_of_the_scores() -> None:
    """By the queries and keys themselves."""
    seen = []

    def recorder(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        seen.append((query[:, :, -1], key.repeat_interleave(2, dim=1), options["scaling"]))
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    transformers.AttentionInterface.register("test_recorder", recorder)
    transformers.AttentionMaskInterface.register("test_recorder", sdpa_mask)
    input_ids, inputs = batch("none")
    made(implementation="test_recorder")(input_ids, **inputs)
    with torch.no_grad(), collect_statistics() as statistics:
        made()(input_ids, **inputs)
    for layer, (q, k, scale) in enumerate(seen):
        last = (torch.einsum("bhd,bhtd->bht", q, k) * scale).logsumexp(dim=-1)
        torch.testing.assert_close(statistics[layer].lse[:, :, -1], last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_sdpas(checkpointing: bool) -> None:
    (input_ids, inputs), grads = batch("left"), []
    for implementation in ("rhythm", "sdpa"):
        model = made(implementation=implementation).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with collect_statistics(prompt_lens=PROMPT_LENS) as statistics:
            loss = model(input_ids, labels=input_ids, **inputs).loss
        assert len(statistics) == (4 if implementation == "rhythm" else 0)
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(x.equal(y) for x, y in zip(*grads, strict=True))


@pytest.mark.parametrize("side", ["none", "left"])
def test_outside_the_context_it_is_sdpa_bit_for_bit(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "chunked_with_statistics", None)
    (input_ids, inputs), model, sdpa = batch(side), made(), made(implementation="sdpa")
    with torch.no_grad():
        assert model(input_ids, **inputs).logits.equal(sdpa(input_ids, **inputs).logits)


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "gemma2", "gpt_oss", "mistral", "llama4"])
def test_inside_it_is_one_sweep_and_no_square_mask(kind: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError

    for name in ("sdpa_attention_forward", "chunked_statistics", "whole_mask"):
        monkeypatch.setattr(integration, name, forbidden)
    monkeypatch.setattr(short_masks, "sdpa_mask", forbidden)
    input_ids, inputs = batch(side)
    with torch.no_grad(), collect_statistics() as statistics:
        made(kind)(input_ids, **inputs)
    assert len(statistics) == 4


def test_masks_are_made_once_where_sdpa_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Tensor | None] = []

    def sdpa(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
        masks.append(attention_mask)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    monkeypatch.setattr(integration, "sdpa_attention_forward", sdpa)
    (input_ids, inputs), model = batch("left"), made()
    with collect_statistics():
        model(input_ids, **inputs)
    assert len({id(mask) for mask in masks}) == 1
    assert masks[0] is not None
    assert masks[0].shape == (2, 1, T, T)
    masks.clear()
    # No padding in the attention_mask is as good as no attention_mask.
    (input_ids, inputs), model = batch("none"), made()
    with torch.no_grad(), collect_statistics(layers=[1]):
        model(input_ids, **inputs)
    assert masks == [None] * 3


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("kind", ["gemma3", "mistral", "llama4"])
def test_layers_not_asked_for_have_their_window_or_chunks(kind: str, side: str) -> None:
    """sdpa gets the whole mask that transformers would have made, once for the layers that share it."""
    (input_ids, inputs), model = batch(side), made(kind)
    with torch.no_grad():
        expected = model(input_ids, **inputs).logits
        with collect_statistics(layers=[]) as statistics:
            logits = model(input_ids, **inputs).logits
    real = inputs["attention_mask"].bool()
    assert logits[real].equal(expected[real])
    assert not statistics


@pytest.mark.parametrize("T", [1, 6, 90])
@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_short_masks_say_what_the_whole_ones_say(side: str, T: int) -> None:
    real = torch.ones((2, T), dtype=torch.bool)
    if side != "none":
        real[1, slice(T - T // 3, None) if side == "right" else slice(0, T // 3)] = False
    first = (real.cumsum(dim=1) == 0).sum(dim=1)
    for function in (sliding_window_causal_mask_function(5), chunked_causal_mask_function(5, first)):
        sizes = {"batch_size": 2, "q_length": T, "kv_length": T, "mask_function": function, "attention_mask": real}
        short = short_masks.sdpa_or_short_mask(**sizes, local_size=5, short=True)
        assert short is not None
        assert short.shape == (2, T)
        assert short_masks.whole_mask(short).equal(sdpa_mask(**sizes, allow_is_causal_skip=False))
    other = sliding_window_causal_mask_function(4)
    kept = short_masks.sdpa_or_short_mask(2, T, T, mask_function=other, attention_mask=real, local_size=5, short=True)
    if T > 5:
        assert kept is not None
        assert kept.shape == (2, 1, T, T)  # not what local_size says: transformers' own


def test_a_model_that_wants_a_mask_gets_one() -> None:
    (_, inputs), model = batch("left"), made()
    with torch.no_grad(), collect_statistics():
        options: dict[str, Any] = {"attention_mask": inputs["attention_mask"], "past_key_values": None}
        asked = [
            create_causal_mask(model.config, torch.zeros(2, T, 32), **options, allow_is_causal_skip=skip)
            for skip in (True, False)
        ]
    assert [mask.shape for mask in asked] == [(2, T), (2, 1, T, T)]


def test_only_the_layers_asked_for() -> None:
    (input_ids, inputs), model = batch("left"), made()
    with torch.no_grad():
        with collect_statistics(layers=[2, 1], **OPTIONS) as statistics:
            logits = model(input_ids, **inputs).logits
        expected = model(input_ids, **inputs).logits
    assert list(statistics) == [1, 2]
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-5, atol=1e-5)
    assert_statistics_of_the_maps(statistics, made(implementation="eager"), input_ids, inputs["attention_mask"], [0, 0])
    with pytest.raises(KeyError, match=re.escape("no statistics of layer 0; there are those of layers [1, 2]")):
        statistics[0]


def test_from_pretrained_and_set_attn_implementation(tmp_path: Path) -> None:
    made(implementation="sdpa").save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="rhythm").eval()
    switched = made(implementation="sdpa")
    switched.set_attn_implementation("rhythm")
    (input_ids, inputs), waads = batch(), []
    for model in (loaded, switched):
        with torch.no_grad(), collect_statistics(prompt_lens=PROMPT_LENS) as statistics:
            model(input_ids, **inputs)
        waads.append(statistics[3].waad)
    assert waads[0].nan_to_num().equal(waads[1].nan_to_num())
    with pytest.raises(KeyError, match="there are none at all: has a model with attn_implementation='rhythm' run"):
        LayerStatistics()[0]


def test_generation_is_sdpas_and_refused_inside() -> None:
    input_ids, inputs = batch("left")
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": inputs["attention_mask"]}
    model = made()
    assert model.generate(input_ids, **options).equal(made(implementation="sdpa").generate(input_ids, **options))
    message = "qwen3, layer 0: 41 keys for 1 queries: a decode step or another use of a KV cache"
    with pytest.raises(UnsupportedAttention, match=message), collect_statistics():
        model.generate(input_ids, **options)
    # The context is closed, and the model as it was.
    assert model.generate(input_ids, **options).shape == (2, T + 6)


@pytest.mark.parametrize("name", ["observe", "AttentionTap"])
def test_observe_and_taps_work_on_such_a_model(name: str) -> None:
    input_ids, inputs = batch("left")
    mask, signals = inputs["attention_mask"], []
    for implementation in ("rhythm", "sdpa"):
        model = made(implementation=implementation)
        if name == "observe":
            signals.append(rhythm.observe(model, input_ids, attention_mask=mask, prompt_lens=PROMPT_LENS))
            continue
        tap = rhythm.AttentionTap(model, attention_mask=mask, prompt_lens=PROMPT_LENS)
        with torch.no_grad(), collect_statistics() as statistics, tap:
            model(input_ids, **inputs)
        signals.append(tap.signals())
        assert len(statistics) == (4 if implementation == "rhythm" else 0)
    for field in ("waad", "fai", "span"):
        one, other = (getattr(x, field) for x in signals)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    "kind", ["qwen3", "llama"]
)  # under autocast: queries in fp32 beside values in bf16; all in bf16
def test_autocast_does_not_reach_the_statistics(kind: str) -> None:
    (input_ids, inputs), model = batch(), made(kind)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with collect_statistics(layers=[0], backend="reference") as cast:
            model(input_ids, **inputs)
        # The same queries and keys, their statistics by the fused kernel, which autocast can't reach.
        with collect_statistics(layers=[0], backend="cpu") as kernel:
            model(input_ids, **inputs)
    torch.testing.assert_close(cast[0].waad, kernel[0].waad, rtol=0, atol=1e-5, equal_nan=True)


def test_bf16() -> None:
    (input_ids, inputs), model = batch(), made()
    with torch.no_grad(), collect_statistics(prompt_lens=PROMPT_LENS) as exact:
        model(input_ids, **inputs)
    with torch.no_grad(), collect_statistics(prompt_lens=PROMPT_LENS) as low:
        logits = model.to(torch.bfloat16)(input_ids, **inputs).logits
    assert logits.dtype == torch.bfloat16
    assert low[0].waad.dtype == torch.float32
    torch.testing.assert_close(low[0].waad, exact[0].waad, rtol=0, atol=0.3, equal_nan=True)


def test_what_sdpa_would_ignore_is_refused() -> None:
    input_ids, inputs = batch()
    with pytest.raises(UnsupportedAttention, match=r"qwen3, layer 0: a head mask \(head_mask\), which attn_impl"):
        made()(input_ids, head_mask=torch.ones(4), **inputs)


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_capped_scores_and_sinks_outside_the_context(kind: str) -> None:
    """By the model's own eager attention: the same logits, with padding, and in generation."""
    model, eager, (input_ids, inputs) = made(kind), made(kind, "eager"), batch("left")
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids, **inputs).logits[real], eager(input_ids, **inputs).logits[real])
        bare = {"use_cache": False}
        torch.testing.assert_close(model(input_ids, **bare).logits, eager(input_ids, **bare).logits)
        options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": inputs["attention_mask"]}
        assert model.generate(input_ids, **options).equal(eager.generate(input_ids, **options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("chunked mask", "packed rows, or chunks"),
        ("bidirectional mask", "bidirectional attention"),
        ("bidirectional layer", "bidirectional attention"),
        ("packed", "packed rows, or chunks"),
        ("dropout", "attention dropout, active in train mode"),
        ("another padding", "qwen3, layer 1: a padding mask other than that of the layers before"),
        ("nameless", "qwen3, layer None: a Qwen3Attention without layer_idx"),
        ("hole", "attention_mask has padding between the tokens of row 1"),
        ("prompt", r"prompt_lens\[1\] is 41; its sequence allows 0 to 31"),
    ],
)
def test_maps_of_other_kinds_are_refused_by_name(change: str, message: str) -> None:
    (input_ids, inputs), options = batch(), {}
    model = made(attention_dropout=0.5).train() if change == "dropout" else made()
    distance = torch.arange(T)[:, None] - torch.arange(T)
    if change == "chunked mask":
        same_chunk = torch.arange(T)[:, None] // 8 == torch.arange(T) // 8
        inputs["attention_mask"] = ((distance >= 0) & same_chunk).expand(2, 1, T, T)
    elif change == "bidirectional mask":
        inputs["attention_mask"] = torch.ones(2, 1, T, T, dtype=torch.bool)
    elif change == "bidirectional layer":
        model.model.layers[0].self_attn.is_causal = False
    elif change == "packed":
        inputs = {"position_ids": torch.arange(T).remainder(20).expand(2, T), "use_cache": False}
    elif change == "another padding":
        model.model.layers[1].self_attn.register_forward_pre_hook(
            lambda _, args, options: (args, options | {"attention_mask": options["attention_mask"].flip(0)}),
            with_kwargs=True,
        )
    elif change == "nameless":
        del model.model.layers[0].self_attn.layer_idx
    elif change == "hole":
        inputs["attention_mask"][1, 10] = 0
    elif change == "prompt":
        options["prompt_lens"] = [6, 41]
    with torch.no_grad():
        with pytest.raises(ValueError, match=message), collect_statistics(**options):
            model(input_ids, **inputs)
        if change not in ("dropout", "another padding"):
            outside = made(implementation="sdpa")(input_ids, **inputs).logits
            assert model(input_ids, **inputs).logits.equal(outside)


def test_one_forward_pass_of_one_model() -> None:
    (input_ids, inputs), model = batch(), made()
    message = "qwen3, layer 0: ran twice in one collect_statistics; open one for each forward pass"
    with torch.no_grad(), collect_statistics() as statistics:
        model(input_ids, **inputs)
        kept = statistics[0].waad.clone()
        with pytest.raises(RuntimeError, match=message):
            model(input_ids.flip(1), **inputs)
        with pytest.raises(RuntimeError, match="collect_statistics is open already"), collect_statistics():
            pass
    assert statistics[0].waad.nan_to_num().equal(kept.nan_to_num())
    model(input_ids, **inputs)
    assert len(statistics) == 4


def test_the_context_belongs_to_its_thread() -> None:
    (input_ids, inputs), model = batch(), made()
    with collect_statistics() as statistics:
        thread = threading.Thread(target=lambda: model(input_ids, **inputs))
        thread.start()
        thread.join()
    assert len(statistics) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window is 0"),
        ({"also": ["entropi"]}, "also has 'entropi'"),
        ({"also": ["entropy"], "first": 0}, "first is 0"),
        ({"horizon": (5, 2)}, "horizon is (5, 2)"),
        ({"layers": [-1]}, "layers is [-1]; it must hold indices of layers, from 0"),
    ],
)
def test_bad_options_are_named_on_entering(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)), collect_statistics(**options):
        pass


def test_backends_by_name() -> None:
    (input_ids, inputs), model = batch("right"), made("gemma3")
    with torch.no_grad():
        with collect_statistics(backend="reference") as by_definition:
            model(input_ids, **inputs)
        with collect_statistics(backend="cpu") as fused:
            model(input_ids, **inputs)
        for layer in (0, 1):
            torch.testing.assert_close(fused[layer].fai, by_definition[layer].fai, rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.slow
def test_torch_compile_gives_the_same() -> None:
    (input_ids, inputs), model = batch("left"), made()
    inputs.pop("use_cache")
    with torch.no_grad():
        with collect_statistics() as expected:
            logits = model(input_ids, **inputs, use_cache=False).logits
        compiled = torch.compile(model, backend="eager")
        with collect_statistics() as statistics:
            assert compiled(input_ids, **inputs, use_cache=False).logits.equal(logits)
    assert statistics[3].waad.nan_to_num().equal(expected[3].waad.nan_to_num())
