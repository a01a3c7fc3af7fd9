"""Statistics of the parts of sequences that ranks of a context parallel group have: together those of the whole ones.

The ranks run one after the other here; on real ones: tests/engines/megatron.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from rhythm.ops.statistics import attention_statistics
from rhythm.tap.context_parallel import Shard, shard_places
from rhythm.tap.padding import PaddedBatch

LENS, PROMPTS = [63, 1, 30, 17, 0, 111, 12], [5, 0, 11, 17, 0, 90, 11]
HEADS, KEY_HEADS, D = 4, 2, 8
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 7},
    "softcap and sinks": {"softcap": 3.0, "sinks": torch.linspace(-1, 1, HEADS)},
    "to the end": {"horizon": (3, None)},
    "no span": {"span": False},
}


def tensors(T: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(2)
    q, k = (torch.randn(T, heads, D, generator=random) for heads in (HEADS, KEY_HEADS))
    return 2 * q, k


def packed(size: int, tail: int = 0) -> tuple[PaddedBatch, list[int]]:
    """Sequences in rows of multiples of 2·size positions, one after the other, and `tail` more rows of padding."""
    rows = [length + -length % (2 * size) for length in LENS] + [2 * size] * tail
    first = [*accumulate(rows, initial=0)][: len(LENS)]
    return PaddedBatch.from_lengths(LENS, PROMPTS, first, sum(rows), True, torch.device("cpu")), rows


def padded(size: int, left: bool) -> tuple[PaddedBatch, list[int]]:
    """Sequences in rows of the same length."""
    width = max(LENS) + -max(LENS) % (2 * size)
    first = [width - length for length in LENS] if left else None
    batch = PaddedBatch.from_lengths(LENS, PROMPTS, first, width, False, torch.device("cpu"))
    return batch, [width] * len(LENS)


BATCHES = {
    "packed": packed,
    "with a tail": lambda size: packed(size, 3),
    "left": lambda size: padded(size, True),
    "right": lambda size: padded(size, False),
}


def sums_of_ranks(
    batch: PaddedBatch, rows: list[int], size: int, q: Tensor, k: Tensor, lse: Any, **options: Any
) -> Any:
    shards = [shard_places(rows, size, rank) for rank in range(size)]
    whole_k = k[torch.cat(shards)]  # in the order of the ranks
    parts = []
    for rank, places in enumerate(shards):
        given = None if lse is None else lse[:, places]
        shard = Shard(batch, rows, size, rank)
        part = shard.statistics(q[places], whole_k[shard.key_places], lse_Ht=given, **options)
        parts.append([x for x in part if x is not None])
    return [sum(of_ranks) for of_ranks in zip(*parts, strict=True)]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("kind", "form"), [*((kind, "plain") for kind in BATCHES), *(("packed", form) for form in FORMS if form != "plain")]
)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_parts_add_up_to_the_whole(size: int, kind: str, form: str, backend: str) -> None:
    batch, rows = BATCHES[kind](size)
    q, k = tensors(sum(rows))
    options = {"window": 4, "horizon": (2, 9), "backend": backend} | FORMS[form]
    q_N, k_N = (batch.packed(x.view(*batch.real.shape, *x.shape[1:])) for x in (q, k))
    whole = attention_statistics(q_N, k_N, cu_seqlens=batch.cu_seqlens, prompt_lens=batch.prompt_lens, **options)
    expected = [x for x in (whole.span, whole.waad, whole.fai) if x is not None]
    lse_T = torch.zeros(HEADS, sum(rows))
    lse_T[:, batch.real.flatten()] = whole.lse
    for lse in [None, lse_T]:
        actual = sums_of_ranks(batch, rows, size, q, k, lse, **options)
        assert len(actual) == len(expected)
        for value, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=0, atol=2e-5, equal_nan=True)
    assert whole.waad.isfinite().any()


def test_ranks_have_a_chunk_of_each_end() -> None:
    assert [shard_places([8, 0, 4], 2, rank).tolist() for rank in (0, 1)] == [[0, 1, 6, 7, 8, 11], [2, 3, 4, 5, 9, 10]]


def test_a_nan_reaches_the_rows_and_keys_that_it_reaches_in_the_whole() -> None:
    batch, rows = packed(2)
    q, k = tensors(sum(rows))
    q[40] = torch.nan
    options = {"window": 4, "horizon": (2, 9), "backend": "reference"}
    whole = attention_statistics(
        batch.packed(q[None]),
        batch.packed(k[None]),
        cu_seqlens=batch.cu_seqlens,
        prompt_lens=batch.prompt_lens,
        **options,
    )
    _, waad, fai = sums_of_ranks(batch, rows, 2, q, k, None, **options)
    assert whole.fai[:, :63].isnan().any(dim=0).sum() > 2
    assert torch.equal(waad.isnan(), whole.waad.isnan())
    assert torch.equal(fai.isnan(), whole.fai.isnan())


def test_rows_must_fit() -> None:
    batch, rows = packed(2)
    with pytest.raises(ValueError, match="a row of 64 positions can't be cut into 6 chunks for 3 ranks"):
        Shard(batch, rows, 3, 0)
    with pytest.raises(ValueError, match="sequence 2 of 30 tokens is not within its row of 28 positions"):
        Shard(batch, [*rows[:2], 28, *rows[3:]], 2, 0)
    with pytest.raises(ValueError, match="there are 2 rows for 7 sequences"):
        Shard(batch, rows[:2], 2, 0)
