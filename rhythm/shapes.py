"""Argument checks shared by all stages.

Suffixes of tensor names: B sequences, T tokens, H query heads, G key heads, D head size.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_INT = 2**63 - 1


def check_shape(name: str, tensor: Tensor, shape: Sequence[int | str]) -> tuple[int, ...]:
    """Check that the tensor has `shape`, where a name ("B", "T") allows any size; returns its shape.

    Raises ValueError naming the argument: "input_ids has shape [44]; it must be [B, T]".
    """
    actual = tuple(tensor.shape)
    fits = len(actual) == len(shape) and all(
        isinstance(want, str) or want == have for want, have in zip(shape, actual, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} has shape {list(actual)}; it must be [{', '.join(map(str, shape))}]")
    return actual


def check_dense(name: str, x: object) -> None:
    """Raise ValueError unless `x` is an ordinary dense tensor, neither nested nor sparse."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is of type {type(x).__name__}; it must be a torch.Tensor")
    if x.is_nested:
        raise ValueError(f"{name} is a nested tensor; it must be a plain one: cu_seqlens says where sequences begin")
    if x.layout != torch.strided:
        raise ValueError(f"{name} has layout {x.layout}; it must be torch.strided")


def integer(name: str, value: object, least: int, most: int = MAX_INT) -> int:
    """`value` as an int. Raises ValueError unless it is an integer (of Python, numpy or torch, not bool) from `least`
    to `most`.
    """
    number = index(value)
    if number is None or number < least or number > most:
        if number is not None and number > most:
            limit = f" of at most {most}"
        else:
            limit = f" of at least {least}" if least > -most else ""
        raise ValueError(f"{name} is {value!r}; it must be an integer{limit}")
    return number


def index(value: object) -> int | None:
    """`value` as an int; None if it is not an integer."""
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]  # a symbolic integer of torch.compile
    try:
        return operator.index(value)  # type: ignore[arg-type]  # raises TypeError if it is not an integer
    except (TypeError, RuntimeError):
        return None
