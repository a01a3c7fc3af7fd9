"""Assigns processes to GPUs from the configuration, before anything starts."""

from __future__ import annotations

from dataclasses import dataclass

from rhythm.cluster.config import ClusterConfig


@dataclass(frozen=True)
class Slot:
    """Where a process runs. node: 0, 1, …; gpus: indices on that node, empty if everything is on CPUs."""

    node: int
    gpus: tuple[int, ...]


@dataclass(frozen=True)
class Assignment:
    """Slots per process: train by rank, infer and attn by replica. idle: number of unused GPUs."""

    train: tuple[Slot, ...]
    infer: tuple[Slot, ...]
    attn: tuple[Slot, ...]
    idle: int


def assign(cluster: ClusterConfig, *, separate_attn: bool) -> Assignment:
    """Assign the trainer's ranks first, then replicas of actor_infer (colocated: on the same GPUs), then actor_attn.

    The ranks of a tensor-parallel group are consecutive, as in Megatron, so they are on one node.

    Raises ValueError, naming the keys, if there are too few GPUs or a parallel group would span nodes.
    """
    train, infer, attn = cluster.train, cluster.infer, cluster.attn.replicas * separate_attn
    if cluster.gpus == 0:
        cpu = Slot(0, ())
        return Assignment((cpu,) * train.ranks, (cpu,) * infer.replicas, (cpu,) * attn, 0)
    wanted = infer.replicas * infer.tensor_parallel_size
    colocated = cluster.placement == "colocated"
    shared = max(train.ranks, wanted) if colocated else train.ranks + wanted
    if shared + attn > cluster.gpus:
        joint = "max" if colocated else "sum"
        raise ValueError(
            f"cluster.gpus is {cluster.gpus}: too few, {shared + attn} are needed: the {joint} of train "
            f"{train.sizes} = {train.ranks} and infer {infer.replicas} × "
            f"{infer.tensor_parallel_size} = {wanted}" + (f", and attn {attn}" if attn else "")
        )
    if colocated and infer.engine == "vllm" and train.ranks < wanted:
        raise ValueError(
            f"cluster.train.{train.names} is {train.sizes} = "
            f"{train.ranks}: with placement colocated it must be at least the {wanted} GPUs of "
            "actor_infer, each of which reads the weights of the rank on its own GPU"
        )
    available = cluster.gpus - attn - (0 if colocated else wanted)
    if available % train.ranks:
        raise ValueError(
            f"cluster.train.{train.names} is {train.sizes} = {train.ranks}: must divide the trainer's {available} GPUs"
        )
    first = 0 if colocated else train.ranks
    replicas = [first + i * infer.tensor_parallel_size for i in range(infer.replicas)]
    groups = [first for first in range(0, train.ranks, train.tensor)]
    _check_nodes(cluster, "cluster.train.tensor", train.tensor, groups)
    _check_nodes(cluster, "cluster.infer.tensor_parallel_size", infer.tensor_parallel_size, replicas)
    return Assignment(
        train=tuple(_slot(cluster, rank, 1) for rank in range(train.ranks)),
        infer=tuple(_slot(cluster, start, infer.tensor_parallel_size) for start in replicas),
        attn=tuple(_slot(cluster, shared + i, 1) for i in range(attn)),
        idle=cluster.gpus - shared - attn,
    )


def _slot(cluster: ClusterConfig, first: int, count: int) -> Slot:
    local = first % cluster.gpus_per_node
    return Slot(first // cluster.gpus_per_node, tuple(range(local, local + count)))


def _check_nodes(cluster: ClusterConfig, key: str, size: int, starts: list[int]) -> None:
    per_node = cluster.gpus_per_node
    if any(start // per_node != (start + size - 1) // per_node for start in starts):
        raise ValueError(f"{key} is {size}: a group would span nodes of {per_node} GPUs; it must be within one node")
