from __future__ import annotations

import itertools
import random

import pytest
import torch

from rhythm.engines.micro_batches import deal_rows, split_rows


def sizes(lens: list[int], parts: list[torch.Tensor], padded: bool) -> list[int]:
    rows = [[lens[index] for index in part.tolist()] for part in parts]
    return [len(part) * max(part) if padded else sum(part) for part in rows]


def best(lens: list[int], max_tokens: int, padded: bool) -> tuple[int, int]:
    """(fewest micro-batches, tokens of the largest one in so few), over all cuts of the rows by decreasing length."""
    order = sorted(lens, reverse=True)
    found = []
    for count in range(len(order)):
        for cuts in itertools.combinations(range(1, len(order)), count):
            bounds = [0, *cuts, len(order)]
            parts = [order[a:b] for a, b in itertools.pairwise(bounds)]
            largest = max(len(part) * part[0] if padded else sum(part) for part in parts)
            if largest <= max_tokens:
                found.append((len(parts), largest))
    return min(found)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_a_budget_is_kept_with_few_and_even_micro_batches(seed: int, padded: bool) -> None:
    draw = random.Random(seed)
    lens = [draw.randint(1, 40) for _ in range(draw.randint(1, 9))]
    max_tokens = draw.randint(max(lens), 120)
    parts = split_rows(torch.tensor(lens), rows=1, max_tokens=max_tokens, padded=padded)
    assert torch.cat(parts).sort().values.tolist() == list(range(len(lens)))
    assert (len(parts), max(sizes(lens, parts, padded))) == best(lens, max_tokens, padded)


def test_equal_rows_keep_their_order_and_longer_ones_come_first() -> None:
    lens = torch.tensor([5, 9, 5, 9, 5])
    assert [part.tolist() for part in split_rows(lens, rows=8, max_tokens=20)] == [[1, 3], [0, 2, 4]]
    assert [part.tolist() for part in split_rows(lens, rows=3)] == [[1, 3, 0], [2, 4]]


def test_padding_counts_where_rows_are_padded() -> None:
    lens = torch.tensor([9, 5, 5])
    assert len(split_rows(lens, rows=8, max_tokens=19)) == 1
    assert len(split_rows(lens, rows=8, max_tokens=19, padded=True)) == 2
    assert len(split_rows(lens, rows=8, max_tokens=27, padded=True)) == 1


def test_a_row_longer_than_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens is 8: a row has 9 tokens"):
        split_rows(torch.tensor([3, 9]), rows=2, max_tokens=8)
    assert len(split_rows(torch.tensor([3, 8]), rows=2, max_tokens=8)) == 2


def test_rows_of_a_prompt_come_together() -> None:
    lens, group = torch.tensor([9, 2, 5, 7, 4]), torch.tensor([3, 0, 3, 0, 1])
    assert [part.tolist() for part in split_rows(lens, rows=2, group_B=group)] == [[1, 3], [4, 0], [2]]
    assert [part.tolist() for part in split_rows(lens, rows=1, max_tokens=15, group_B=group)] == [[1, 3, 4], [0, 2]]
    with pytest.raises(ValueError, match="max_tokens is 8: a row has 9 tokens"):
        split_rows(lens, rows=1, max_tokens=8, group_B=group)


def test_no_rows_make_no_micro_batches() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert split_rows(none, rows=3) == split_rows(none, rows=3, max_tokens=5) == []


def test_ranks_get_all_rows_once_and_about_as_many_tokens() -> None:
    lens = torch.tensor([3, 90, 20, 50, 70, 40, 60, 10])
    dealt = deal_rows(lens, ranks=2)
    assert torch.cat(dealt).sort().values.tolist() == list(range(8))
    assert [part.tolist() for part in dealt] == [[1, 3, 5, 0], [4, 6, 2, 7]]
    assert [len(part) for part in deal_rows(lens[:1], 2)] == [1, 0]
