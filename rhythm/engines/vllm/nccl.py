"""Sends weights to vLLM by NCCL, with vLLM's own broadcast from the trainer's GPU to those of all replicas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rhythm.engines.transfer import Bucket, WeightSender, describe
from rhythm.system.ports import ReservedPort


class NcclSender(WeightSender):
    """Broadcasts from this process's GPU to those of all replicas, on one machine or several."""

    def __init__(
        self, *, address: str, replicas: int, tensor_parallel_size: int, dtype: torch.dtype | None = None
    ) -> None:
        """`address`: this machine's address, to which the engines' workers connect."""
        super().__init__(dtype)
        self._address = address
        self._port = ReservedPort(address)
        self._workers_per_replica = tensor_parallel_size
        self._world_size = 1 + replicas * tensor_parallel_size
        self._group: Any = None
        self._staged: list[tuple[str, Tensor]] = []

    def init_info(self, replica: int = 0) -> dict[str, Any]:
        return {
            "master_address": self._address,
            "master_port": self._port.number,
            "rank_offset": 1 + replica * self._workers_per_replica,
            "world_size": self._world_size,
            "packed": True,
        }

    def connect(self) -> None:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        self._group = trainer_init(
            {"master_address": self._address, "master_port": self._port.number, "world_size": self._world_size}
        )
        self._port.close()

    def stage(self, bucket: Bucket) -> dict[str, Any]:
        self._staged = [(name, tensor.to("cuda", non_blocking=True)) for name, tensor in self._ready(bucket)]
        return describe(self._staged)

    def transmit(self) -> None:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        if self._group is None:
            raise RuntimeError("transmit: call connect first")
        torch.cuda.current_stream().synchronize()  # the producer copies on streams of its own
        packed_nccl_broadcast_producer(
            iterator=iter(self._staged), group=self._group, src=0, post_iter_func=lambda item: item[1]
        )
        torch.cuda.synchronize()

    def close(self) -> None:
        self._port.close()
        self._staged = []
        if self._group is not None:
            self._group.destroy()
            self._group = None
