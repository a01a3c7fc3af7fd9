"""Brings together what the ranks of a Megatron model have read of their heads and layers.

Heads are chosen over the whole model: the spans of all heads are sent to all ranks, each rank sums WAAD and FAI over
its own heads among the chosen ones, and the sums are all-reduced. So batch-wide grouping needs no second pass.

Shape suffixes: B responses, P positions of the batch, n heads of the pool, h heads of one layer on this rank, b
sequences of a micro-batch, N their tokens one after the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rhythm.credit.heads import HeadGroups
from rhythm.credit.signals import RhythmSignals
from rhythm.shapes import check_shape
from rhythm.tap.megatron_layers import MicroBatch


@dataclass(frozen=True)
class Read:
    """Statistics of one layer and micro-batch. heads: indices in the pool, [h]; fp32: span [b, h] or None, waad and fai
    [h, N]. parts: how many ranks have one, if the statistics are the sums of theirs.
    """

    micro: MicroBatch
    heads: Tensor
    span: Tensor | None
    waad: Tensor
    fai: Tensor
    parts: int = 1


def combine(
    reads: Sequence[Read],
    response_mask_BP: Tensor,
    rows: Sequence[Hashable] | None,
    pool: tuple[tuple[int, int], ...],
    choose: Callable[[Tensor], HeadGroups],
    all_reduce: Callable[[Tensor], Tensor],
) -> RhythmSignals:
    """Signals of the rows that the reads of all ranks are of, on the CPU.

    Args:
        reads: this rank's.
        response_mask_BP: true on the responses.
        rows: what the micro-batches call each row; None: 0 to B − 1.
        pool: (layer, head) of all heads, over all ranks.
        choose: from spans [B, n] to the head groups of each row.
        all_reduce: sums a tensor over the ranks, and returns it on the CPU.

    Raises:
        ValueError: a row that was not read once in each layer, or whose response is another.
    """
    B, P = check_shape("response_mask", response_mask_BP, ("B", "P"))
    response_BP = response_mask_BP.bool().cpu()
    if rows is not None and len(rows) != B:
        raise ValueError(f"rows has length {len(rows)}; it must have one entry per row of response_mask, {B}")
    if (longest := max((length for read in reads for length in read.micro.lens), default=0)) > P:
        raise ValueError(f"response_mask has {P} positions; a sequence of {longest} tokens was read")
    finder = _RowFinder(range(B) if rows is None else rows)
    placed = [(read, finder.rows(read)) for read in reads]
    n = len(pool)
    own = torch.zeros(B, n + 2)  # spans, heads that were read, and reads of another response
    for read, rows_b in placed:
        span_bh = torch.nan if read.span is None else read.span.float().cpu()
        own[rows_b[:, None], read.heads] = span_bh
        own[rows_b, n] += len(read.heads) / read.parts
        own[rows_b, n + 1] += _other_response(read.micro, response_BP[rows_b])
    total = all_reduce(own)
    span_Bn, count_B, other_B = total[:, :n].clone(), total[:, n].round(), total[:, n + 1]
    for wrong_B, what in ((count_B != n, "was not read once in each layer"), (other_B > 0, "has another response")):
        if wrong_B.any():
            raise ValueError(f"row {int(wrong_B.nonzero()[0])} of response_mask {what} in the forward passes")
    chosen = choose(span_Bn)
    sums_2BP = torch.zeros(2, B, P)
    for read, rows_b in placed:
        row_N, position_N, sums_2N = _own_sums(read, rows_b, chosen)
        sums_2BP[:, row_N, position_N] += sums_2N
    waad_BP, fai_BP = all_reduce(sums_2BP)
    return RhythmSignals(
        waad=(waad_BP / chosen.local.sum(dim=-1, keepdim=True)).masked_fill(~response_BP, torch.nan),
        fai=(fai_BP / chosen.global_.sum(dim=-1, keepdim=True)).masked_fill(~response_BP, torch.nan),
        entropy=None,
        span=span_Bn,
        groups=chosen,
        heads=pool,
    )


class _RowFinder:
    """Gives the sequences of each layer their rows of the batch: the first of that name in which the layer is free."""

    def __init__(self, names: Sequence[Hashable]) -> None:
        self._rows: defaultdict[Hashable, list[int]] = defaultdict(list)
        for row, name in enumerate(names):
            self._rows[name].append(row)
        self._taken: defaultdict[tuple[int, Hashable], int] = defaultdict(int)

    def rows(self, read: Read) -> Tensor:
        """int64 [b]. ValueError for a sequence that is not in the batch, or was read before."""
        layer, found = int(read.heads[0]), []
        for name in read.micro.rows:
            free = self._rows[name][self._taken[layer, name] :]
            if not free:
                raise ValueError(f"a sequence named {name!r} was read that rows doesn't name, or not as often")
            self._taken[layer, name] += 1
            found.append(free[0])
        return torch.tensor(found, dtype=torch.int64)


def _other_response(micro: MicroBatch, response_bP: Tensor) -> Tensor:
    """fp32 [b]: 1 where a row's response is not that of the micro-batch; no response at all is none of the others."""
    position_P = torch.arange(response_bP.shape[1])
    starts, ends = (torch.tensor(x)[:, None] for x in (list(micro.prompt_lens), list(micro.lens)))
    own_bP = (position_P >= starts) & (position_P < ends)
    return ((response_bP != own_bP).any(dim=1) & response_bP.any(dim=1)).float()


def _own_sums(read: Read, rows_b: Tensor, chosen: HeadGroups) -> tuple[Tensor, Tensor, Tensor]:
    """(row, position) of each token of a micro-batch, and [2, N]: WAAD summed over the local, FAI over the global heads
    of its row among these heads.
    """
    lens_b = torch.tensor(list(read.micro.lens))
    row_N = torch.repeat_interleave(lens_b)
    position_N = torch.cat([torch.arange(length) for length in read.micro.lens])
    on_device = row_N.to(read.waad.device)
    sums = []
    for value_hN, group_Bn in ((read.waad, chosen.local), (read.fai, chosen.global_)):
        group_bh = group_Bn[rows_b[:, None], read.heads].to(value_hN.device)
        # torch.where, not a product: NaN of a head outside the group must not reach the sum.
        sums.append(torch.where(group_bh[on_device].T, value_hN.float(), 0.0).sum(dim=0))
    return rows_b[row_N], position_N, torch.stack(sums).cpu()
