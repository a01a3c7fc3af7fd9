"""What a GPU holds at every moment of a step in which trainer and vLLM take turns on it.

`replay` takes the calls made to the two roles, in order; `STEP` lists those of one step. A test records the calls of a
real run and replays them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rhythm.cluster.config import ClusterConfig
from rhythm.cluster.plan.dimensions import Dimensions, Workload
from rhythm.cluster.plan.memory import GIB, gib, infer_memory, train_memory

STEP = (
    "generate", "sleep", "log_probs", "step", "leave_gpu", "start_push", "stage", "end_push", "finish_push", "wake",
    "generate",
)  # fmt: skip
"""From one rollout to the next. A call that is repeated, as `step` is, changes nothing the second time."""

PASSES = {"log_probs", "reference_log_probs"}
"""Calls of actor_train that need its weights and no gradients. What they take stays in torch's cache until `leave_gpu`,
as it does for TRAINING."""

TRAINING = {"step", "tapped_step", "save", "load"}
"""Calls of actor_train that need all that it has, with gradients and optimizer."""


@dataclass(frozen=True)
class Moment:
    """Bytes that the two roles hold on a GPU while a call runs; `call` is its name."""

    call: str
    train: int
    infer: int

    @property
    def total(self) -> int:
        return self.train + self.infer


def replay(calls: Iterable[str], cluster: ClusterConfig, work: Workload, model: Dimensions) -> Iterator[Moment]:
    """The moment of each call that changes what is held, from the state in which a step begins: actor_infer has its
    weights and the KV cache, actor_train has left the GPU.

    CUDA's contexts, NCCL's buffers and fragmentation are not counted (`rhythm.cluster.plan.memory`).
    """
    memory, vllm = train_memory(cluster, work, model), infer_memory(cluster, work, model)
    away = memory.weights + memory.reference if cluster.train.offload else memory.resident
    bucket = max(cluster.push_bucket_mib << 20, model.embedding_parameters * work.value_bytes)
    train = held = away
    weights, cache, sent = vllm.weights, vllm.kv_cache, 0
    for call in calls:
        if call == "sleep":
            weights = cache = 0
        elif call in PASSES:
            train = max(train, held + memory.activations.log_probs)
        elif call in TRAINING:
            train, held = memory.total, memory.resident
        elif call == "leave_gpu":
            train = held = away
        elif call == "start_push":
            weights = vllm.weights
        elif call == "stage":
            sent = 2 * bucket  # the bucket, and the gathered weights of which it is made
        elif call == "end_push":
            sent = 0
        elif call == "wake":
            cache = vllm.kv_cache
        elif call != "generate":
            continue
        yield Moment(call, train + sent, weights + cache)


def timeline(cluster: ClusterConfig, work: Workload, model: Dimensions) -> list[Moment]:
    """The moments of a step."""
    return list(replay(STEP, cluster, work, model))


def turn_faults(cluster: ClusterConfig, work: Workload, model: Dimensions) -> list[str]:
    """A message where the two roles together don't fit at some moment, naming the keys to change; else empty."""
    if cluster.gpus == 0 or cluster.placement != "colocated":
        return []
    most = peak(cluster, work, model)
    if most.total <= cluster.gpu_memory_gib * GIB:
        return []
    share = f"{cluster.infer.gpu_memory_utilization:g}"
    offload = "" if cluster.train.offload else ", or turn on cluster.train.offload"
    return [
        f"cluster.infer.gpu_memory_utilization is {share}: during {most.call} actor_train keeps {gib(most.train)} on "
        f"the GPU and actor_infer {gib(most.infer)}, together more than "
        f"{cluster.gpu_memory_gib:g} GiB; lower it{offload}"
    ]


def peak(cluster: ClusterConfig, work: Workload, model: Dimensions) -> Moment:
    """The moment at which most memory is held."""
    return max(timeline(cluster, work, model), key=lambda moment: moment.total)
