"""Makes decoding token by token cheap: a cache that grows in place, and attention that reads each key once.

transformers' cache copies all its keys and values for every token, and its sdpa attention with a mask copies them once
more for every query head of a group. With many continuations of a few hundred tokens that takes most of the time.

Shape suffixes: R rows, H query heads, G key heads, g = H / G, L cached tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.cache_utils import DynamicLayer

from rhythm.tap.attention_form import AttentionCall
from rhythm.tap.interception import Output, intercept_attention, text_config

BLOCK = 64  # tokens by which the memory of a cache grows
HEEDED = ("dropout", "position_bias", "cache")  # arguments of sdpa's calls that `_grouped` doesn't compute


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


@contextmanager
def grouped_attention(model: Any) -> Iterator[None]:
    """Context in which sdpa attention of single tokens doesn't copy keys and values per query head.

    Other implementations, longer inputs and layers with more than scores and a mask are computed as ever.
    """
    sdpa = getattr(model.config, "_attn_implementation", None) == "sdpa"
    with intercept_attention(text_config(model), _attend) if sdpa else nullcontext():
        yield


def _attend(call: AttentionCall) -> Output:
    single = call.query.shape[2] == 1 and (call.mask is None or isinstance(call.mask, Tensor))
    if not single or any(call.options.get(name) for name in HEEDED):
        return call.run()
    return _grouped(call.query, call.key, call.value, call.mask, call.options.get("scaling")), None


def _grouped(query_RH1D: Tensor, key_RGLD: Tensor, value_RGLD: Tensor, mask_R11L: Any, scale: Any) -> Tensor:
    """Attention of one token per row, [R, 1, H, D]: the query heads of a group are computed as queries of one head."""
    rows, heads, _, size = query_RH1D.shape
    query_RGgD = query_RH1D.reshape(rows, key_RGLD.shape[1], -1, size)
    mask = None if mask_R11L is None else mask_R11L.expand(-1, -1, query_RGgD.shape[2], -1)
    out_RGgD = scaled_dot_product_attention(query_RGgD, key_RGLD, value_RGLD, attn_mask=mask, scale=scale)
    return out_RGgD.reshape(rows, 1, heads, value_RGLD.shape[3])
