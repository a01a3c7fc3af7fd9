"""Keeps optimizer states and master weights in host memory while another process uses the GPU."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer


class Offloaded:
    """Optimizer states and master weights, in host memory from construction until `restore`.

    Until then the optimizers must not step, and their states must not be saved.
    """

    def __init__(self, optimizers: Iterable[Optimizer], masters: Iterable[Tensor] = ()) -> None:
        """`masters`: parameters whose memory nothing else uses, such as Megatron's fp32 weights beside bf16 ones."""
        self._states = [
            (state, name, value.device)
            for optimizer in optimizers
            for state in optimizer.state.values()
            for name, value in state.items()
            if isinstance(value, Tensor) and value.ndim  # a counter of steps stays where its optimizer wants it
        ]
        self._masters = [(tensor, tensor.device) for tensor in masters]
        for state, name, _ in self._states:
            state[name] = _on_host(state[name])
        for tensor, _ in self._masters:
            tensor.data = _on_host(tensor.data)

    def restore(self) -> None:
        """Move everything back to where it was."""
        for state, name, device in self._states:
            state[name] = state[name].to(device)
        for tensor, device in self._masters:
            tensor.data = tensor.data.to(device)
        self._states, self._masters = [], []


def _on_host(x: Tensor) -> Tensor:
    """A copy in host memory, pinned where there are GPUs, since it goes back and forth in every step."""
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=torch.cuda.is_available())
    return host.copy_(x.detach())


def empty_cache() -> None:
    """Give memory that torch has cached on this process's GPU back to other processes."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
