"""Makes Megatron-core run on a machine without CUDA, although its code names the device "cuda" literally.

Importing this changes nothing: call `prepare_cpu` once in each rank's process, and wrap calls to Megatron's schedules,
optimizer and checkpoints in `on_cpu`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode


def prepare_cpu() -> None:
    """Patch torch and Megatron for the whole process: the current CUDA device is the CPU, synchronize does nothing,
    streams are torch.cpu's, which do nothing, and random states are torch's own.
    """
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None
    # Experts' tokens are counted on a stream of their own.
    torch.cuda.Stream = _Stream  # type: ignore[assignment, misc]
    torch.cuda.current_stream = torch.cpu.current_stream  # type: ignore[assignment]
    torch.cuda.stream = torch.cpu.stream  # type: ignore[assignment]
    # Recomputation saves and restores the state of CUDA's generators. Without dropout they are not used.
    megatron_random._get_cuda_rng_state = lambda *_, **__: None
    megatron_random._set_cuda_rng_state = lambda *_, **__: None
    megatron_random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)


def on_cpu() -> AbstractContextManager[Any]:
    """Context in which tensors requested on CUDA are created on the CPU. Does nothing if CUDA is available."""
    return nullcontext() if torch.cuda.is_available() else _CudaMeansCpu()


class _Stream(torch.cpu.Stream):
    def record_event(self) -> Any:
        return torch.cpu.Event()


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = {name: _host(value) if name == "device" else value for name, value in (kwargs or {}).items()}
        name = getattr(func, "__name__", "")
        if name == "cuda":
            return args[0]
        if name == "to":
            args = [args[0], *map(_host, args[1:])]
        result = func(*args, **named)
        if name == "type" and isinstance(result, str):  # Megatron compares types with "torch.cuda.FloatTensor"
            return result.replace("torch.", "torch.cuda.")
        return result


def _host(device: Any) -> Any:
    """The CPU for a CUDA device; anything else unchanged."""
    is_cuda = isinstance(device, (str, torch.device)) and str(device).startswith("cuda")
    return "cpu" if is_cuda else device
