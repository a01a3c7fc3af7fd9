from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rhythm.credit.heads import HeadGroups, select_heads
from rhythm.credit.signals import RhythmSignals, aggregate

NAN = math.nan


def groups(local: list[list[int]], global_: list[list[int]]) -> HeadGroups:
    return HeadGroups(torch.tensor(local).bool(), torch.tensor(global_).bool())


def assert_equal(actual: Tensor, expected: list[list[float]]) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


def test_means_over_each_sequence_own_heads() -> None:
    waad = torch.tensor([[[9.0, 2.0, 4.0], [9.0, 4.0, 8.0], [9.0, 64.0, 64.0]], [[1.0, 2.0, 3.0]] * 3])
    waad[1, 1] = 100.0
    fai = waad / 2
    signals = aggregate(
        waad,
        fai,
        torch.zeros(2, 3),
        groups([[1, 1, 0], [1, 0, 0]], [[0, 0, 1], [0, 1, 1]]),
        torch.tensor([[0, 1, 1], [1, 1, 0]]).bool(),
    )
    assert_equal(signals.waad, [[NAN, 3.0, 6.0], [1.0, 2.0, NAN]])
    # Row 1: (100 + 1)/4 and (100 + 2)/4.
    assert_equal(signals.fai, [[NAN, 32.0, 32.0], [25.25, 25.5, NAN]])
    assert signals.entropy is None


def test_fixed_groups_hold_for_every_sequence() -> None:
    generator = torch.Generator().manual_seed(0)
    waad, fai = torch.rand(2, 3, 4, 5, generator=generator)
    mask, span = torch.ones(3, 5, dtype=torch.bool), torch.zeros(3, 4)
    one = groups([[1, 0, 1, 0]], [[0, 0, 0, 1]])
    per_row = groups([[1, 0, 1, 0]] * 3, [[0, 0, 0, 1]] * 3)
    fixed, own = aggregate(waad, fai, span, one, mask), aggregate(waad, fai, span, per_row, mask)
    assert torch.equal(fixed.waad, own.waad)
    assert torch.equal(fixed.waad, (waad[:, 0] + waad[:, 2]) / 2)
    assert torch.equal(fixed.fai, fai[:, 3])
    assert fixed.groups is one


def test_undefined_values_stay_where_they_are() -> None:
    waad = torch.ones(1, 3, 4)
    waad[0, 2] = NAN  # not a local head: no say
    waad[0, 0, 1] = NAN  # a local head: undefined there, and only there
    fai = torch.ones(1, 3, 4)
    fai[0, 0] = math.inf  # not a global head
    fai[0, :, 3] = NAN  # the horizon's tail
    signals = aggregate(
        waad, fai, torch.zeros(1, 3), groups([[1, 1, 0]], [[0, 0, 1]]), torch.ones(1, 4, dtype=torch.bool)
    )
    assert_equal(signals.waad, [[1.0, NAN, 1.0, 1.0]])
    assert_equal(signals.fai, [[1.0, 1.0, 1.0, NAN]])


def test_a_sequence_without_response_is_undefined_throughout() -> None:
    span = torch.tensor([[NAN, NAN], [1.0, 2.0]])
    statistics = torch.ones(2, 2, 3)
    mask = torch.tensor([[0, 0, 0], [0, 1, 1]]).bool()
    signals = aggregate(statistics, statistics, span, select_heads(span), mask, torch.ones(2, 3))
    assert signals.entropy is not None
    for signal in (signals.waad, signals.fai, signals.entropy):
        assert_equal(signal, [[NAN, NAN, NAN], [NAN, 1.0, 1.0]])
    # Even inside the response, an empty group has no mean.
    empty = groups([[0, 0]] * 2, [[0, 0]] * 2)
    assert aggregate(statistics, statistics, span, empty, mask).waad.isnan().all()


def test_results_are_detached_fp32_and_masked() -> None:
    waad = torch.ones(1, 2, 3, dtype=torch.bfloat16, requires_grad=True)
    fai = torch.ones(1, 2, 3, dtype=torch.float64, requires_grad=True)
    span = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    entropy = torch.tensor([[0.0, 0.5, 0.25]], requires_grad=True)
    signals = aggregate(waad, fai, span, select_heads(span), torch.tensor([[0, 1, 1]]), entropy)
    assert signals.entropy is not None
    for tensor in (signals.waad, signals.fai, signals.entropy, signals.span):
        assert tensor.dtype == torch.float32
        assert not tensor.requires_grad
    assert_equal(signals.entropy, [[NAN, 0.5, 0.25]])
    assert_equal(signals.span, [[1.0, 2.0]])


@pytest.mark.parametrize("n", [1, 2, 7, 20, 160])
def test_padding_and_company_do_not_change_a_bit(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    waad, fai = torch.randn(2, 5, n, 67, generator=generator)
    group = HeadGroups(torch.rand(5, n, generator=generator) < 0.6, torch.rand(5, n, generator=generator) < 0.6)
    group.local[:, 0] = group.global_[:, -1] = True
    together = aggregate(waad, fai, torch.zeros(5, n), group, torch.ones(5, 67, dtype=torch.bool))
    # Against fp64: the order of addition is free, the value is not.
    exact = (waad.double() * group.local[..., None]).sum(1) / group.local.sum(1, keepdim=True)
    torch.testing.assert_close(together.waad.double(), exact, rtol=1e-5, atol=1e-6)
    for row in range(5):
        for start, end in ((0, 1), (0, 31), (13, 67)):
            part = (slice(row, row + 1), slice(None), slice(start, end))
            own = HeadGroups(group.local[row : row + 1], group.global_[row : row + 1])
            mask = torch.ones(1, end - start, dtype=torch.bool)
            alone = aggregate(waad[part].contiguous(), fai[part].contiguous(), torch.zeros(1, n), own, mask)
            assert torch.equal(alone.waad[0], together.waad[row, start:end])
            assert torch.equal(alone.fai[0], together.fai[row, start:end])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"waad_BnT": torch.ones(2, 5)}, r"waad has shape \[2, 5\]; it must be \[B, n, T\]"),
        ({"fai_BnT": torch.ones(2, 3, 4)}, r"fai has shape \[2, 3, 4\]; it must be \[2, 3, 5\]"),
        ({"span_Bn": torch.ones(2, 4)}, "span has shape"),
        ({"response_mask_BT": torch.ones(2, 6)}, "response_mask has shape"),
        ({"entropy_BT": torch.ones(1, 5)}, "entropy has shape"),
        ({"groups": groups([[1, 0]] * 2, [[1, 0, 0]] * 2)}, "groups.local has shape"),
        ({"groups": groups([[1, 0, 0]], [[1, 0, 0]] * 3)}, "groups.global_ has shape"),
    ],
)
def test_refuses(change: dict[str, object], named: str) -> None:
    arguments: dict[str, object] = {
        "waad_BnT": torch.ones(2, 3, 5),
        "fai_BnT": torch.ones(2, 3, 5),
        "span_Bn": torch.ones(2, 3),
        "groups": groups([[1, 0, 0]] * 2, [[0, 0, 1]] * 2),
        "response_mask_BT": torch.ones(2, 5),
    }
    aggregate(**arguments)
    with pytest.raises(ValueError, match=named):
        aggregate(**arguments | change)


def test_cat_joins_rows_in_order_and_gives_each_row_its_heads() -> None:
    def part(rows: int, value: float, groups: HeadGroups) -> RhythmSignals:
        BT = torch.full((rows, 3), value)
        return RhythmSignals(waad=BT, fai=-BT, entropy=BT + 1, span=torch.full((rows, 2), value), groups=groups)

    one, other = torch.tensor([[True, False]]), torch.tensor([[False, True]])
    shared = HeadGroups(local=one, global_=other)  # of one row, for all of the part's
    own = HeadGroups(local=other, global_=one)
    joined = RhythmSignals.cat([part(2, 1.0, shared), part(1, 5.0, own)])
    assert joined.waad[:, 0].tolist() == [1, 1, 5]
    assert joined.fai.equal(-joined.waad)
    assert joined.entropy is not None
    assert joined.entropy.equal(joined.waad + 1)
    assert joined.span[:, 1].tolist() == [1, 1, 5]
    assert joined.groups.local.tolist() == [[True, False], [True, False], [False, True]]
    assert joined.groups.global_.tolist() == [[False, True], [False, True], [True, False]]
    without = replace(part(2, 1.0, shared), entropy=None)
    assert RhythmSignals.cat([without, without]).entropy is None
    with pytest.raises(ValueError, match=r"parts: must be at least one, .* got T=3, n=2, entropy=yes; T=3, .*=no"):
        RhythmSignals.cat([part(2, 1.0, shared), without])
    with pytest.raises(ValueError, match=r"parts: must be at least one, .* got none"):
        RhythmSignals.cat([])
