"""What runs inside vLLM's workers: the receiving end of `shared_memory`, and an extension of their methods.

vLLM imports this by name in every worker; nothing else does.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from rhythm.engines.transfer import SEGMENT_PREFIX

SEGMENTS = Path("/dev/shm")
SEGMENT_NAME = re.compile(re.escape(SEGMENT_PREFIX) + "[0-9a-f]{32}")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):  # type: ignore[misc]  # vLLM is untyped here
    """Nobody has to be met."""


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """One bucket: where each tensor lies in a piece of shared memory, in bytes."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    segment: str
    offsets: list[int]


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):  # type: ignore[misc]
    """Weights from a segment of shared memory that the trainer owns."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        """Nothing."""

    def start_weight_update(self) -> None:
        """From here to finish_weight_update weights come in the checkpoint's form."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """One bucket; done when this returns."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        """Copy and load. Raises ValueError for a segment, type or offset that no sender of ours gives."""
        self.model.load_weights(read_segment(update_info, self.device))

    def finish_weight_update(self) -> None:
        """Process what came, layer by layer, as vLLM does after reading a checkpoint."""
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing: no bucket outlives its update."""


def read_segment(info: SharedMemoryUpdateInfo, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a bucket, copied: vLLM keeps some until their layer is complete, past the next bucket."""
    if not SEGMENT_NAME.fullmatch(info.segment):
        raise ValueError(f"segment is {info.segment!r}: must be {SEGMENT_PREFIX} and 32 hexadecimal digits")
    with (SEGMENTS / info.segment).open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # frombuffer asks for memory it could write
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    for name, dtype_name, shape, offset in zip(info.names, info.dtype_names, info.shapes, info.offsets, strict=True):
        if dtype_name not in DTYPES:
            raise ValueError(f"{name} is {dtype_name}: must be one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype_name]
        size = torch.Size(shape).numel() * dtype.itemsize
        if not 0 <= offset <= len(flat) - size:
            raise ValueError(f"{name} lies at bytes {offset} to {offset + size} of a segment of {len(flat)}")
        yield name, flat[offset : offset + size].view(dtype).view(shape).to(device, copy=True)


class WorkerExtension:
    """Mixed into vLLM's worker class; reached by collective_rpc."""

    def open_transfer(self: Any, kind: str, info: dict[str, Any]) -> None:
        """Take weights by `kind` from now on."""
        if self.weight_transfer_engine is not None:
            self.shutdown_weight_transfer_engine()
        self.weight_transfer_engine = WeightTransferEngineFactory.create_engine(
            WeightTransferConfig(backend=kind), self.vllm_config, self.device, self.model_runner.get_model()
        )
        self.init_weight_transfer_engine(info)

    def receive_bucket(self: Any, info: dict[str, Any]) -> None:
        """One bucket of a push, as a sender's `stage` described it."""
        if "ipc_handles" in info:
            handles = {uuid: ipc_arguments(plain) for uuid, plain in info["ipc_handles"].items()}
            info = {**info, "ipc_handles": handles}
        self.update_weights(info)

    def repack_heads(self: Any) -> None:
        """Renew the CPU's packed copies of output heads.

        A push need not bring a head that is tied to the embedding: its weight is the embedding's, which is new. But on
        a CPU logits come from a packed copy, which only loading the head renews: it would silently stay the old one.
        """
        if not current_platform.is_cpu():
            return
        for module in self.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead):
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)

    def scale_logits(self: Any, factor: float) -> None:
        """Multiply logits by `factor` where the model makes them, on top of a scale of the model's own."""
        for module in self.model_runner.get_model().modules():
            if isinstance(module, LogitsProcessor):
                module.own_scale = getattr(module, "own_scale", module.scale)
                module.scale = module.own_scale * factor


def ipc_arguments(plain: list[int | bytes]) -> tuple[Any, ...]:
    """What torch opens another process's tensor with, from `ipc_plain`'s part: a uint8 tensor, all of its storage."""
    offset, device, handle, size, storage_offset, requires_grad, counter, counter_offset, event, sync = plain
    return (
        torch.Tensor,
        torch.Size([int(size)]),
        (1,),
        offset,
        torch.storage.UntypedStorage,
        torch.uint8,
        device,
        handle,
        size,
        storage_offset,
        bool(requires_grad),
        counter,
        counter_offset,
        event,
        bool(sync),
    )


if "shared_memory" not in WeightTransferEngineFactory._registry:  # imported again under another name
    WeightTransferEngineFactory.register_engine("shared_memory", SharedMemoryEngine)
