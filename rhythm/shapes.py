"""Argument checks shared by all stages, and the struct for packed sequences.

Suffixes of tensor names: B sequences, T tokens, H query heads, G key heads, D head size.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

MAX_INT = 2**63 - 1


@dataclass(frozen=True)
class HostSequences:
    """`Sequences` as numbers.

    Attributes:
        cu_seqlens: B + 1 of them, on the token axis.
        prompt_lens: B tokens, those without a query among them.
        cu_rows: B + 1 of them, where each sequence's queries begin on q's axis.
    """

    cu_seqlens: list[int]
    prompt_lens: list[int]
    cu_rows: list[int]

    @cached_property
    def missing(self) -> list[int]:
        """First tokens of each sequence that have no query, B of them."""
        return [
            keys - rows for keys, rows in zip(_differences(self.cu_seqlens), _differences(self.cu_rows), strict=True)
        ]


def _differences(bounds: list[int]) -> list[int]:
    return [end - start for start, end in pairwise(bounds)]


@dataclass(frozen=True)
class Sequences:
    """`count` (B) sequences on a flattened axis of `tokens` (T), that of the keys.

    q may have rows for the last tokens of each sequence only; tokens without one count as prompt.

    Attributes:
        cu_seqlens: int32 [B + 1], sequence i is tokens cu_seqlens[i] … cu_seqlens[i + 1] − 1; None: all sequences have
            T / B tokens.
        prompt_lens: int32 or int64 [B], tokens of each sequence that are its prompt; None: no prompts.
        tokens, count: T and B.
        cu_rows: int32 [B + 1], where each sequence's queries lie on q's axis; None: as cu_seqlens, or evenly.
        rows: length of q's axis; None: T.
    """

    cu_seqlens: Tensor | None
    prompt_lens: Tensor | None
    tokens: int
    count: int
    cu_rows: Tensor | None = None
    rows: int | None = None

    @property
    def fewer_rows(self) -> bool:
        """Whether q's axis is not the token axis."""
        return self.cu_rows is not None or (self.rows is not None and self.rows != self.tokens)

    @cached_property
    def host(self) -> HostSequences:
        """The same on the host. Waits for the tensors' device."""
        cu_seqlens = self._bounds(self.cu_seqlens, self.tokens)
        cu_rows = self._bounds(self.cu_rows, self.rows or 0) if self.fewer_rows else cu_seqlens
        prompts = [0] * self.count if self.prompt_lens is None else [int(n) for n in self.prompt_lens.tolist()]
        missing = HostSequences(cu_seqlens, prompts, cu_rows).missing
        return HostSequences(cu_seqlens, [max(pair) for pair in zip(prompts, missing, strict=True)], cu_rows)

    def _bounds(self, given: Tensor | None, total: int) -> list[int]:
        if given is not None:
            return [int(start) for start in given.tolist()]
        return [i * total // self.count for i in range(self.count + 1)] if self.count else [0]

    def row_places(self, device: torch.device) -> Tensor:
        """int64 [rows], where on the token axis each row of q lies. Does not wait for the device."""
        rows = self.tokens if self.rows is None else self.rows
        index = torch.arange(rows, device=device)
        if not self.fewer_rows:
            return index
        end_B, row_end_B = self._ends(self.cu_seqlens, self.tokens, device), self._ends(self.cu_rows, rows, device)
        of_row = torch.searchsorted(row_end_B, index, right=True).clamp(max=max(self.count - 1, 0))
        return (index + (end_B - row_end_B)[of_row]).clamp(0, max(self.tokens - 1, 0))

    def _ends(self, given: Tensor | None, total: int, device: torch.device) -> Tensor:
        if given is not None:
            return given[1:].long()
        return torch.arange(1, self.count + 1, device=device) * (total // max(self.count, 1))

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
