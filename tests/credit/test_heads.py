from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rhythm.credit.heads import HeadGroups, sampled_layers, select_heads, turnover

NAN = math.nan


def chosen(mask_Bn: Tensor) -> list[list[int]]:
    """Indices of the selected heads, row by row."""
    assert mask_Bn.dtype == torch.bool
    return [row.nonzero().flatten().tolist() for row in mask_Bn]


@pytest.mark.parametrize(
    ("num_layers", "count", "layers"),
    [
        (36, 5, [12, 15, 18, 21, 24]),  # lo 12, hi 24, steps of 3
        (28, 5, [9, 11, 14, 16, 18]),  # lo 9, hi 18: 9, 11.25, 13.5 → 14 (a half goes up), 15.75, 18
        (24, 5, [8, 10, 12, 14, 16]),
        (4, 5, [1, 2]),  # lo 1, hi 2: 1, 1.25, 1.5 → 2, 1.75, 2
        (3, 5, [1, 2]),
        (2, 5, [0, 1]),  # lo 0, hi 1
        (1, 5, [0]),
        (36, 1, [12]),
        (36, 2, [12, 24]),
        (36, 100, list(range(12, 25))),
    ],
)
def test_sampled_layers(num_layers: int, count: int, layers: list[int]) -> None:
    assert sampled_layers(num_layers, count) == layers


def test_sampled_layers_are_distinct_rising_and_exist() -> None:
    for num_layers in range(1, 100):
        layers = sampled_layers(num_layers)
        assert layers == sorted(set(layers))
        assert num_layers // 3 == layers[0]
        assert layers[-1] == 2 * num_layers // 3 < num_layers


@pytest.mark.parametrize(("arguments", "named"), [((0,), "num_layers"), ((-3,), "num_layers"), ((36, 0), "count")])
def test_sampled_layers_refuses(arguments: tuple[int, ...], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named} is .*at least 1"):
        sampled_layers(*arguments)


def test_select_heads_sorts_by_span() -> None:
    # n = 10, c = ⌊3 + ½⌋ = 3. Ascending spans sit at 3, 7, 0, …, 5, 2, 9.
    span = torch.tensor([[3.0, 9.0, 30.0, 1.0, 8.0, 20.0, 7.0, 2.0, 6.0, 40.0]])
    groups = select_heads(span)
    assert isinstance(groups, HeadGroups)
    assert chosen(groups.local) == [[0, 3, 7]]
    assert chosen(groups.global_) == [[2, 5, 9]]


def test_equal_spans_are_ordered_by_place_in_the_pool() -> None:
    # n = 6, c = ⌊1.8 + ½⌋ = 2. Sorted by (span, place): 1, 3, 0, 2, 4, 5.
    groups = select_heads(torch.tensor([[5.0, 1.0, 5.0, 1.0, 5.0, 5.0]]))
    assert chosen(groups.local) == [[1, 3]]
    assert chosen(groups.global_) == [[4, 5]]
    # All equal, and long enough for an unstable sort to show: the first and the last 60 of 200.
    groups = select_heads(torch.ones(1, 200))
    assert chosen(groups.local) == [list(range(60))]
    assert chosen(groups.global_) == [list(range(140, 200))]


@pytest.mark.parametrize(
    ("n", "quantile", "size"),
    [
        (1, 0.3, 1),
        (2, 0.3, 1),  # ⌊0.6 + ½⌋ = 1
        (1, 0.01, 1),  # max(1, 0)
        (4, 0.3, 1),  # ⌊1.2 + ½⌋
        (5, 0.3, 2),  # ⌊1.5 + ½⌋: a half goes up
        (50, 0.29, 15),  # ⌊14.5 + ½⌋, though 0.29 · 50 is 14.499999999999998
        (5, 0.5, 3),  # ⌊2.5 + ½⌋: the middle head is in both
        (160, 0.3, 48),
    ],
)
def test_group_size(n: int, quantile: float, size: int) -> None:
    groups = select_heads(torch.arange(n, dtype=torch.float32).expand(2, n), quantile)
    assert chosen(groups.local) == [list(range(size))] * 2
    assert chosen(groups.global_) == [list(range(n - size, n))] * 2


def test_undefined_spans_are_never_selected() -> None:
    span = torch.tensor(
        [
            [NAN] * 5,  # no response rows
            [4.0, NAN, 3.0, 2.0, 1.0],  # 4 defined, c = 1
            [NAN, NAN, NAN, NAN, 7.0],  # one defined head is both
        ]
    )
    groups = select_heads(span)
    assert chosen(groups.local) == [[], [4], [4]]
    assert chosen(groups.global_) == [[], [0], [4]]


def test_each_sequence_has_its_own_groups() -> None:
    span = torch.rand(7, 24, generator=torch.Generator().manual_seed(0))
    together = select_heads(span)
    for row in range(7):
        alone = select_heads(span[row : row + 1])
        assert torch.equal(together.local[row], alone.local[0])
        assert torch.equal(together.global_[row], alone.global_[0])
    assert len({tuple(row) for row in chosen(together.local)}) > 1


def test_groups_per_batch_come_from_the_mean_span() -> None:
    # Means over rows 0 and 1: 5, 4, 6, 3. Row 2 has no response; it has no say but gets the groups too.
    span = torch.tensor([[1.0, 2.0, 11.0, 4.0], [9.0, 6.0, 1.0, 2.0], [NAN] * 4])
    groups = select_heads(span, per="batch")
    assert chosen(groups.local) == [[3]] * 3
    assert chosen(groups.global_) == [[2]] * 3
    nothing = select_heads(torch.full((2, 4), NAN), per="batch")
    assert chosen(nothing.local) == chosen(nothing.global_) == [[], []]


def test_no_sequences() -> None:
    for per in ("sequence", "batch"):
        groups = select_heads(torch.empty(0, 4), per=per)
        assert groups.local.shape == groups.global_.shape == (0, 4)


@pytest.mark.parametrize(
    ("span", "options", "named"),
    [
        (torch.ones(4), {}, r"span is .*\[4\]"),
        (torch.ones(1, 2, 3), {}, r"span is .*\[1, 2, 3\]"),
        (torch.ones(3, 0), {}, r"span is .*n ≥ 1"),
        (torch.ones(3, 4, dtype=torch.int64), {}, "span is torch.int64"),
        (torch.ones(3, 4), {"quantile": 0.0}, "quantile is 0.0"),
        (torch.ones(3, 4), {"quantile": 0.51}, "quantile is 0.51"),
        (torch.ones(3, 4), {"quantile": NAN}, "quantile is nan"),
        (torch.ones(3, 4), {"per": "layer"}, "per is 'layer'"),
    ],
)
def test_select_heads_refuses(span: Tensor, options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        select_heads(span, **options)


def test_turnover_by_hand() -> None:
    """Local heads {0, 1, 2} and {1, 2, 3}: 2 of 4 in common; global ones {4} and {5}: none."""

    def groups(local: list[int], global_: list[int]) -> HeadGroups:
        rows = [
            torch.zeros(1, 6, dtype=torch.bool).index_fill(1, torch.tensor(heads), True) for heads in (local, global_)
        ]
        return HeadGroups(*rows)

    assert turnover(groups([0, 1, 2], [4]), groups([1, 2, 3], [5])) == (0.5, 1.0)
    assert turnover(groups([0, 1], [4, 5]), groups([0, 1], [4])) == (0.0, 0.5)
    with pytest.raises(ValueError, match=r"local has shapes \[1, 6\] and \[2, 6\]; both must be \[1, n\]"):
        turnover(groups([0], [1]), HeadGroups(torch.zeros(2, 6).bool(), torch.zeros(2, 6).bool()))
