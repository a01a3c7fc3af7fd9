"""Plans micro-batches from the lengths of rows: by a number of rows, or by a budget of tokens.

Rows are taken by decreasing length, equal ones in their order, so that those of one micro-batch are of about the same
length and little is padded, also where only attention is. Rows that share prompts are taken prompt by prompt instead. A
plan depends on the lengths and groups alone.

Shape suffixes: B rows.
"""

from __future__ import annotations

from bisect import bisect_left

import torch
from torch import Tensor


def split_rows(
    lens_B: Tensor,
    rows: int,
    max_tokens: int | None = None,
    *,
    padded: bool = False,
    group_B: Tensor | None = None,
) -> list[Tensor]:
    """Row indices, int64, of each micro-batch, the longest rows first; every row is in one of them.

    Args:
        lens_B: integers [B], tokens of each row.
        rows: of a micro-batch at most; not used with a budget.
        max_tokens: of a micro-batch at most. Then there are as few micro-batches as rows in this order allow, and the
            largest of them is as small as it can be in so many. None: micro-batches of `rows` rows.
        padded: the tokens of a micro-batch are its rows times the longest of them, not their sum.
        group_B: integers [B], the prompt of each row: rows of a prompt come together, prompts in the order of their
            numbers. Tokens of a prompt count in each of its rows. Not with `padded`.

    Raises ValueError if a row has more than max_tokens.
    """
    order_B = lens_B.argsort(descending=True, stable=True) if group_B is None else group_B.argsort(stable=True)
    lens = lens_B[order_B].tolist()
    if not lens:
        return []
    if max_tokens is None:
        return list(torch.split(order_B, rows))
    longest = max(lens)
    if longest > max_tokens:
        raise ValueError(f"max_tokens is {max_tokens}: a row has {longest} tokens, and must fit into a micro-batch")
    fewest = len(_cut(lens, max_tokens, padded))
    smallest = bisect_left(
        range(max_tokens), True, lo=longest, key=lambda limit: len(_cut(lens, limit, padded)) <= fewest
    )
    return list(torch.split(order_B, _cut(lens, smallest, padded)))


def deal_rows(lens_B: Tensor, ranks: int) -> list[Tensor]:
    """Row indices, int64, of each data parallel rank, the longest first.

    Rows are sorted by decreasing length and dealt to ranks 0, 1, …, n − 1, n − 1, …, 1, 0, 0, 1, …, so that all ranks
    get about the same number of tokens. With fewer rows than ranks, some ranks get none.
    """
    order_B = lens_B.argsort(descending=True, stable=True)
    forth_B = torch.arange(len(order_B), device=order_B.device) % (2 * ranks)
    rank_B = torch.minimum(forth_B, 2 * ranks - 1 - forth_B)
    return [order_B[rank_B == rank] for rank in range(ranks)]


def _cut(lens: list[int], limit: int, padded: bool) -> list[int]:
    """Rows of each micro-batch where each takes as many of the next rows as fit. lens: at most `limit`; decreasing if
    `padded`.
    """
    counts: list[int] = []
    room = longest = 0
    for length in lens:
        if not counts or room < (longest if padded else length):
            counts.append(0)
            room, longest = limit, length
        counts[-1] += 1
        room -= longest if padded else length
    return counts
