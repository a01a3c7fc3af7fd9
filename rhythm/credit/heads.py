"""Chooses heads: the sampled layers, and the local and global heads among their query heads.

Shape suffixes: B sequences, n heads of the pool (all query heads of the sampled layers, layer after layer).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from rhythm.shapes import check_dense, integer


@dataclass(frozen=True)
class HeadGroups:
    """The local and the global heads of the pool.

    Groups with one row are fixed groups: they hold for every sequence of a batch.

    Attributes:
        local: bool [B, n] or [1, n], heads that look back the least.
        global_: bool, same shape, heads that look back the furthest.
    """

    local: Tensor
    global_: Tensor


def sampled_layers(num_layers: int, count: int = 5) -> list[int]:
    """Layers whose attention is read: `count` of them, evenly over the middle third of the network.

    Layer i is ⌊lo + i·(hi − lo)/(count − 1) + ½⌋ with lo = ⌊L/3⌋ and hi = ⌊2L/3⌋; layers named twice are
    listed once, so a shallow model gives fewer than `count`. A count of 1 gives lo.

    Raises:
        ValueError: num_layers or count is no integer, or below 1.
    """
    num_layers = integer("num_layers", num_layers, 1)
    count = integer("count", count, 1)
    lo, hi = num_layers // 3, 2 * num_layers // 3
    steps = max(count - 1, 1)
    # In whole numbers, so that a half always rounds up.
    layers = (lo + (2 * i * (hi - lo) + steps) // (2 * steps) for i in range(count))
    return list(dict.fromkeys(layers))


def select_heads(span: Tensor, quantile: float = 0.3, per: Literal["sequence", "batch"] = "sequence") -> HeadGroups:
    """Splits off the heads with the smallest and the largest mean attention span (eq. 7).

    Heads are sorted by (span, place in the pool); with c = max(1, ⌊quantile·n + ½⌋) the first c are local,
    the last c global. The groups overlap where 2c > n. A head of NaN span is in neither group and does not
    count towards n; a sequence without response rows has only such heads, so it gets empty groups.

    Args:
        span: [B, n] floating point, tokens.
        quantile: share of the pool in each group, in (0, 0.5].
        per: "sequence" sorts each sequence's own spans. "batch" sorts their mean over the sequences where
            they are defined, and gives every sequence those groups.

    Returns:
        HeadGroups of bool [B, n].

    Raises:
        ValueError: span is not floating point [B, n] with n ≥ 1; quantile or per not among the values
            above.
    """
    check_dense("span", span)
    if span.ndim != 2 or span.shape[1] == 0 or not span.is_floating_point():
        raise ValueError(f"span is {span.dtype} {list(span.shape)}; it must be floating point [B, n] with n ≥ 1")
    if not isinstance(quantile, (int, float)) or not 0 < quantile <= 0.5:
        raise ValueError(f"quantile is {quantile!r}; it must be above 0 and at most 0.5")
    if per not in ("sequence", "batch"):
        raise ValueError(f"per is {per!r}; it must be 'sequence' or 'batch'")

    span_Rn = span if per == "sequence" else span.float().nanmean(dim=0, keepdim=True)
    defined_R1 = (~span_Rn.isnan()).sum(dim=-1, keepdim=True)
    share = as_fraction(quantile)
    size_R1 = (2 * share.numerator * defined_R1 + share.denominator) // (2 * share.denominator)
    size_R1 = torch.minimum(size_R1.clamp(min=1), defined_R1)
    rank_Rn = ascending_rank(span_Rn)
    local_Rn = rank_Rn < size_R1
    global_Rn = (rank_Rn >= defined_R1 - size_R1) & (rank_Rn < defined_R1)
    return HeadGroups(local=local_Rn.expand(span.shape), global_=global_Rn.expand(span.shape))


def shared_heads(span: Tensor, quantile: float = 0.3) -> HeadGroups:
    """The fixed groups, [1, n], that a batch's mean spans choose: `select_heads` per batch. span: [B, n]."""
    chosen = select_heads(span, quantile, "batch")
    return HeadGroups(local=chosen.local[:1], global_=chosen.global_[:1])


def turnover(before: HeadGroups, now: HeadGroups) -> tuple[float, float]:
    """(local, global): how far fixed groups have changed, 1 − |A ∩ B| / |A ∪ B| (the Jaccard distance): 0 for the same
    heads, 1 for none in common; NaN where both are empty.

    Raises ValueError for groups of several rows, or of unlike pools.
    """
    changes = []
    for name in ("local", "global_"):
        old, new = getattr(before, name), getattr(now, name)
        if old.shape[:1] != (1,) or old.shape != new.shape:
            raise ValueError(f"{name} has shapes {list(old.shape)} and {list(new.shape)}; both must be [1, n]")
        either = int((old.cpu() | new.cpu()).sum())
        changes.append(1 - int((old.cpu() & new.cpu()).sum()) / either if either else float("nan"))
    return changes[0], changes[1]


def ascending_rank(x: Tensor) -> Tensor:
    """Place of each entry in its row (last dimension): smallest first, ties by position, NaN at the end."""
    return x.argsort(dim=-1, stable=True).argsort(dim=-1)


def as_fraction(x: float) -> Fraction:
    """The fraction a decimal such as 0.07 was written for: 0.07 · 100 is 7, not 7.000000000000001."""
    return Fraction(x).limit_denominator(10**9)
