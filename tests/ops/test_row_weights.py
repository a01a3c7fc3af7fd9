"""column_scores with reduce="max" and row_weights against the definition, element by element, in every form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from forms import FORMS, HEADS, HORIZON, KEYS, Packed, converted, maps, packed
from tensors import TRITON, assert_same, normal
from torch import Tensor

from rhythm import _C, attention_statistics, column_scores
from rhythm.ops.backends import in_blocks

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, in Triton's interpreter
ROWS = ((None, None), (2, -1), (-12, None))


def row_weights(tokens: int, heads: int | None) -> Tensor:
    """Of both signs, every third 0."""
    weights = normal(*((tokens,) if heads is None else (heads, tokens)), seed=5)
    weights[..., ::3] = 0.0
    return weights


def expected(
    attention: list[Tensor], case: Packed, begin: int | None, end: int | None, reduce: str, weights: Tensor
) -> Tensor:
    """fp64 [H, T]; attention [H, N, N] of each sequence; weights [H, T] on the token axis."""
    total, start = torch.full((HEADS, sum(KEYS)), 0.0 if reduce == "sum" else math.nan, dtype=torch.float64), 0
    row_weight = weights.tolist()
    for of_heads, rows in zip(attention, case.rows, strict=True):
        n, a = of_heads.shape[-1], of_heads.tolist()
        chosen = [t for t in range(n)[slice(begin, end)] if t >= n - rows]
        for h in range(HEADS):
            for s in range(n):
                reached = [t for t in chosen if HORIZON[0] <= t - s <= HORIZON[1] and row_weight[h][start + t]]
                w = [row_weight[h][start + t] for t in reached]
                terms = [x * a[h][t][s] for x, t in zip(w, reached, strict=True)]
                if terms:
                    total[h, start + s] = {
                        "sum": sum(terms), "mean": sum(terms) / sum(w), "max": max(terms),
                    }[reduce]  # fmt: skip
        start += n
    return total


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("fewer", [False, True], ids=["as many rows", "fewer rows"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_is_the_definition(form: dict[str, Any], fewer: bool, backend: str) -> None:
    case = packed(fewer)
    (q, k, _), options = converted(case, form, torch.float32)
    attention, lse64 = maps(case, form)
    lse = lse64.float()
    here = {"horizon": HORIZON, "backend": backend} | options
    for heads in (None, HEADS):
        weights = row_weights(sum(KEYS), heads)
        wanted_weights = weights.expand(HEADS, sum(KEYS))
        for rows in ROWS:
            for reduce, given, of_rows in (
                ("max", None, torch.ones_like(wanted_weights)),
                ("max", weights, wanted_weights),
                ("sum", weights, wanted_weights),
                ("mean", weights.abs(), wanted_weights.abs()),
            ):
                wanted = expected(attention, case, *rows, reduce, of_rows)
                for given_lse in (None, lse):
                    actual = column_scores(q, k, reduce=reduce, rows=rows, row_weights=given, lse=given_lse, **here)
                    torch.testing.assert_close(
                        actual.double(), wanted, rtol=2e-5, atol=2e-5, equal_nan=True,
                        msg=lambda text, where=(reduce, rows, heads, given_lse is None): f"{where}: {text}",
                    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_many_tiles(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = 2 * normal(1100, 2, 32, dtype=dtype), normal(1100, 1, 32, seed=1, dtype=dtype)
    weights = row_weights(1100, 2)
    for horizon in ((0, None), (3, 700), (1, 20)):
        for reduce in ("sum", "max"):
            options = {"reduce": reduce, "row_weights": weights, "horizon": horizon}
            wanted = column_scores(q.double(), k.double(), backend="reference", **options)
            for isa in _C.available_isas():
                monkeypatch.setenv("RHYTHM_CPU_ISA", isa)
                actual = column_scores(q, k, backend="cpu", **options)
                torch.testing.assert_close(actual.double(), wanted, rtol=2e-4, atol=2e-5, equal_nan=True, msg=isa)


@pytest.mark.parametrize("backend", ["cpu", "reference", TRITON])
def test_groups_batches_and_blocks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = normal(2, 40, 4, 16), normal(2, 40, 2, 16, seed=1)
    weights = row_weights(40, 4).expand(2, 4, 40).clone()
    weights[1] *= 2
    ranges = torch.tensor([[4, 11], [0, 40]])
    monkeypatch.setattr(in_blocks, "SCORES_AT_ONCE", 1000)  # a few rows at a time
    for reduce in ("sum", "max"):
        options = {"reduce": reduce, "rows": ranges, "backend": backend}
        heads = column_scores(q, k, row_weights=weights, **options)
        groups = column_scores(q, k, row_weights=weights, per="group", **options)
        grouped = heads.unflatten(1, (2, 2))
        torch.testing.assert_close(groups, grouped.sum(2) if reduce == "sum" else grouped.amax(2), equal_nan=True)
        for b in range(2):
            one = column_scores(
                q[b], k[b], row_weights=weights[b], reduce=reduce, rows=tuple(ranges[b].tolist()), backend="reference"
            )
            torch.testing.assert_close(heads[b], one, rtol=1e-5, atol=1e-6, equal_nan=True)
    shared = column_scores(q, k, row_weights=weights[:, 0], backend=backend)
    assert_same(shared[:, 0], column_scores(q, k, row_weights=weights, backend=backend)[:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_of_fewer_rows(backend: str) -> None:
    """Weights of q's rows are those of the last tokens."""
    q, k, weights = normal(2, 8, 4, 16), normal(2, 33, 2, 16, seed=1), row_weights(8, None).expand(2, 8)
    of_tokens = torch.nn.functional.pad(weights, (25, 0), value=math.nan)
    for reduce in ("sum", "mean", "max"):
        rows = column_scores(q, k, reduce=reduce, row_weights=weights, backend=backend)
        assert rows.isfinite().any()
        assert_same(rows, column_scores(q, k, reduce=reduce, row_weights=of_tokens, backend=backend))


def test_golden() -> None:
    """With q = 0 row t gives each of its t + 1 keys 1 / (t + 1)."""
    q, k = torch.zeros(4, 1, 8), normal(4, 1, 8)
    largest = column_scores(q, k, reduce="max")[0]
    torch.testing.assert_close(largest, torch.tensor([1, 1 / 2, 1 / 3, 1 / 4]))
    weights = torch.tensor([0.0, 2.0, 0.0, -4.0])
    torch.testing.assert_close(column_scores(q, k, row_weights=weights)[0], torch.tensor([0.0, 0.0, -1.0, -1.0]))
    mean = column_scores(q, k, row_weights=weights.abs(), reduce="mean")[0]
    torch.testing.assert_close(mean, torch.tensor([2 / 6, 2 / 6, 1 / 4, 1 / 4]))
    late = column_scores(q, k, reduce="max", rows=(0, 2))[0]
    torch.testing.assert_close(late, torch.tensor([1, 1 / 2, math.nan, math.nan]), equal_nan=True)


@pytest.mark.parametrize("isa", _C.available_isas())
def test_what_is_undefined_stays_where_it_touches(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN weight, an undefined row, and either under a weight of 0."""
    monkeypatch.setenv("RHYTHM_CPU_ISA", isa)
    q, k = normal(90, 2, 16), normal(90, 2, 16, seed=1)
    weights = torch.ones(90)
    weights[50] = math.nan
    bad = q.clone()
    bad[60, 0, 3] = math.nan
    near = torch.zeros(2, 90, dtype=torch.bool)
    for reduce in ("sum", "mean", "max"):
        for backend in ("cpu", "reference"):
            got = column_scores(q, k, reduce=reduce, row_weights=weights, horizon=(0, 7), backend=backend)
            touched = near.clone()
            touched[:, 43:51] = True
            assert torch.equal(got.isnan(), touched), (reduce, backend)
            undefined = column_scores(bad, k, reduce=reduce, row_weights=weights, horizon=(0, 7), backend=backend)
            touched[0, 53:61] = True
            assert torch.equal(undefined.isnan(), touched), (reduce, backend)
            without = weights.clone()
            without[[50, 60]] = 0.0
            clean = column_scores(bad, k, reduce=reduce, row_weights=without, horizon=(0, 7), backend=backend)
            assert clean.isfinite().all(), (reduce, backend)


def test_weights_of_one_change_no_bit() -> None:
    q, k = normal(300, 4, 16), normal(300, 2, 16, seed=1)
    lse = attention_statistics(q, k).lse
    ones = torch.ones(300)
    for given in (None, lse):
        weighted = column_scores(q, k, reduce="mean", row_weights=ones, lse=given, horizon=(2, 40))
        plain = column_scores(q, k, reduce="mean", lse=given, horizon=(2, 40))
        torch.testing.assert_close(weighted, plain, rtol=2e-7, atol=0, equal_nan=True)


def test_compiled_without_a_graph_break() -> None:
    q, k, weights = normal(2, 24, 4, 8), normal(2, 24, 2, 8, seed=2), row_weights(24, None).expand(2, 24)

    def call(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
        return column_scores(q * 2, k, rows=(3, -2), reduce="max", row_weights=weights).nan_to_num() + 1

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, weights)
    assert_same(compiled, call(q, k, weights))
