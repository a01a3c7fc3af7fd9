"""Receives weights into a transformers model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rhythm.cluster.object_store import read_objects
from rhythm.engines.transfer import read_segment


class ModelReceiver:
    """The receiving end, for a transformers model: copies weights in by name and checks that all of them arrived."""

    def __init__(self, model: nn.Module) -> None:
        self._own: dict[str, Tensor] = model.state_dict()
        self._missing: set[int] = set()
        self._version = 0
        self._kind = "object_store"

    def init_transfer(self, kind: str, info: Mapping[str, Any]) -> None:
        """Prepare to receive weights by shared_memory or object_store. Raises ValueError for another kind."""
        if kind not in ("shared_memory", "object_store"):
            raise ValueError(f"kind is {kind!r}: must be shared_memory or object_store for a transformers model")
        self._kind = kind

    def start_push(self) -> None:
        """Begin a weight sync."""
        self._missing = {tensor.data_ptr() for tensor in self._own.values()}

    @torch.no_grad()
    def receive(self, info: Mapping[str, Any]) -> None:
        """Copy one bucket into the model, converting dtype and device.

        Raises ValueError for a name that the model doesn't have, and for a shape other than the model's.
        """
        tensors = read_objects(info) if self._kind == "object_store" else read_segment(info, torch.device("cpu"))
        for name, tensor in tensors:
            own = self._own.get(name)
            if own is None or own.shape != tensor.shape:
                had = None if own is None else list(own.shape)
                raise ValueError(f"weights: {name} has shape {list(tensor.shape)}, the model's {had}")
            own.copy_(tensor)
            self._missing.discard(own.data_ptr())

    def finish_push(self, version: int) -> None:
        """End the weight sync. Raises ValueError if `version` is lower than before or a weight did not arrive; a tied
        weight may arrive under either of its names.
        """
        if version < self._version:
            raise ValueError(
                f"version is {version}: must not be lower than {self._version}, the model's current version"
            )
        if self._missing:
            names = [name for name, tensor in self._own.items() if tensor.data_ptr() in self._missing]
            raise ValueError(f"weights: {len(names)} are missing from the push, among them {names[:5]}")
        self._version = version
