"""Argument checks shared by all stages, and the struct for packed sequences.

Suffixes of tensor names: B sequences, T tokens, H query heads, G key heads, D head size.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

MAX_INT = 2**63 - 1


@dataclass(frozen=True)
class HostSequences:
    """cu_seqlens and prompt_lens of `Sequences` as numbers: B + 1 and B of them."""

    cu_seqlens: list[int]
    prompt_lens: list[int]


@dataclass(frozen=True)
class Sequences:
    """`count` (B) sequences on a flattened axis of `tokens` (T).

    Attributes:
        cu_seqlens: int32 [B + 1], sequence i is tokens cu_seqlens[i] … cu_seqlens[i + 1] − 1; None: all sequences have
            T / B tokens.
        prompt_lens: int32 or int64 [B], tokens of each sequence that are its prompt; None: no prompts.
        tokens, count: T and B.
    """

    cu_seqlens: Tensor | None
    prompt_lens: Tensor | None
    tokens: int
    count: int

    @cached_property
    def host(self) -> HostSequences:
        """The same on the host. Waits for the tensors' device."""
        if self.cu_seqlens is not None:
            cu_seqlens = [int(start) for start in self.cu_seqlens.tolist()]
        else:
            cu_seqlens = [i * self.tokens // self.count for i in range(self.count + 1)] if self.count else [0]
        prompts = [0] * self.count if self.prompt_lens is None else [int(n) for n in self.prompt_lens.tolist()]
        return HostSequences(cu_seqlens, prompts)

    def blocks(self, size: int) -> int:
        """Upper bound on the number of blocks of `size` tokens, so that the host never reads cu_seqlens."""
        if self.cu_seqlens is None:
            return self.count * -(-(self.tokens // self.count) // size)
        return self.tokens // size + self.count


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


def check_tensor(name: str, x: object) -> None:
    """Raise ValueError unless `x` is a tensor, and not a nested one."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is of type {type(x).__name__}; it must be a torch.Tensor")
    if x.is_nested:
        raise ValueError(f"{name} is a nested tensor; it must be a plain one: cu_seqlens says where sequences begin")


def check_dense(name: str, x: Tensor) -> None:
    """Raise ValueError unless `x` is an ordinary dense tensor, neither nested nor sparse."""
    check_tensor(name, x)
    if x.layout != torch.strided:
        raise ValueError(f"{name} has layout {x.layout}; it must be torch.strided")


def integer(name: str, value: object, least: int = -MAX_INT, most: int = MAX_INT) -> int:
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
