"""A cache that grows in place: transformers' own copies all its keys and values for every token.

Shape suffixes: R rows, G key heads, L cached tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer

BLOCK = 64  # tokens by which the memory of a cache grows


class RowsLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped here
    """Keys and values [R, G, L, D] with room for more tokens; rows are dropped without copying the others."""

    def __init__(self, keys_RGLD: Tensor, values_RGLD: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys_RGLD, values_RGLD)
        self.length = keys_RGLD.shape[2]
        self._keys, self._values = (_with_room(x) for x in (keys_RGLD, values_RGLD))
        self._show()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append one token or more per row; returns all keys and values."""
        end = self.length + key_states.shape[2]
        if end > self._keys.shape[2]:
            self._keys, self._values = (_with_room(x, end - self.length) for x in (self.keys, self.values))
        self._keys[:, :, self.length : end] = key_states
        self._values[:, :, self.length : end] = value_states
        self.length = end
        self._show()
        return self.keys, self.values

    def keep(self, order: Sequence[int]) -> None:
        """Keep rows `order`, each of which is its own place or beyond the number of rows kept."""
        for place, row in enumerate(order):
            if place != row:
                self.keys[place], self.values[place] = self.keys[row], self.values[row]
        self._keys, self._values = self._keys[: len(order)], self._values[: len(order)]
        self._show()

    def _show(self) -> None:
        self.keys, self.values = self._keys[:, :, : self.length], self._values[:, :, : self.length]


def _with_room(x_RGLD: Tensor, tokens: int = 1) -> Tensor:
    return pad(x_RGLD, (0, 0, 0, -(-tokens // BLOCK) * BLOCK))


def compacted(kept: Sequence[int]) -> list[int]:
    """The rows `kept` (ascending) in an order that moves as few as possible: into the places of dropped ones."""
    places = set(range(len(kept)))
    stay = places.intersection(kept)
    moving = iter([row for row in kept if row not in places])
    return [place if place in stay else next(moving) for place in range(len(kept))]
