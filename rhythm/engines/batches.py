"""Rows and micro-batches of dataclasses that hold responses on axis 0 of every tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from rhythm.engines.interfaces import Rollout

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

D = TypeVar("D", bound="DataclassInstance")


def take_rows(items: D, index_n: Tensor) -> D:
    """The responses of `index_n`, in its order."""
    return _map_tensors(items, lambda x: x[index_n.to(x.device)])


def trim(items: D, width: int) -> D:
    """The first `width` positions of every [B, T] tensor; what is cut off has to be padding."""
    return _map_tensors(items, lambda x: x[:, :width] if x.ndim == 2 else x)


def micro_batches(rollout: Rollout, size: int) -> Iterator[tuple[Tensor, int]]:
    """(row indices [≤ size], width) of each pass: rows of about equal length together, the longest first."""
    lens_B = rollout.attention_mask.sum(dim=1)
    for index_n in torch.split(lens_B.argsort(descending=True, stable=True), size):
        yield index_n, int(lens_B[index_n].max())


def _map_tensors(items: D, function: Callable[[Tensor], Tensor]) -> D:
    def mapped(value: Any) -> Any:
        if isinstance(value, Tensor):
            return function(value)
        return _map_tensors(value, function) if is_dataclass(value) and not isinstance(value, type) else value

    return replace(items, **{field.name: mapped(getattr(items, field.name)) for field in fields(items)})
