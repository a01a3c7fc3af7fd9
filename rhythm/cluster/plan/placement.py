"""Who stands on which GPU: arithmetic over the configuration, before any process is started."""

from __future__ import annotations

from dataclasses import dataclass

from rhythm.cluster.config import ClusterConfig


@dataclass(frozen=True)
class Slot:
    """A place for a process. node: 0, 1, …; gpus: indices on that node, none where everything is on CPUs."""

    node: int
    gpus: tuple[int, ...]


@dataclass(frozen=True)
class Assignment:
    """train: by rank; infer and attn: by replica. idle: GPUs that nobody uses."""

    train: tuple[Slot, ...]
    infer: tuple[Slot, ...]
    attn: tuple[Slot, ...]
    idle: int


def assign(cluster: ClusterConfig, *, separate_attn: bool) -> Assignment:
    """Trainer first, then replicas of actor_infer (on the trainer's GPUs where colocated), actor_attn last.

    Ranks of one tensor-parallel group are neighbours, as Megatron counts them, and so share a node.

    Raises ValueError, naming the keys, where the GPUs don't suffice or a parallel group would span nodes.
    """
    train, infer, attn = cluster.train, cluster.infer, cluster.attn.replicas * separate_attn
    if cluster.gpus == 0:
        nobody = Slot(0, ())
        return Assignment((nobody,) * train.ranks, (nobody,) * infer.replicas, (nobody,) * attn, 0)
    wanted = infer.replicas * infer.tensor_parallel_size
    colocated = cluster.placement == "colocated"
    shared = max(train.ranks, wanted) if colocated else train.ranks + wanted
    if shared + attn > cluster.gpus:
        joint = "max" if colocated else "sum"
        raise ValueError(
            f"cluster.gpus is {cluster.gpus}: too few, {shared + attn} are needed: the {joint} of train "
            f"{train.tensor} × {train.pipeline} × {train.data} = {train.ranks} and infer {infer.replicas} × "
            f"{infer.tensor_parallel_size} = {wanted}" + (f", and attn {attn}" if attn else "")
        )
    available = cluster.gpus - attn - (0 if colocated else wanted)
    if available % train.ranks:
        raise ValueError(
            f"cluster.train.tensor × pipeline × data is {train.tensor} × {train.pipeline} × {train.data} = "
            f"{train.ranks}: must divide the {available} GPUs that are the trainer's"
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
    each = cluster.gpus_per_node
    if any(start // each != (start + size - 1) // each for start in starts):
        raise ValueError(f"{key} is {size}: a group would span nodes of {each} GPUs; it must lie within one")
