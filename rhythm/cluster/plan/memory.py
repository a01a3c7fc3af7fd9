"""Estimates the memory that a run's roles need per GPU, and checks that it fits.

Counted are weights, gradients, optimizer, activations (rhythm.cluster.plan.activations) and KV cache. CUDA, NCCL and
fragmentation take about 2 GiB per process in addition. The estimates agree with the tensors that Megatron allocates on
a CPU (`python -m benchmarks.memory`); they have not been compared with a run on GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

from rhythm.cluster.config import ClusterConfig
from rhythm.cluster.plan.activations import Activations, activations
from rhythm.cluster.plan.dimensions import Dimensions, Workload

GIB = 2**30


@dataclass(frozen=True)
class TrainMemory:
    """Bytes on the rank of actor_train that needs the most memory.

    weights: in the dtype of the forward pass; gradients: fp32; optimizer: fp32 master weights and AdamW's two moments;
    reference: a frozen copy for the KL term; activations: what passes and optimizer steps take besides, for
    micro-batches of batch.max_tokens or of sequences of cluster.max_length.
    """

    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: Activations

    @property
    def resident(self) -> int:
        """Bytes that stay allocated between the calls."""
        return self.weights + self.gradients + self.optimizer + self.reference + self.activations.gathered

    @property
    def total(self) -> int:
        """Bytes while it trains."""
        return self.resident + max(self.activations.step, self.activations.log_probs)


@dataclass(frozen=True)
class InferMemory:
    """Bytes per GPU of a replica of actor_infer. token: KV cache per token."""

    weights: int
    kv_cache: int
    token: int

    @property
    def total(self) -> int:
        """Bytes while it generates."""
        return self.weights + self.kv_cache

    @property
    def tokens(self) -> int:
        """Tokens that fit into the KV cache."""
        return self.kv_cache // self.token


def train_memory(cluster: ClusterConfig, work: Workload, model: Dimensions) -> TrainMemory:
    """Memory of a rank on the first pipeline stage: it has the input embedding and the most micro-batches in flight."""
    train = cluster.train
    embeddings = model.embedding_parameters * (1 if model.tied or train.pipeline > 1 else 2)
    layers = model.layers // train.pipeline
    parameters = (layers * model.layer_parameters + embeddings) // train.tensor
    shared_by = train.optimizer_shares
    master = 0 if work.value_bytes == 4 else 4
    return TrainMemory(
        weights=parameters * work.value_bytes,
        gradients=parameters * 4,
        optimizer=parameters * (8 + master) // shared_by,
        reference=parameters * work.value_bytes * work.reference,
        activations=activations(cluster, work, model, layers, parameters),
    )


def checkpoint_bytes(cluster: ClusterConfig, work: Workload, model: Dimensions) -> int:
    """Bytes on disk of a checkpoint: weights for transformers, and what training continues from."""
    weights, moments = work.value_bytes, 8
    if cluster.train.engine == "torch":  # float32 weights, which training continues from as well
        return model.parameters * (4 + moments)
    master = 0 if work.value_bytes == 4 else 4
    return model.parameters * (weights + weights + master + moments)  # Megatron's checkpoint has the weights again


def infer_memory(cluster: ClusterConfig, work: Workload, model: Dimensions) -> InferMemory:
    """vLLM allocates gpu_memory_utilization of the GPU; what the weights leave of it is the KV cache."""
    infer = cluster.infer
    weights = model.parameters * work.value_bytes // infer.tensor_parallel_size
    if infer.engine == "transformers":
        kv_cache = 0  # allocated only while it generates
    elif infer.kv_cache_gib is not None:
        kv_cache = int(infer.kv_cache_gib * GIB)
    else:
        kv_cache = max(0, int(infer.gpu_memory_utilization * cluster.gpu_memory_gib * GIB) - weights)
    return InferMemory(weights, kv_cache, model.kv_values(infer.tensor_parallel_size) * work.value_bytes)


def memory_faults(cluster: ClusterConfig, work: Workload, model: Dimensions) -> list[str]:
    """One message per role that doesn't fit on a GPU, naming the keys to change; empty if everything is on CPUs."""
    if cluster.gpus == 0:
        return []
    whole = int(cluster.gpu_memory_gib * GIB)
    train, infer = train_memory(cluster, work, model), infer_memory(cluster, work, model)
    faults = []
    if train.total > whole:
        faults.append(
            f"cluster.gpu_memory_gib is {cluster.gpu_memory_gib:g}: actor_train needs {gib(train.total)} on a GPU; "
            "raise cluster.train.tensor, pipeline, data or context, turn on cluster.train.recompute, or lower "
            + ("batch.micro_batch_size" if work.max_tokens is None else "batch.max_tokens")
        )
    if cluster.infer.engine == "vllm" and infer.tokens < cluster.max_length:
        faults.append(
            f"cluster.infer.gpu_memory_utilization is {_share(cluster)}: {gib(infer.kv_cache)} are left for the "
            f"KV cache, {infer.tokens} tokens; one response of cluster.max_length = {cluster.max_length} must fit"
        )
    return faults


def gib(size: int) -> str:
    """Bytes as GiB or MiB with one decimal."""
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"


def _share(cluster: ClusterConfig) -> str:
    """gpu_memory_utilization as text."""
    return f"{cluster.infer.gpu_memory_utilization:g}"
