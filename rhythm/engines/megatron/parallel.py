"""Connects the ranks and creates the process groups of a parallel layout."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from rhythm.engines.megatron.cpu import prepare_cpu
from rhythm.engines.megatron.layout import ParallelConfig


@dataclass(frozen=True)
class Rendezvous:
    """How the ranks connect: rank 0 listens on address:port. timeout: deadline of a collective in seconds."""

    rank: int
    world_size: int
    address: str
    port: int
    timeout: float = 1800.0


@dataclass(frozen=True)
class Groups:
    """This rank's device and process groups. stage: the tensor and context parallel ranks of its stage; stages: those
    of `pipeline`, by which tensors go from host to host.
    """

    device: torch.device
    rank: int
    tensor: distributed.ProcessGroup
    pipeline: distributed.ProcessGroup
    data: distributed.ProcessGroup
    context: distributed.ProcessGroup
    stage: distributed.ProcessGroup
    stages: distributed.ProcessGroup

    @property
    def first_stage(self) -> bool:
        """Whether this rank holds the input embedding."""
        return self.pipeline.rank() == 0

    @property
    def last_stage(self) -> bool:
        """Whether this rank holds the output embedding."""
        return self.pipeline.rank() == self.pipeline.size() - 1

    @property
    def is_output_rank(self) -> bool:
        """Whether this rank contributes results to the output: the first of its tensor and context parallel groups, on
        the last stage.
        """
        return self.last_stage and self.tensor.rank() == 0 and self.context.rank() == 0

    def largest(self, number: float) -> float:
        """The largest of all ranks' numbers. A collective."""
        most = torch.tensor([number], dtype=torch.float64, device=self.device)
        distributed.all_reduce(most, distributed.ReduceOp.MAX)
        return float(most)

    def all_reduce_sum(self, x: Tensor, group: distributed.ProcessGroup | None = None) -> Tensor:
        """All-reduce (sum) over `group`, by default all ranks, returned on the CPU. Also broadcasts one rank's value if
        the others pass zeros.
        """
        total = x.to(self.device, copy=True)
        distributed.all_reduce(total, group=group)
        return total.cpu()


def join(rendezvous: Rendezvous, parallel: ParallelConfig) -> Groups:
    """Connect to the other ranks and create the groups, with NCCL if CUDA is available, else Gloo.

    Raises ValueError if the number of ranks is not that of the layout.
    """
    if rendezvous.world_size != parallel.ranks:
        raise ValueError(
            f"world_size is {rendezvous.world_size}: {parallel.names} is {parallel.sizes} = {parallel.ranks}"
        )
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(rendezvous.rank % torch.cuda.device_count())
    else:
        prepare_cpu()
    timeout = timedelta(seconds=rendezvous.timeout)
    distributed.init_process_group(
        "nccl" if cuda else "gloo",
        store=_store(rendezvous, timeout),
        rank=rendezvous.rank,
        world_size=rendezvous.world_size,
        timeout=timeout,
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        distributed_timeout_minutes=max(1, round(rendezvous.timeout / 60)),
    )
    if cuda:
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(0)
    return Groups(
        device=torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"),
        rank=rendezvous.rank,
        tensor=parallel_state.get_tensor_model_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        data=parallel_state.get_data_parallel_group(),
        context=parallel_state.get_context_parallel_group(),
        stage=parallel_state.get_tensor_and_context_parallel_group(),
        stages=_on_hosts(parallel_state.get_pipeline_model_parallel_group(), timeout),
    )


def _on_hosts(group: distributed.ProcessGroup, timeout: timedelta) -> distributed.ProcessGroup:
    """A Gloo group of this rank and the others of `group`. All ranks must call it."""
    all_ranks: list[list[int]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(all_ranks, distributed.get_process_group_ranks(group))
    own: distributed.ProcessGroup = group
    for ranks in sorted(set(map(tuple, all_ranks))):
        made = distributed.new_group(list(ranks), timeout, "gloo")
        own = made if distributed.get_rank() in ranks else own
    return own


def _store(rendezvous: Rendezvous, timeout: timedelta) -> TCPStore:
    """The ranks' common store. Rank 0 serves it on the given address; by default torch would listen on all
    addresses.
    """
    options: dict[str, Any] = {"timeout": timeout, "world_size": rendezvous.world_size}
    if rendezvous.rank > 0:
        return TCPStore(rendezvous.address, rendezvous.port, is_master=False, **options)
    family = socket.AF_INET6 if ":" in rendezvous.address else socket.AF_INET
    listener = socket.create_server((rendezvous.address, rendezvous.port), family=family)
    return TCPStore(rendezvous.address, rendezvous.port, is_master=True, master_listen_fd=listener.detach(), **options)


def leave() -> None:
    """Destroy the groups and disconnect."""
    parallel_state.destroy_model_parallel()
    if distributed.is_initialized():
        distributed.destroy_process_group()
