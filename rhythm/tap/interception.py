"""Passes a model's attention calls to a function of ours, through transformers' attention interface.

transformers looks an attention function up by the name in the model's configuration, for every call of every
layer, and builds the masks for that name. Here each implementation gets a second name with the same masks,
under which `intercept_attention` receives the calls. No code of the model is changed. Under a third name there are no
masks, for receivers that make their own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rhythm.system.extras import needs
from rhythm.tap.attention_form import AttentionCall, UnsupportedAttention

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from rhythm.tap.signals_config import SignalsConfig

Output = tuple[Tensor, Tensor | None]
Receiver = Callable[[AttentionCall], Output]

PREFIX = "rhythm_tap|"
PREFIX_WITHOUT_MASKS = "rhythm_rows|"
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "hybrid", "hybrid_sliding"}


@dataclass(frozen=True)
class _Interception:
    config: PreTrainedConfig
    implementation: str
    receive: Receiver


# By the id of the configuration whose name was changed. Not thread-local: autograd recomputes activations in
# threads of its own.
_interceptions: dict[int, _Interception] = {}


@contextmanager
def intercept_attention(config: PreTrainedConfig, receive: Receiver, *, masks: bool = True) -> Iterator[None]:
    """While open, `receive(call)` is what the layers with this configuration object get for their attention.

    `masks`: the model makes its masks; without them call.mask is None, but for masks that a model makes by itself.

    Raises:
        RuntimeError: the configuration's calls are intercepted already.
    """
    interception = _Interception(config, config._attn_implementation, receive)
    if _interceptions.setdefault(id(config), interception) is not interception:
        raise RuntimeError(f"a tap is already open on this {config.model_type} model; taps don't nest")
    try:
        with _named(config, _registered(interception.implementation, masks)):
            yield
    finally:
        del _interceptions[id(config)]


def text_config(model: nn.Module) -> PreTrainedConfig:
    """The configuration object that the attention layers of a causal model read.

    Raises:
        ValueError: model is not a transformers model.
        ModuleNotFoundError: transformers is not installed.
        UnsupportedAttention: it is not causal, or does not use the attention interface.
    """
    with needs("rhythm.observe (and AttentionTap)"):
        from transformers import PreTrainedConfig, PreTrainedModel

    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(f"model is a {type(model).__name__}; it must be a transformers model (with model.config)")
    if config.is_encoder_decoder:
        raise UnsupportedAttention(f"{config.model_type}: an encoder-decoder; the model must be causal")
    of_text = config.get_text_config(decoder=True)
    owners: list[Any] = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    if not all(part._can_set_attn_implementation() for part in owners if part.config is of_text):
        raise UnsupportedAttention(
            f"{config.model_type}: its attention does not go through transformers' attention interface"
        )
    return of_text


def checked_layers(signals: SignalsConfig, config: PreTrainedConfig) -> list[int]:
    """The layers to read.

    Raises:
        ValueError: signals.layers holds an index that the model doesn't have.
        UnsupportedAttention: a layer is of a kind without attention that we could read; or all are.
    """
    kinds = layer_kinds(config)
    usable = [layer for layer, kind in enumerate(kinds) if kind in ATTENTION_LAYERS]
    chosen = signals.layers_of(config.num_hidden_layers, usable)
    if not chosen:
        raise UnsupportedAttention(f"{config.model_type}: has no layer whose attention could be read")
    if others := [layer for layer in chosen if layer not in usable]:
        raise UnsupportedAttention(
            f"{config.model_type}: can't read the attention of {format_layers(others, config)}; layers= may name "
            f"some of {usable}"
        )
    return chosen


def layer_kinds(config: PreTrainedConfig) -> list[str]:
    return getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers


def format_layers(layers: Sequence[int], config: PreTrainedConfig) -> str:
    """For messages: "layers 1 (linear_attention), 2 (full_attention)"."""
    return "layers " + ", ".join(f"{layer} ({layer_kinds(config)[layer]})" for layer in layers)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's own lack of types; which tap is open is not for a compiled graph to know
def _tapped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, **options: Any
) -> Output:
    """The attention function that transformers finds under our names."""
    interception = _interceptions.get(id(getattr(module, "config", None)))
    if interception is None:
        raise RuntimeError(f"{type(module).__name__} holds a copy of the configuration of a model with an open tap")
    config, implementation = interception.config, interception.implementation
    layer = getattr(module, "layer_idx", None)
    where = f"{config.model_type}, layer {layer}"
    function = models_own(module, implementation)
    if function is None:
        raise UnsupportedAttention(f"{where}: found no {implementation!r} attention in the model's own file")
    # With the name as it was: flash attention takes its kernel from there.
    with _named(config, implementation):
        return interception.receive(
            AttentionCall(
                where=where,
                layer=layer,
                implementation=implementation,
                function=function,
                module=module,
                query=query,
                key=key,
                value=value,
                mask=attention_mask,
                options=options,
            )
        )


def models_own(module: nn.Module, implementation: str) -> Callable[..., Output] | None:
    """What the model's own look-up gives: eager attention is defined in the file of the model."""
    for cls in type(module).__mro__:
        file = sys.modules.get(cls.__module__)
        if (functions := getattr(file, "ALL_ATTENTION_FUNCTIONS", None)) is not None:
            eager = getattr(file, "eager_attention_forward", None)
            own: Callable[..., Output] | None = functions.get_interface(implementation, eager)
            return own
    return None


def _registered(implementation: str, masks: bool) -> str:
    """Registers our name for an implementation with transformers, with the implementation's masks or without; returns
    the name.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    name = (PREFIX if masks else PREFIX_WITHOUT_MASKS) + implementation
    if name not in AttentionInterface():
        # The masks first: from another thread the name should never be seen without them.
        if masks and (mask_function := AttentionMaskInterface().get(implementation)) is not None:
            AttentionMaskInterface.register(name, mask_function)
        AttentionInterface.register(name, _tapped_attention)
    return name


@contextmanager
def _named(config: PreTrainedConfig, implementation: str) -> Iterator[None]:
    before = config._attn_implementation
    # As a dict: a plain name would go to the configurations of sub-models too, such as a vision tower's.
    config._attn_implementation = {"": implementation}
    try:
        yield
    finally:
        config._attn_implementation = {"": before}
