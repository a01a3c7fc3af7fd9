"""Code that runs in vLLM's workers: the receiving end of `shared_memory`, and additional worker methods.

vLLM imports this module by name in every worker; nothing else does.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from rhythm.engines.transfer import read_segment
from rhythm.system.parent import signal_at_parents_end


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):  # type: ignore[misc]  # vLLM is untyped here
    """Empty: shared memory needs no connection."""


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """One bucket: names, dtypes, shapes and byte offsets of its tensors in a segment of shared memory.

    process, descriptor: the sender's id, and its file descriptor of the segment.
    """

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    process: int
    descriptor: int
    offsets: list[int]


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):  # type: ignore[misc]
    """Receives weights from a segment of shared memory that the trainer owns."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        """Does nothing."""

    def start_weight_update(self) -> None:
        """Begin a push: until finish_weight_update, weights are loaded in the checkpoint's form."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one bucket; it is loaded when this returns."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        """Copy and load one bucket. Raises ValueError for a segment, dtype or offset that our senders never use."""
        self.model.load_weights(read_segment(vars(update_info), self.device))

    def finish_weight_update(self) -> None:
        """Process the loaded weights layer by layer, as vLLM does after reading a checkpoint."""
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Does nothing: no bucket is kept after its update."""


class WorkerExtension:
    """Methods added to vLLM's worker class, called by collective_rpc."""

    def end_with_parent(self) -> None:
        """Have this process killed when the one that started it ends. vLLM only asks it to end, which it doesn't hear
        while it waits for another worker.
        """
        signal_at_parents_end(signal.SIGKILL)

    def open_transfer(self: Any, kind: str, info: dict[str, Any]) -> None:
        """Receive weights by this kind of transfer from now on."""
        if self.weight_transfer_engine is not None:
            self.shutdown_weight_transfer_engine()
        self.weight_transfer_engine = WeightTransferEngineFactory.create_engine(
            WeightTransferConfig(backend=kind), self.vllm_config, self.device, self.model_runner.get_model()
        )
        self.init_weight_transfer_engine(info)

    def receive_bucket(self: Any, info: dict[str, Any]) -> None:
        """Load one bucket of a push, as described by a sender's `stage`."""
        if "ipc_handles" in info:
            handles = {uuid: ipc_arguments(plain) for uuid, plain in info["ipc_handles"].items()}
            info = {**info, "ipc_handles": handles}
        self.update_weights(info)

    def repack_heads(self: Any) -> None:
        """Update the packed copies of output heads on a CPU.

        A push need not contain a head that is tied to the embedding. But on a CPU logits are computed from a packed
        copy of the head, which vLLM updates only when the head itself is loaded; the old one would silently stay in
        use.
        """
        if not current_platform.is_cpu():
            return
        for module in self.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead):
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)

    def scale_logits(self: Any, factor: float) -> None:
        """Multiply logits by `factor` inside the model, in addition to the model's own scale."""
        for module in self.model_runner.get_model().modules():
            if isinstance(module, LogitsProcessor):
                module.own_scale = getattr(module, "own_scale", module.scale)
                module.scale = module.own_scale * factor


def ipc_arguments(plain: list[int | bytes]) -> tuple[Any, ...]:
    """torch's arguments for opening another process's tensor, from the output of `ipc_plain`: a uint8 tensor that
    covers its whole storage.
    """
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


if (
    "shared_memory" not in WeightTransferEngineFactory._registry
):  # false if this module is imported again under another name
    WeightTransferEngineFactory.register_engine("shared_memory", SharedMemoryEngine)
