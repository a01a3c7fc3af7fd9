"""Context parallelism: the ranks of a group split every sequence, and gather keys and values to attend over them.

Each sequence is padded to 2·c chunks of one length, of which rank r of c has chunks r and 2·c − 1 − r, as everywhere in
Megatron: then all ranks have the same work, and Megatron's RoPE knows the positions.

Shape suffixes: T positions of all ranks, t those of this rank, Q queries and K keys of its first or second chunks, X
any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from rhythm.tap.context_parallel import gathered, shard_places


@dataclass(frozen=True)
class Half:
    """The first chunks of this rank, or its second ones: one of each sequence, which sees the keys up to its end.

    Attributes:
        queries: int64 [Q], where they are among this rank's positions.
        keys: int64 [K], where theirs are among the positions of all ranks, in the order of the ranks.
        cu_queries, cu_keys: int32 [b + 1].
        longest_queries, longest_keys: of a sequence.
    """

    queries: Tensor
    keys: Tensor
    cu_queries: Tensor
    cu_keys: Tensor
    longest_queries: int
    longest_keys: int


@dataclass(frozen=True)
class ContextRows:
    """What this rank has of the rows of a packed micro-batch.

    Attributes:
        group: the ranks that split them.
        places: int64 [t], its positions among all, on the CPU.
        halves: its first and its second chunks.
        order: int64 [t], where each of its positions is among the queries of both.
    """

    group: distributed.ProcessGroup
    places: Tensor
    halves: tuple[Half, Half]
    order: Tensor

    @classmethod
    def of(cls, rows: Sequence[int], group: distributed.ProcessGroup, device: torch.device) -> ContextRows:
        """`rows`: lengths, multiples of 2·c."""
        size, rank = group.size(), group.rank()
        home_T = torch.cat([shard_places(rows, size, r) for r in range(size)]).argsort()
        starts = [*accumulate(rows, initial=0)]
        chunks = [length // (2 * size) for length in rows]
        halves = []
        for second, index in enumerate((rank, 2 * size - 1 - rank)):
            queries = [
                torch.arange(chunk) + start // size + second * chunk
                for start, chunk in zip(starts, chunks, strict=False)
            ]
            lens = [(index + 1) * chunk for chunk in chunks]
            keys = [home_T[start : start + length] for start, length in zip(starts, lens, strict=False)]
            cu_queries, cu_keys = (
                torch.tensor([*accumulate(x, initial=0)], dtype=torch.int32, device=device) for x in (chunks, lens)
            )
            at, of = torch.cat(queries).to(device), torch.cat(keys).to(device)
            halves.append(Half(at, of, cu_queries, cu_keys, max(chunks), max(lens)))
        order = torch.cat([half.queries for half in halves]).argsort()
        return cls(group, shard_places(rows, size, rank), (halves[0], halves[1]), order)


def padded_rows(lens: Sequence[int], size: int) -> list[int]:
    """Lengths of rows that `size` ranks can split, with the padding at their ends."""
    return [length + -length % (2 * size) for length in lens]


def gathered_with_gradient(x_tX: Tensor, group: distributed.ProcessGroup) -> Tensor:
    """[T, X] of all ranks in their order. A collective, and so is its backward pass: each rank gets the sum of the
    ranks' gradients of its own part.
    """
    whole: Tensor = _Gathered.apply(x_tX, group)  # type: ignore[no-untyped-call]
    return whole


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_tX: Tensor, group: distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        return gathered(x_tX, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TX: Tensor) -> tuple[Tensor, None]:
        grad_tX = grad_TX.new_empty((len(grad_TX) // ctx.group.size(), *grad_TX.shape[1:]))
        # Newer versions of torch have another name for it.
        reduce_scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
        reduce_scatter(grad_tX, grad_TX.contiguous(), group=ctx.group)
        return grad_tX, None


def joined(x: Tensor, group: distributed.ProcessGroup) -> Tensor:
    """The sum over the ranks, each of which has some entries and zeros elsewhere. A collective, but not its backward
    pass: what all ranks compute from the sum is one and the same, so each takes the gradient of its own entries.
    """
    whole: Tensor = _Joined.apply(x, group)  # type: ignore[no-untyped-call]
    return whole


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: distributed.ProcessGroup) -> Tensor:
        total = x.clone()
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
