"""What Megatron-core needs on a machine without CUDA, where its code names the device as a literal.

Nothing happens on import: `prepare_cpu` is called once in a process that is a rank, and `on_cpu` goes round the
calls into Megatron's schedules, optimizer and checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode


def prepare_cpu() -> None:
    """For the whole process: "the current CUDA device" is the CPU, there is nothing on it to wait for, and random
    states are torch's own.
    """
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None
    # CUDA's generators, whose state recomputation keeps and sets back: without dropout nothing is drawn from them.
    megatron_random._get_cuda_rng_state = lambda *_, **__: None
    megatron_random._set_cuda_rng_state = lambda *_, **__: None
    megatron_random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)


def on_cpu() -> AbstractContextManager[Any]:
    """Within it, what asks for a tensor on CUDA gets one on the CPU. Nothing where there is CUDA."""
    return nullcontext() if torch.cuda.is_available() else _CudaMeansCpu()


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
        found = func(*args, **named)
        if name == "type" and isinstance(found, str):  # Megatron tells parameters apart by "torch.cuda.FloatTensor"
            return found.replace("torch.", "torch.cuda.")
        return found


def _host(device: Any) -> Any:
    """The CPU for a CUDA device; anything else as it is."""
    is_cuda = isinstance(device, (str, torch.device)) and str(device).startswith("cuda")
    return "cpu" if is_cuda else device
