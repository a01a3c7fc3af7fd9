"""Saves and loads distributed checkpoints of weights and optimizer; they can be loaded with another parallel layout.

Weights are also written in transformers' format, so that other tools can read a run's checkpoints.
"""

from __future__ import annotations

import pickle
import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.utils import extract_nonpersistent, extract_sharded_base
from torch import Tensor, distributed
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from rhythm.checkpoints import loading_options

DISTRIBUTED = "megatron"
_STEPS = "gradient_steps"
# What is not a tensor. Megatron 0.19 has it as a pickled object among the tensors, which torch loads without checks; a
# file of this name, written by releases before, it prefers, and loads as tensors and plain values only.
_COMMON, _COMMON_OBJECT = "common.pt", "common_state/shard_0_1"
_EXTRA = "_extra_state"  # pickled objects of TransformerEngine's FP8 recipes, which are not written
# Stores the optimizer's state in an order that doesn't depend on the number of ranks. For that the first of the data
# ranks gathers all of it in host memory; otherwise every rank would, beforehand on its GPU.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": True}


def save_state(directory: Path, model: Any, optimizer: Any, gradient_steps: int) -> None:
    """Write the distributed checkpoint into `directory`, which is created. A collective: all ranks must call it."""
    directory.mkdir(parents=True, exist_ok=True)
    # Megatron would start a process for this queue, which outlives a killed rank and keeps its shared memory. As the
    # writing is waited for, this process alone uses it.
    filesystem_async._results_queue = queue.Queue()
    state = {**_sharded_state(model, optimizer, loading=False), _STEPS: gradient_steps}
    writes = distributed.get_rank() == 0
    if writes:
        (directory / _COMMON).unlink(missing_ok=True)
    dist_checkpointing.save(state, str(directory), content_metadata=_METADATA)
    if writes and not (directory / _COMMON).exists():
        _, kept = extract_nonpersistent(state)
        _, common = extract_sharded_base(kept)
        torch.save({**common, "content_metadata": _METADATA}, directory / _COMMON)


def load_state(directory: Path, model: Any, optimizer: Any) -> int:
    """Load weights and optimizer from what `save_state` wrote with any layout; returns the gradient steps done.

    Raises pickle.UnpicklingError if the checkpoint's metadata would run code, and ValueError if a parameter is missing.
    """
    check_metadata(directory)
    state = _sharded_state(model, optimizer, loading=True)
    loaded = dist_checkpointing.load({**state, _STEPS: 0}, str(directory))
    missing = model.module.load_state_dict(loaded["model"], strict=False).missing_keys
    if lost := [name for name in missing if not name.endswith(_EXTRA)]:
        raise ValueError(f"{directory} does not contain {lost[0]}")
    with _keeping_adam_steps(optimizer):
        optimizer.load_state_dict(loaded["optimizer"])
    return int(loaded[_STEPS])


def check_metadata(directory: Path) -> None:
    """Raise pickle.UnpicklingError if the metadata of a distributed checkpoint, which torch unpickles without checks,
    contains anything but plain descriptions of tensors, and of the pickled object that `_COMMON` replaces.
    """
    with (directory / ".metadata").open("rb") as file:
        described = _Descriptions(file).load()
    for name, of in described.state_dict_metadata.items():
        replaced = name == _COMMON_OBJECT and (directory / _COMMON).is_file()
        if isinstance(of, BytesStorageMetadata) and not replaced:
            raise pickle.UnpicklingError(f"the checkpoint's .metadata names the object {name}, which is not loaded")


_METADATA_CLASSES = {
    "Metadata",
    "StorageMeta",
    "MetadataIndex",
    "TensorStorageMetadata",
    "ChunkStorageMetadata",
    "BytesStorageMetadata",
}
_DESCRIPTIONS = {
    "torch.distributed.checkpoint.metadata": _METADATA_CLASSES | {"TensorProperties", "_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device", "float32", "bfloat16", "float16"},
}


class _Descriptions(pickle.Unpickler):
    """Unpickles only the classes with which torch.distributed.checkpoint describes tensors, and BytesStorageMetadata,
    which stands for pickled objects, which torch would load without checks.
    """

    def find_class(self, module: str, name: str) -> Any:
        if name in _DESCRIPTIONS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the checkpoint's .metadata names {module}.{name}, which is not loaded")


def _distributed_parts(optimizer: Any) -> list[Any]:
    """The distributed optimizers in a chain of optimizers."""
    return [part for part in optimizer.chained_optimizers if hasattr(part, "model_param_group_index_map")]


@contextmanager
def _places_without_padding(optimizer: Any) -> Iterator[None]:
    """Works around a bug in Megatron 0.16: it takes parameters' states from tensors without padding between buckets,
    but at offsets that include the padding. With several buckets (a tied embedding in a pipeline has its own) the
    offsets would be wrong.
    """
    buffers = [buffer for part in _distributed_parts(optimizer) for buffer in part.buffers]
    kept = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        paddings = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
        before = [0, *accumulate(paddings)]
        buffer.param_index_map = {
            parameter: (start - before[bucket], end - before[bucket], bucket)
            for parameter, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, places in zip(buffers, kept, strict=True):
            buffer.param_index_map = places


@contextmanager
def _keeping_adam_steps(optimizer: Any) -> Iterator[None]:
    """Works around a bug in Megatron 0.16's distributed optimizer with torch's Adam: on loading it expects `step` among
    a parameter's tensors, where it is missing, and gives all parameters the same tensor, which each would increment.
    """
    parts = _distributed_parts(optimizer)
    for part in parts:
        part._set_main_param_and_optimizer_states = partial(
            _set_with_step, part, part._set_main_param_and_optimizer_states
        )
    try:
        yield
    finally:
        for part in parts:
            del part._set_main_param_and_optimizer_states
    for part in parts:
        for state in part.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()


def _set_with_step(part: Any, set_states: Callable[..., None], parameter: Tensor, tensors: dict[str, Tensor]) -> None:
    group, place = part.model_param_group_index_map[parameter]
    own = part.optimizer.state[part.optimizer.param_groups[group]["params"][place]]
    set_states(parameter, {**({"step": own["step"]} if "step" in own else {}), **tensors})


@dataclass(frozen=True)
class Companions:
    """Configuration, tokenizer and generation config (None if there is none) of a transformers checkpoint."""

    config: Any
    tokenizer: Any
    generation: GenerationConfig | None


def read_companions(checkpoint: Path, *, trust_remote_code: bool = False) -> Companions:
    """Read them from a transformers checkpoint, which is not needed afterwards."""
    options = loading_options(trust_remote_code)
    has_generation = (checkpoint / "generation_config.json").is_file()
    return Companions(
        AutoConfig.from_pretrained(checkpoint, **options),
        AutoTokenizer.from_pretrained(checkpoint, **options),
        GenerationConfig.from_pretrained(checkpoint, local_files_only=True) if has_generation else None,
    )


def write_weights(
    directory: Path,
    weights: Iterator[tuple[str, Tensor]],
    companions: Companions,
    *,
    write: bool,
    max_shard_size: str = "5GB",
) -> None:
    """Write an ordinary transformers checkpoint. Every rank must call this, since `weights` is a collective; the rank
    with `write` keeps all weights in host memory and writes them.
    """
    kept = {name: tensor.detach().cpu().clone() for name, tensor in weights if write}
    if not write:
        return
    save_torch_state_dict(kept, directory, max_shard_size=max_shard_size)
    companions.config.save_pretrained(directory)
    companions.tokenizer.save_pretrained(directory)
    if companions.generation is not None:
        companions.generation.save_pretrained(directory)


def _make_state(adam: Any) -> None:
    """Adam's state before its first step, which Megatron's checkpoints can't do without: that of no step at all."""
    rates = [group["lr"] for group in adam.param_groups]
    for group in adam.param_groups:
        group["lr"] = 0.0  # else weights would decay
        for parameter in group["params"]:
            if parameter.numel():  # TransformerEngine's Adam fails on empty ones
                parameter.grad = torch.zeros_like(parameter)
    adam.step()
    adam.zero_grad()
    for group, rate in zip(adam.param_groups, rates, strict=True):
        group["lr"] = rate
        if "step" in group:  # TransformerEngine's
            group["step"] = 0
    for state in adam.state.values():
        if "step" in state:
            state["step"].zero_()


def _sharded_state(model: Any, optimizer: Any, *, loading: bool) -> dict[str, Any]:
    whole = model.module.sharded_state_dict()
    weights = {name: value for name, value in whole.items() if not isinstance(value, ShardedObject)}
    for part in optimizer.chained_optimizers:
        if not part.optimizer.state:
            _make_state(part.optimizer)
    with _places_without_padding(optimizer):
        states = optimizer.sharded_state_dict(weights, is_loading=loading, metadata=_METADATA)
    parts = optimizer.chained_optimizers
    for part, of_part in zip(parts, [states] if len(parts) == 1 else states.values(), strict=True):
        if part not in _distributed_parts(optimizer):  # where Megatron leaves out a step count of 0
            of_part.get("optimizer", of_part)["state"].setdefault("common_step", torch.zeros(()))
    return {"model": weights, "optimizer": states}
