"""Sends weights through Ray's object store, to transformers models on other machines.

Each bucket is one flat byte array, with the names, dtypes and shapes of its tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

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


def read_objects(info: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a bucket that an ObjectStoreSender staged."""
    flat = torch.from_numpy(np.array(ray.get(info["flat"][0])))  # a copy: the store's memory is read-only
    at = 0
    for name, dtype_name, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
        dtype = getattr(torch, dtype_name)
        size = torch.Size(shape).numel() * dtype.itemsize
        yield name, flat[at : at + size].clone().view(dtype).view(shape)
        at += size
