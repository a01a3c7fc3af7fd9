"""Weights from the trainer to engines in the same process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from rhythm.engines.interfaces import Train


class WeightReceiver(Protocol):
    """An engine that copies weights from tensors of its own process."""

    def update_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Replace all weights. Raises ValueError if `version` falls, or names or shapes differ."""


class LocalWeightSync:
    """See rhythm.engines.interfaces.WeightSync: for engines in the trainer's process."""

    def __init__(self, train: Train, *receivers: WeightReceiver) -> None:
        self._train = train
        self._receivers = receivers

    def sync(self, version: int) -> None:
        """See rhythm.engines.interfaces.WeightSync. Raises ValueError as `update_weights` does."""
        weights = self._train.weights()
        for receiver in self._receivers:
            receiver.update_weights(weights, version)


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, Tensor], version: int, current: int) -> int:
    """Copy `weights` into `model`, converting type and device; returns the new version.

    Tensors that are the model's own already (an engine that shares the trainer's model) are left alone.

    Raises:
        ValueError: `version` is lower than `current`, the names differ from the model's, or a shape does.
    """
    if version < current:
        raise ValueError(f"version is {version}: must not fall below the {current} the engine already has")
    own = model.state_dict()
    if own.keys() != weights.keys():
        differing = sorted(own.keys() ^ weights.keys())
        raise ValueError(f"weights: names differ from the engine's model in {differing[:5]}")
    for name, tensor in weights.items():
        target = own[name]
        if target.shape != tensor.shape:
            raise ValueError(f"weights: {name} has shape {tuple(tensor.shape)}, the engine's {tuple(target.shape)}")
        if target.data_ptr() != tensor.data_ptr() or target.device != tensor.device:
            target.copy_(tensor)
    return version
