"""observe() and AttentionTap make the host wait for the device no more often than they say, counted on the CPU.

An operation that would wait for a GPU (reading a value, a shape that depends on values) goes through torch's
dispatcher on the CPU just as well; on meta tensors, which hold no values, it is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import models
import pytest
import torch
import transformers
from tensors import assert_same
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rhythm import attention_statistics
from rhythm.credit.heads import select_heads
from rhythm.credit.signals import aggregate
from rhythm.tap import attention_form, output_check
from rhythm.tap.attention_form import AttentionCall, UnsupportedAttention
from rhythm.tap.attention_tap import AttentionTap
from rhythm.tap.interception import intercept_attention, text_config
from rhythm.tap.observe import observe
from rhythm.tap.padding import PaddedBatch
from rhythm.tap.signals_config import SignalsConfig

T, PROMPT_LENS = 40, [6, 3]
WAITING = {"_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero", "_unique2", "unique_dim"}
READING = {Tensor.tolist, Tensor.numpy, Tensor.cpu}  # these need no dispatcher for tensors on the CPU
SIZES = models.SIZES | models.GQA


class Dispatched(TorchDispatchMode):
    def __init__(self, waiting: list[str]) -> None:
        super().__init__()
        self.waiting = waiting

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        by_mask = name.startswith("index") and any(
            isinstance(x, Tensor) and x.dtype == torch.bool
            for arg in args[1:2]
            for x in (arg if isinstance(arg, list | tuple) else [arg])
        )
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in WAITING or by_mask or unsized:
            self.waiting.append(name)
        return func(*args, **kwargs)


class Called(TorchFunctionMode):
    def __init__(self, waiting: list[str]) -> None:
        super().__init__()
        self.waiting = waiting

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READING:
            self.waiting.append(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def waits() -> Iterator[list[str]]:
    """The operations inside that would wait for a device."""
    waiting: list[str] = []
    with Called(waiting), Dispatched(waiting):
        yield waiting


def qwen3(layers: int = 4, implementation: str = "sdpa") -> Any:
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, num_hidden_layers=layers)).eval()
    model.set_attn_implementation(implementation)
    return model


def gemma3(layers: int = 4, implementation: str = "sdpa") -> Any:
    """Windows shorter than the sequence in every other layer."""
    torch.manual_seed(0)
    kinds = (["sliding_attention", "full_attention"] * layers)[:layers]
    config = transformers.Gemma3TextConfig(**SIZES, num_hidden_layers=layers, layer_types=kinds, sliding_window=8)
    model = transformers.Gemma3ForCausalLM(config).eval()
    model.set_attn_implementation(implementation)
    return model


def flash(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, sliding_window: int | None = None, **rest: Any
) -> Any:
    """Behaves like flash attention: a 2D mask and a window."""
    distance = torch.arange(T)[:, None] - torch.arange(T)
    visible = (distance >= 0) & (distance < (sliding_window or T))
    visible = visible if mask is None else visible & mask.bool()[:, None, None]
    return transformers.AttentionInterface()["sdpa"](module, query, key, value, visible, **rest)


MODELS = {"qwen3": qwen3, "gemma3": gemma3}
IMPLEMENTATIONS = ["sdpa", "eager", "flash"]
SIDES = ["none", "right", "left"]


def made(name: str, implementation: str, layers: int = 4) -> Any:
    if implementation != "flash":
        return MODELS[name](layers, implementation)
    model = MODELS[name](layers)
    transformers.AttentionInterface.register("test_waits_flash", flash)
    masks = transformers.AttentionMaskInterface
    masks.register("test_waits_flash", masks()["flash_attention_2"])
    model.config._attn_implementation = "test_waits_flash"
    return model


def batch(side: str) -> tuple[Tensor, dict[str, Tensor]]:
    input_ids = torch.randint(0, 61, (2, T), generator=torch.Generator().manual_seed(1))
    if side == "none":
        return input_ids, {}
    mask = torch.ones_like(input_ids)
    mask[1, slice(30, None) if side == "right" else slice(0, 10)] = 0
    return input_ids, {"attention_mask": mask}


def test_what_waits_is_seen() -> None:
    x, mask = torch.arange(4.0), torch.tensor([True, False, True, True])
    for wait in (
        lambda: bool(mask.any()),
        lambda: x.sum().item(),
        lambda: x.tolist(),
        lambda: mask.nonzero(),
        lambda: x[mask],
        lambda: x.clone().__setitem__(mask, 0.0),
        lambda: x.equal(x),
        lambda: torch.repeat_interleave(torch.arange(2), torch.tensor([1, 2])),
    ):
        with waits() as waiting:
            wait()
        assert len(waiting) >= 1
    with waits() as waiting:
        torch.repeat_interleave(torch.arange(2), torch.tensor([1, 2]), output_size=3)
        x[torch.tensor([0, 2])] = x[torch.tensor([1, 1])]
        torch.where(mask, x, 0.0)
    assert waiting == []


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_no_tapped_layer_waits(name: str, implementation: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (input_ids, mask) = made(name, implementation), batch(side)
    of_layers: list[list[str]] = []

    def receive(self: AttentionTap, call: AttentionCall, original: Any = AttentionTap.receive) -> Any:
        with waits() as waiting:
            result = original(self, call)
        of_layers.append(waiting)
        return result

    monkeypatch.setattr(AttentionTap, "receive", receive)
    with (
        torch.no_grad(),
        AttentionTap(model, prompt_lens=PROMPT_LENS, signals=SignalsConfig(layers=range(4)), **mask) as tap,
    ):
        model(input_ids, **mask)
    assert of_layers == [[]] * 4
    with waits() as waiting:
        signals = tap.signals()
    assert waiting == ["tolist"]
    assert signals.waad[0, 6:].isfinite().all()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("told_by", ["prompt_lens", "response_mask"])
def test_the_number_of_waits_does_not_grow_with_the_layers(name: str, side: str, told_by: str) -> None:
    input_ids, mask = batch(side)
    real_BT = mask.get("attention_mask", torch.ones_like(input_ids)).bool()
    response_BT = real_BT & (real_BT.cumsum(dim=1) > torch.tensor(PROMPT_LENS)[:, None])
    where = {"prompt_lens": PROMPT_LENS, "response_mask": response_BT}[told_by]
    counts = []
    for layers in (4, 8):
        model = made(name, "sdpa", layers)
        with torch.no_grad(), waits() as by_the_model:
            model(input_ids, **mask, use_cache=False)
        with waits() as waiting:
            observe(
                model,
                input_ids,
                **mask,
                **{told_by: where},
                signals=SignalsConfig(layers=range(layers)),
                entropy=True,
            )
        counts.append(len(waiting) - len(by_the_model))
    assert counts == [2, 2]  # the mask before the forward pass, the outcomes of the checks after it


def calls_of(model: Any, **inputs: Any) -> list[AttentionCall]:
    """The attention calls of a forward pass, layer by layer."""
    calls: list[AttentionCall] = []

    def keep(call: AttentionCall) -> Any:
        calls.append(call)
        return call.run()

    with torch.no_grad(), intercept_attention(text_config(model), keep):
        model(**inputs, use_cache=False)
    return calls


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_tensors_without_values_pass_through_a_tap(
    name: str, implementation: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (input_ids, mask) = made(name, implementation), batch(side)
    tap = AttentionTap(model, prompt_lens=PROMPT_LENS, signals=SignalsConfig(layers=range(4)), **mask)
    calls = calls_of(model, input_ids=input_ids, **mask)
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())  # there is none for such tensors
    for call in calls:
        names = ("query", "key", "value", "mask")
        given = {name: getattr(call, name) for name in names}
        tap.receive(replace(call, **{name: None if x is None else x.to("meta") for name, x in given.items()}))
    assert all(statistics.waad.shape == (2, 4, T) for statistics in tap._statistics.values())
    assert len(tap._statistics) == 4
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        tap.signals()


@pytest.mark.parametrize("side", [*SIDES, "both"])
def test_signals_are_those_of_packed_tensors(side: str) -> None:
    """Bit for bit those of the op on copies without padding, whichever way the tap hands its tensors over."""
    model, layers = qwen3(), range(4)
    input_ids, mask = batch("right" if side == "both" else side)
    if side == "both":
        input_ids, mask = batch("none")
        mask["attention_mask"] = torch.ones_like(input_ids)
        mask["attention_mask"][0, :3] = mask["attention_mask"][0, 33:] = mask["attention_mask"][1, :9] = 0
    real_BT = mask.get("attention_mask", torch.ones_like(input_ids)).bool()
    positions = (real_BT.cumsum(dim=1) - 1).clamp(min=0)
    calls = calls_of(model, input_ids=input_ids, **mask, position_ids=positions)
    lens_B = real_BT.sum(dim=1)
    cu_seqlens = torch.tensor([0, int(lens_B[0]), int(lens_B.sum())], dtype=torch.int32)
    parts: list[tuple[Tensor, ...]] = []
    for call in calls:
        q_THD, k_TGD = call.query.transpose(1, 2)[real_BT], call.key.transpose(1, 2)[real_BT]
        packed = attention_statistics(
            q_THD, k_TGD, cu_seqlens=cu_seqlens, prompt_lens=PROMPT_LENS, scale=call.options["scaling"]
        )
        places_BHT = [torch.full((2, T, 4), torch.nan) for _ in range(2)]
        for place_BTH, x_HT in zip(places_BHT, (packed.waad, packed.fai), strict=True):
            place_BTH[real_BT] = x_HT.T
        assert packed.span is not None
        parts.append((packed.span, *(place_BTH.transpose(1, 2) for place_BTH in places_BHT)))
    span, waad, fai = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    response = real_BT & (positions >= torch.tensor(PROMPT_LENS)[:, None])
    assert_same(
        observe(model, input_ids, **mask, signals=SignalsConfig(layers=layers), prompt_lens=PROMPT_LENS),
        aggregate(waad, fai, span, select_heads(span), response),
    )


def test_places_are_those_of_the_mask() -> None:
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 1, 1]])
    made = PaddedBatch.from_mask(mask, [1, 0, 0, 2])
    for places, expected in (
        (made.places, mask.bool()),
        (made.drawn_places, made.response & (made.positions > 0)),
    ):
        assert torch.stack(places).equal(torch.stack(expected.nonzero(as_tuple=True)))
    assert made.host.cu_seqlens == made.cu_seqlens.tolist() == [0, 3, 8, 8, 10]
    x = torch.arange(40.0).view(4, 5, 2)
    assert made.packed(x).equal(x[mask.bool()])
    assert made.padded(made.packed(x), -1.0).equal(torch.where(mask.bool()[..., None], x, -1.0))


def test_an_output_that_disagrees_is_refused_in_signals_by_layer() -> None:
    model, (input_ids, mask) = qwen3(), batch("right")

    def doubled_in_layer_2(module: Any, *args: Any, **options: Any) -> Any:
        output, weights = transformers.AttentionInterface()["sdpa"](module, *args, **options)
        return output * (2 if module.layer_idx == 2 else 1), weights

    transformers.AttentionInterface.register("test_waits_doubled", doubled_in_layer_2)
    masks = transformers.AttentionMaskInterface
    masks.register("test_waits_doubled", masks()["sdpa"])
    model.config._attn_implementation = "test_waits_doubled"
    with AttentionTap(model, prompt_lens=PROMPT_LENS, signals=SignalsConfig(layers=range(4)), **mask) as tap:
        model(input_ids, **mask)
    for _ in range(2):
        with pytest.raises(UnsupportedAttention, match="qwen3, layer 2: an output of 'test_waits_doubled' attention"):
            tap.signals()
    with pytest.raises(UnsupportedAttention, match="qwen3, layer 2: an output of"):
        observe(model, input_ids, **mask, signals=SignalsConfig(layers=[2]), prompt_lens=PROMPT_LENS)
    observe(model, input_ids, **mask, signals=SignalsConfig(layers=[1, 3]), prompt_lens=PROMPT_LENS)


class Copies(TorchDispatchMode):
    """The sizes of copies made in another type, and of absolute values."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("_to_copy", "abs"):
            self.sizes.append(result.numel())
        return result


@pytest.mark.parametrize("scaled", [False, True])
def test_outputs_are_checked_without_copies_of_all_keys_and_values(
    scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (input_ids, mask) = qwen3().to(torch.bfloat16), batch("left")
    limit = 2 * 2 * 16 * 7  # seven keys at a time
    monkeypatch.setattr(output_check, "CHECKED_ELEMENTS", limit + 3)
    call = calls_of(model, input_ids=input_ids, **mask)[1]
    padded = PaddedBatch.from_mask(mask["attention_mask"], PROMPT_LENS)
    form = attention_form.attention_form(call, attention_form.MaskReader(padded))
    output = call.run()[0] * (1.3 if scaled else 1.0)
    with Copies() as copies:
        if scaled:
            with pytest.raises(UnsupportedAttention, match="an output of 'sdpa' attention"):
                output_check.check_output(call, form, padded, output)
        else:
            output_check.check_output(call, form, padded, output)
    assert copies.sizes.count(limit) >= 3 * 5  # five times seven keys, values and absolute values
    assert max(copies.sizes) < call.key.numel()
