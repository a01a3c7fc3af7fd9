"""Sends weights through Ray's object store into a transformers model, for engines without a transfer of their own.

Each bucket is one flat byte array, with the names, dtypes and shapes of its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor, nn

from rhythm.engines.transfer import Bucket, WeightSender, describe


class ObjectStoreSender(WeightSender):
    """The sending end, in the trainer."""

    def stage(self, bucket: Bucket) -> dict[str, Any]:
        """Put a bucket into the store, where it stays until the next is staged and all receivers are done with it."""
        ready = self._ready(bucket)
        flat = torch.cat([tensor.cpu().reshape(-1).view(torch.uint8) for _, tensor in ready])
        # In a list, because Ray would resolve a plain reference to its content when it is passed on.
        self._reference = [ray.put(flat.numpy())]
        return {**describe(ready), "flat": self._reference}


class ModelReceiver:
    """The receiving end, for a transformers model: copies weights in by name and checks that all of them arrived."""

    def __init__(self, model: nn.Module) -> None:
        self._own: dict[str, Tensor] = model.state_dict()
        self._missing: set[int] = set()
        self._version = 0

    def start_push(self) -> None:
        """Begin a weight sync."""
        self._missing = {tensor.data_ptr() for tensor in self._own.values()}

    @torch.no_grad()
    def receive(self, info: Mapping[str, Any]) -> None:
        """Copy one bucket into the model, converting dtype and device.

        Raises ValueError for a name that the model doesn't have, and for a shape other than the model's.
        """
        flat = torch.from_numpy(np.array(ray.get(info["flat"][0])))  # a copy: the store's memory is read-only
        at = 0
        for name, dtype_name, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
            dtype = getattr(torch, dtype_name)
            size = torch.Size(shape).numel() * dtype.itemsize
            own = self._own.get(name)
            if own is None or list(own.shape) != shape:
                raise ValueError(f"weights: {name} has shape {shape}, the model's {None if own is None else own.shape}")
            own.copy_(flat[at : at + size].clone().view(dtype).view(shape))
            self._missing.discard(own.data_ptr())
            at += size

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
