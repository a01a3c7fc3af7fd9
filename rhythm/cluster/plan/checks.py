"""Checks the configuration of a cluster run before anything is started; every message names the key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from rhythm.cluster.config import ClusterConfig
from rhythm.cluster.plan.dimensions import Dimensions, Workload
from rhythm.cluster.plan.memory import memory_faults
from rhythm.cluster.plan.placement import assign
from rhythm.cluster.plan.timeline import turn_faults


def check(cluster: ClusterConfig, work: Workload, model: Dimensions) -> None:
    """Raise ValueError with one line per problem."""
    faults = [
        *_shapes(cluster, model),
        *_experts(cluster, work, model),
        *_batches(cluster, work),
        *_lengths(cluster, work, model),
    ]
    try:
        assign(cluster, separate_attn=work.separate_attn)
    except ValueError as error:
        faults.append(str(error))
    if not faults:  # for an impossible layout, the memory can't be computed
        faults += memory_faults(cluster, work, model) or turn_faults(cluster, work, model)
    if cluster.gpus == 0 and cluster.train.layer_spec == "transformer_engine":
        faults.append("cluster.train.layer_spec is transformer_engine: it needs GPUs, and cluster.gpus is 0")
    if cluster.gpus == 0 and cluster.infer.tensor_parallel_size > 1:
        faults.append("cluster.infer.tensor_parallel_size is more than 1: it needs GPUs, and cluster.gpus is 0")
    if cluster.infer.engine == "transformers" and cluster.infer.tensor_parallel_size > 1:
        faults.append("cluster.infer.tensor_parallel_size is more than 1: transformers' generate takes one GPU")
    if faults:
        raise ValueError("\n".join(faults))


def check_weights(checkpoint: Path) -> None:
    """Raise ValueError unless the directory has safetensors weights, including every file named in its index."""
    files = sorted(path.name for path in checkpoint.glob("*.safetensors"))
    if not files:
        pickled = any(checkpoint.glob("*.bin"))
        hint = "; its *.bin files are pickles, which are not loaded: convert them" if pickled else ""
        raise ValueError(f"model.path is {checkpoint}: no weights (*.safetensors) in it{hint}")
    index = checkpoint / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(named - set(files)):
            raise ValueError(f"model.path is {checkpoint}: weights are missing: {', '.join(missing[:3])}")


def _shapes(cluster: ClusterConfig, model: Dimensions) -> Iterator[str]:
    train, infer = cluster.train, cluster.infer
    for what, size in (
        ("query heads", model.query_heads),
        ("key heads", model.key_heads),
        ("MLP columns", model.mlp_size),
        ("vocabulary entries", model.vocabulary),
    ):
        if size % train.tensor:
            yield f"cluster.train.tensor is {train.tensor}: must divide the model's {size} {what}"
    if model.layers % train.pipeline:
        yield f"cluster.train.pipeline is {train.pipeline}: must divide the model's {model.layers} layers"
    if model.post_norms and train.layer_spec != "local":
        yield f"cluster.train.layer_spec is {train.layer_spec}: must be local for gemma3_text"
    size = infer.tensor_parallel_size
    if model.query_heads % size:
        yield f"cluster.infer.tensor_parallel_size is {size}: must divide the model's {model.query_heads} query heads"
    if model.key_heads % size and size % model.key_heads:
        yield (
            f"cluster.infer.tensor_parallel_size is {size}: must divide the model's {model.key_heads} key heads, or be "
            "a multiple of them"
        )


def _experts(cluster: ClusterConfig, work: Workload, model: Dimensions) -> Iterator[str]:
    if model.experts == 1:
        return
    train, infer = cluster.train, cluster.infer
    if train.tensor > 1 and not train.sequence_parallel:
        yield (
            f"cluster.train.sequence_parallel is false: must be true for a model with experts and cluster.train.tensor "
            f"{train.tensor}"
        )
    # A transformers model has the experts of a layer in one tensor, its checkpoint each in its own.
    for key, engine, named in (
        ("cluster.train.engine", train.engine, "megatron"),
        ("cluster.infer.engine", infer.engine, "vllm"),
    ):
        if engine != named:
            yield f"{key} is {engine}: must be {named} for a model with experts"
    if work.separate_attn:
        yield "signals.source is separate: must be inline or training for a model with experts"


def _batches(cluster: ClusterConfig, work: Workload) -> Iterator[str]:
    once = cluster.train.data * work.micro_batch_size
    if work.max_tokens is None and work.mini_batch_size % once:
        yield (
            f"batch.mini_batch_size is {work.mini_batch_size}: must be a multiple of cluster.train.data × "
            f"batch.micro_batch_size = {cluster.train.data} × {work.micro_batch_size} = {once}"
        )
    if work.prompts_per_batch % cluster.infer.replicas:
        yield (
            f"batch.prompts_per_batch is {work.prompts_per_batch}: must be a multiple of "
            f"cluster.infer.replicas = {cluster.infer.replicas}"
        )


def _lengths(cluster: ClusterConfig, work: Workload, model: Dimensions) -> Iterator[str]:
    if cluster.max_length > model.max_positions:
        yield (
            f"cluster.max_length is {cluster.max_length}: the model's max_position_embeddings is {model.max_positions}"
        )
    if work.max_new_tokens >= cluster.max_length:
        yield (
            f"sampling.max_new_tokens is {work.max_new_tokens}: must leave room for a prompt in "
            f"cluster.max_length = {cluster.max_length}"
        )

    longest = min(cluster.max_length, work.max_new_tokens + 1)
    if work.max_tokens is not None and work.max_tokens < longest:
        yield (
            f"batch.max_tokens is {work.max_tokens}: must be at least {longest}, the shortest prompt and the longest "
            "response (sampling.max_new_tokens, cluster.max_length)"
        )
