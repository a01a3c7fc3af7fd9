"""Sets of heads over several responses, against hand-computed values."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from rhythm.analysis.heads import summarize_heads
from rhythm.analysis.response import Head, ResponseHeads
from rhythm.analysis.results import Heads

nan = float("nan")


def heads(
    local: tuple[Head, ...] = (),
    global_: tuple[Head, ...] = (),
    receiver: tuple[Head, ...] = (),
    span: tuple[float, ...] = (1, 2, 3, 4),
) -> ResponseHeads:
    """Two layers of four heads, the second of which is the pool."""
    level = ((nan,) * 4, (0.0, 1.0, 2.0, 3.0))
    return ResponseHeads(((nan,) * 4, span), level, level, local, global_, receiver, (), 1)


def summary(*of_responses: tuple[int, ResponseHeads]) -> Heads:
    return summarize_heads(iter(of_responses), pool_layers=(1,), resamples=100, seed=0)


A, B, C, D = ((1, head) for head in range(4))


def test_stability_is_of_different_problems() -> None:
    result = summary((1, heads(local=(A, B))), (2, heads(local=(A, B))), (3, heads(local=(B, C))))
    # Pairs share two, one and one head of two.
    assert result.set("local").stability == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert result.set("local").stability_random == 0.5
    assert result.set("local").chosen[1] == pytest.approx((2 / 3, 1, 1 / 3, 0), rel=1e-6)
    assert all(math.isnan(share) for share in result.set("local").chosen[0])
    # The first two are of one problem: only their pairs with the third count.
    result = summary((1, heads(local=(A, B))), (1, heads(local=(A, B))), (3, heads(local=(B, C))))
    assert result.set("local").stability == pytest.approx(0.5)
    assert math.isnan(summary((1, heads(local=(A,))), (1, heads(local=(A,)))).set("local").stability)


def test_overlap_of_receivers_with_global_heads() -> None:
    result = summary(
        (1, heads(global_=(C, D), receiver=(C, D))),
        (2, heads(global_=(C, D), receiver=(A, D))),
        (3, heads(global_=(C, D), receiver=())),
    )
    receiver, sentence = result.overlaps
    assert (receiver.share, receiver.random, receiver.pooled) == (0.75, 0.5, 1)
    assert receiver.interval.low <= 0.75 <= receiver.interval.high
    assert result.set("receiver").responses == 2
    assert math.isnan(sentence.share)
    assert result.set("receiver_sentence").responses == 0


def test_results_of_earlier_versions_lack_the_masses() -> None:
    old, new = heads(), replace(heads(), sink_mass=((0.1,) * 4, (0.2, 0.4, nan, 0.8)))
    assert summary((1, replace(new, sink_mass=((0.3,) * 4,) * 2)), (2, new), (3, old)).sink_mass[1] == pytest.approx(
        (0.25, 0.35, 0.3, 0.55)
    )
    assert all(math.isnan(x) for row in summary((1, old)).entropy for x in row)


def test_means_are_over_the_defined() -> None:
    result = summary(
        (1, heads(local=(A,), global_=(D,), span=(1, 2, nan, 4))),
        (2, heads(local=(A,), global_=(D,), span=(5, 1, nan, 6))),
    )
    assert result.span[1][:2] == (3, 1.5)
    assert math.isnan(result.span[1][2])
    # By the means B looks back the least, though no response chose it.
    assert result.set("local").heads == (B,)
    assert result.set("global").heads == (D,)


def test_no_responses() -> None:
    with pytest.raises(ValueError, match="responses is empty"):
        summary()
