"""Copies weights from the trainer to engines in the same process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from rhythm.engines.interfaces import Train


class WeightReceiver(Protocol):
    """An engine that copies weights from tensors in the same process."""

    def update_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Replace all weights. Raises ValueError if `version` is lower than before, or names or shapes differ."""


class LocalWeightSync:
    """See rhythm.engines.interfaces.WeightSync: for engines in the trainer's process."""

    def __init__(self, train: Train, *receivers: WeightReceiver) -> None:
        self._train = train
        self._receivers = receivers

    def sync(self, version: int) -> None:
        """See rhythm.engines.interfaces.WeightSync. Raises ValueError from `update_weights`."""
        weights = self._train.weights()
        for receiver in self._receivers:
            receiver.update_weights(weights, version)


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, Tensor], version: int, current: int) -> int:
    """Copy `weights` into `model`, converting dtype and device; returns the new version.

    Tensors that the model shares already (an engine that uses the trainer's model) are not copied.

    Raises:
        ValueError: `version` is lower than `current`, the names differ from the model's, or a shape does.
    """
    if version < current:
        raise ValueError(f"version is {version}: must not be lower than {current}, the engine's current version")
    own = model.state_dict()
    if own.keys() != weights.keys():
        differing = sorted(own.keys() ^ weights.keys())
        raise ValueError(f"weights: these names are not in both the weights and the engine's model: {differing[:5]}")
    for name, tensor in weights.items():
        target = own[name]
        if target.shape != tensor.shape:
            raise ValueError(f"weights: {name} has shape {tuple(tensor.shape)}, the engine's {tuple(target.shape)}")
        if target.data_ptr() != tensor.data_ptr() or target.device != tensor.device:
            target.copy_(tensor)
    return version
