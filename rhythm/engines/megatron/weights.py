"""Converts weights between a transformers checkpoint and Megatron's parameters, for any tensor and pipeline layout.

mbridge is not used because it reads only configurations of transformers 4 and supports only TransformerEngine's layers.

Shape suffixes: N key heads, R rows of a key head's group (its queries, one key, one value), D width (none in a bias).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, distributed, nn

from rhythm.engines.megatron.gemma import is_gemma
from rhythm.engines.megatron.model import head_size
from rhythm.engines.megatron.parallel import Groups

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Recipe:
    """How one Megatron parameter is built from tensors of the checkpoint.

    split: what tensor ranks split: nothing, rows, columns, the key heads of stacked q, k, v, or the rows of gate and up
    separately. names: the tensors in the checkpoint.
    """

    split: Literal["none", "rows", "columns", "qkv", "gate_up"]
    names: tuple[str, ...]


_MODEL = {
    "embedding.word_embeddings.weight": Recipe("rows", ("model.embed_tokens.weight",)),
    "decoder.final_layernorm.weight": Recipe("none", ("model.norm.weight",)),
    "output_layer.weight": Recipe("rows", ("lm_head.weight",)),
}
_QKV = tuple(f"self_attn.{x}_proj.weight" for x in "qkv")
_QKV_BIAS = tuple(f"self_attn.{x}_proj.bias" for x in "qkv")
_LAYER = {
    "input_layernorm.weight": Recipe("none", ("input_layernorm.weight",)),
    "self_attention.linear_qkv.weight": Recipe("qkv", _QKV),
    "self_attention.linear_qkv.bias": Recipe("qkv", _QKV_BIAS),
    "self_attention.q_layernorm.weight": Recipe("none", ("self_attn.q_norm.weight",)),
    "self_attention.k_layernorm.weight": Recipe("none", ("self_attn.k_norm.weight",)),
    "self_attention.linear_proj.weight": Recipe("columns", ("self_attn.o_proj.weight",)),
    "pre_mlp_layernorm.weight": Recipe("none", ("post_attention_layernorm.weight",)),
    "mlp.linear_fc1.weight": Recipe("gate_up", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.linear_fc2.weight": Recipe("columns", ("mlp.down_proj.weight",)),
    "mlp.router.weight": Recipe("none", ("mlp.gate.weight",)),
    # TransformerEngine's layers store a norm together with the matrix that follows it.
    "self_attention.linear_qkv.layer_norm_weight": Recipe("none", ("input_layernorm.weight",)),
    "mlp.linear_fc1.layer_norm_weight": Recipe("none", ("post_attention_layernorm.weight",)),
}

# Gemma 3's layers have a norm after each sublayer, too, which rhythm.engines.megatron.gemma puts behind its matrix.
_WITH_POST_NORMS = _LAYER | {
    "self_attention.linear_proj.post_norm.weight": Recipe("none", ("post_attention_layernorm.weight",)),
    "pre_mlp_layernorm.weight": Recipe("none", ("pre_feedforward_layernorm.weight",)),
    "mlp.linear_fc2.post_norm.weight": Recipe("none", ("post_feedforward_layernorm.weight",)),
}

_EXPERTS = "mlp.experts.local_experts."


def recipe(name: str, *, post_norms: bool = False) -> Recipe:
    """The recipe of a parameter, by its name with the layer index in the whole model. Raises KeyError if unknown.
    `post_norms`: the layers are Gemma 3's.
    """
    if not name.startswith("decoder.layers."):
        return _MODEL[name]
    layer, rest = name.removeprefix("decoder.layers.").split(".", 1)
    inside = f"model.layers.{layer}."
    if rest.startswith(_EXPERTS):
        expert, of_expert = rest.removeprefix(_EXPERTS).split(".", 1)
        # An expert is an MLP.
        made = _LAYER[f"mlp.{of_expert}"]
        names = tuple(name.replace("mlp.", f"mlp.experts.{expert}.") for name in made.names)
    else:
        made = (_WITH_POST_NORMS if post_norms else _LAYER)[rest]
        names = made.names
    return Recipe(made.split, tuple(inside + name for name in names))


def part_of(made: Recipe, whole: Any, ranks: int, rank: int) -> Tensor:
    """Of one of the checkpoint's tensors what tensor rank `rank`'s parameter is built from. `whole`: a tensor, or a
    slice of a safetensors file, of which no more is read.
    """
    if made.split == "none":
        part: Tensor = whole[:]
        return part
    axis = 1 if made.split == "columns" else 0
    size = (list(whole.shape) if isinstance(whole, Tensor) else whole.get_shape())[axis] // ranks
    own = slice(rank * size, (rank + 1) * size)
    part = whole[:, own] if axis else whole[own]
    return part


def to_megatron(made: Recipe, parts: list[Tensor], key_heads: int) -> Tensor:
    """A rank's parameter from its parts of the checkpoint's tensors, in the order of `made.names`; `key_heads`: those
    of the rank.
    """
    if made.split == "qkv":
        # The rows of a key head's queries, key and value are adjacent.
        return torch.cat([x.view(key_heads, -1, *x.shape[1:]) for x in parts], dim=1).flatten(0, 1)
    return torch.cat(parts)


def to_transformers(made: Recipe, parts: list[Tensor], key_heads: int, head_size: int) -> list[Tensor]:
    """The checkpoint's tensors, in the order of `made.names`, from the parts of all tensor ranks."""
    if made.split == "qkv":
        stacked_NRD = torch.cat(parts).view(key_heads, -1, *parts[0].shape[1:])
        queries = stacked_NRD.shape[1] - 2 * head_size
        return [x.flatten(0, 1) for x in torch.split(stacked_NRD, [queries, head_size, head_size], dim=1)]
    if made.split == "gate_up":
        halves = [part.chunk(2) for part in parts]
        return [torch.cat([half[i] for half in halves]) for i in range(2)]
    if made.split == "none":
        return [parts[0]]
    return [torch.cat(parts, dim=0 if made.split == "rows" else 1)]


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """This stage's parameters by name, with layer indices in the whole model.

    A tied output embedding on another stage than the input embedding is left out, since it is a copy.
    """
    first = next((layer.layer_number - 1 for layer in model.decoder.layers), 0)  # type: ignore[union-attr]
    parameters = {}
    for name, parameter in model.named_parameters():
        if name.startswith("decoder.layers."):
            layer, rest = name.removeprefix("decoder.layers.").split(".", 1)
            name = f"decoder.layers.{first + int(layer)}.{rest}"
        parameters[name] = parameter
    if model.share_embeddings_and_output_weights:
        parameters.pop("output_layer.weight", None)
    return parameters


@torch.no_grad()
def load_weights(model: Any, checkpoint: Path, config: Any, groups: Groups) -> None:
    """Load this rank's parameters from a transformers checkpoint in safetensors.

    Raises ValueError for a tensor that is missing or doesn't have the shape that the configuration implies.
    """
    with _Tensors(checkpoint) as tensors:
        post_norms = is_gemma(config)
        targets = [(recipe(name, post_norms=post_norms), parameter) for name, parameter in named(model).items()]
        if config.tie_word_embeddings and groups.last_stage and not groups.first_stage:
            targets.append((_MODEL["embedding.word_embeddings.weight"], model.output_layer.weight))
        ranks, rank = groups.tensor.size(), groups.tensor.rank()
        for made, parameter in targets:
            parts = [part_of(made, tensors[name], ranks, rank) for name in made.names]
            part = to_megatron(made, parts, config.num_key_value_heads // ranks)
            if part.shape != parameter.shape:
                raise ValueError(
                    f"{checkpoint}: {made.names[0]} has shape {tuple(part.shape)} per rank, but the configuration "
                    f"requires {tuple(parameter.shape)}"
                )
            parameter.copy_(part)


def gather_weights(model: Any, config: Any, groups: Groups) -> Iterator[tuple[str, Tensor]]:
    """(name in the checkpoint, complete tensor on this rank's device) of every weight, gathered one parameter at a
    time.

    A collective: all ranks must iterate, and all get all weights in the same order.
    """
    own = {name: (tuple(p.shape), p.dtype) for name, p in named(model).items()}
    stages: list[Any] = [None] * groups.pipeline.size()
    distributed.all_gather_object(stages, own, group=groups.pipeline)
    parameters = named(model)
    for stage, listed in enumerate(stages):
        source = distributed.get_global_rank(groups.pipeline, stage)
        for name, (shape, dtype) in listed.items():
            made = recipe(name, post_norms=is_gemma(config))
            if groups.pipeline.rank() == stage:
                parts = _over_tensor_ranks(made, parameters[name].detach(), groups)
                whole = to_transformers(made, parts, config.num_key_value_heads, head_size(config))
            else:
                blanks = [torch.empty(shape, dtype=dtype, device="meta")] * groups.tensor.size()
                shapes = to_transformers(made, blanks, config.num_key_value_heads, head_size(config))
                whole = [torch.empty(x.shape, dtype=dtype, device=groups.device) for x in shapes]
            for checkpoint_name, tensor in zip(made.names, whole, strict=True):
                tensor = tensor.contiguous()
                if len(stages) > 1:
                    distributed.broadcast(tensor, source, group=groups.pipeline)
                yield checkpoint_name, tensor


def _over_tensor_ranks(made: Recipe, part: Tensor, groups: Groups) -> list[Tensor]:
    if made.split == "none" or groups.tensor.size() == 1:
        return [part]
    parts = [torch.empty_like(part) for _ in range(groups.tensor.size())]
    distributed.all_gather(parts, part.contiguous(), group=groups.tensor)
    return parts


class _Tensors(Mapping[str, Any]):
    """The tensors of a checkpoint's safetensors files, as slices that read what is taken of them."""

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self._exit = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> _Tensors:
        index = self._checkpoint / _INDEX
        shards = (
            sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if index.is_file()
            else ["model.safetensors"]
        )
        for shard in shards:
            file = self._exit.enter_context(safe_open(self._checkpoint / shard, framework="pt"))
            self._files.update(dict.fromkeys(file.keys(), file))
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def __getitem__(self, name: str) -> Any:
        if name not in self._files:
            raise ValueError(f"{self._checkpoint}: its safetensors files don't contain {name}")
        return self._files[name].get_slice(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
