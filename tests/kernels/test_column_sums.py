"""column_scores with row_weights and reduce="max" in the Triton kernels, against the fp64 reference."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import tensors
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs the extra triton")

from rhythm import attention_statistics, column_scores
from rhythm.kernels.launch import forced, launch
from rhythm.kernels.tile_tables import Tile
from rhythm.ops.backends import in_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy, on rows beyond the end
]
normal = partial(tensors.normal, device=DEVICE)
SINKS = torch.tensor([-1.0, 0.5, 3.0, -torch.inf], device=DEVICE)

# (key lengths, query lengths, query heads, key heads, head size, rows, horizon, form)
SHAPES: list[Any] = [
    ([130], [130], 2, 1, 33, (None, None), (0, None), {}),
    ([100, 7, 0, 70], [100, 7, 0, 70], 4, 2, 16, (3, -2), (2, 60), {"sliding_window": 40}),
    ([90, 50], [40, 50], 4, 4, 16, (None, None), (0, 20), {"sliding_window": 33, "softcap": 3.0, "sinks": SINKS}),
    ([80], [80], 4, 1, 80, (20, None), (10, None), {"softcap": 5.0}),
    ([1, 64], [1, 30], 4, 2, 16, (-20, None), (1, None), {"sinks": SINKS}),
]  # fmt: skip


def row_weights(tokens: int, heads: int | None = None) -> Tensor:
    """Of both signs, every third 0."""
    weights = normal(*((tokens,) if heads is None else (heads, tokens)), seed=5)
    weights[..., ::3] = 0.0
    return weights


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are launched; plain torch in blocks of rows is refused."""
    names: list[str] = []

    def recorded(kernel: Any, programs: int, **arguments: Any) -> None:
        names.append(kernel.fn.__name__)
        launch(kernel, programs, **arguments)

    def refuse(*arguments: object) -> None:
        raise AssertionError("plain torch computes the columns")

    for module in ("row_sweep", "bands", "column_sums"):
        monkeypatch.setattr(sys.modules[f"rhythm.kernels.{module}"], "launch", recorded)
    monkeypatch.setattr(in_blocks, "columns", refuse)
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_accuracy(index: int, dtype: torch.dtype, assert_accurate: Callable[..., None]) -> None:
    keys, rows, heads, key_heads, size, chosen, horizon, form = SHAPES[index]
    q, k = (normal(sum(n), h, size, seed=h, dtype=dtype) for n, h in ((rows, heads), (keys, key_heads)))
    cu_rows, cu_keys = (torch.tensor([0, *n]).cumsum(0).to(DEVICE, torch.int32) for n in (rows, keys))
    sequences = {"cu_seqlens": cu_rows, "cu_seqlens_k": cu_keys}
    options = {"rows": chosen, "horizon": horizon} | sequences | form
    lse = attention_statistics(q.double(), k.double(), backend="reference", **sequences, **form).lse.float()
    shared, per_head = row_weights(sum(keys)), row_weights(sum(rows), heads)
    for reduce, weights in (("max", None), ("max", per_head), ("sum", per_head), ("mean", shared.abs())):
        asked = options | {"reduce": reduce, "row_weights": weights}
        exact = column_scores(q.double(), k.double(), backend="reference", **asked)
        plain = column_scores(q, k, backend="reference", **asked)
        for given in (None, lse):
            actual = column_scores(q, k, lse=given, backend="triton", **asked)
            assert_accurate("fai", dtype, actual, exact, plain)


def test_which_kernels_run(kernels: list[str]) -> None:
    q, k = normal(40, 2, 16), normal(40, 1, 16, seed=1)
    for options in ({"reduce": "max"}, {"row_weights": row_weights(40)}):
        column_scores(q, k, backend="triton", **options)
        assert kernels == ["row_sweep_kernel", "column_sums_kernel"]
        kernels.clear()
        column_scores(q, k, lse=torch.zeros(2, 40, device=DEVICE), backend="triton", **options)
        assert kernels == ["column_sums_kernel"]
        kernels.clear()


def test_weights_of_one_are_no_weights() -> None:
    q, k = normal(70, 2, 16), normal(70, 1, 16, seed=1)
    for reduce in ("sum", "mean", "max"):
        options = {"reduce": reduce, "horizon": (2, 40), "backend": "triton"}
        weighted = column_scores(q, k, row_weights=torch.ones(70, device=DEVICE), **options)
        torch.testing.assert_close(weighted, column_scores(q, k, **options), rtol=3e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_scores_of_thousands(reduce: str, weighted: bool) -> None:
    """Exponents whose fp32 has no room for the digits of a weight: all rows go by the row sweep's two parts."""
    q, k = normal(100, 2, 16).round(), (2 * normal(100, 1, 16, seed=1)).round()  # products are exact
    q[..., 0] = k[..., 0] = 128
    weights = row_weights(100) if weighted else torch.ones(100, device=DEVICE)
    options = {"reduce": reduce, "row_weights": weights if weighted or reduce == "sum" else None}
    exact = column_scores(q.double(), k.double(), backend="reference", **options)
    actual = column_scores(q, k, backend="triton", **options)
    torch.testing.assert_close(actual.double(), exact, rtol=2e-5, atol=1e-6, equal_nan=True)


def test_what_is_undefined_stays_where_it_touches() -> None:
    """A NaN weight, an undefined row, and either under a weight of 0; with and without masks around it."""
    q, k = normal(90, 2, 16), normal(90, 2, 16, seed=1)
    weights, bad = torch.ones(90, device=DEVICE), q.clone()
    weights[50] = math.nan
    bad[60, 0, 3] = math.nan
    for reduce in ("sum", "max"):
        for last in (7, None):
            options: dict[str, Any] = {"reduce": reduce, "horizon": (0, last), "backend": "triton"}
            got = column_scores(bad, k, row_weights=weights, **options)
            touched = torch.zeros(2, 90, dtype=torch.bool, device=DEVICE)
            touched[:, 0 if last is None else 43 : 51] = True
            touched[0, 0 if last is None else 53 : 61] = True
            assert torch.equal(got.isnan(), touched), (reduce, last)
            without = weights.clone()
            without[[50, 60]] = 0.0
            assert column_scores(bad, k, row_weights=without, **options).isfinite().all(), (reduce, last)
    undefined = column_scores(bad, k, reduce="max", horizon=(0, 7), backend="triton").isnan()
    assert torch.equal(undefined[0].nonzero().flatten(), torch.arange(53, 61, device=DEVICE))
    assert not undefined[1].any()


def test_a_key_without_weight_is_reached_all_the_same() -> None:
    """Rows give a key at −inf the weight 0, which is the largest that it gets; a key that no row reaches has NaN."""
    q, k = torch.ones(40, 1, 16, device=DEVICE), normal(40, 1, 16)
    k[5] = -math.inf
    for weights in (None, torch.ones(40, device=DEVICE)):
        options: dict[str, Any] = {"reduce": "max", "rows": (10, None), "horizon": (1, 20), "row_weights": weights}
        got = column_scores(q, k, backend="triton", **options)
        assert got[0, 5] == 0
        assert got.isnan()[0].nonzero().flatten().tolist() == [39]


def test_other_tiles_and_reruns() -> None:
    """16 keys per program, rows in tiles of 64: no result belongs to one tile; and a rerun changes no bit."""
    q, k = normal(150, 2, 16, dtype=torch.bfloat16), normal(150, 1, 16, seed=1, dtype=torch.bfloat16)
    for options in (
        {"reduce": "max"},
        {"reduce": "max", "row_weights": row_weights(150)},
        {"row_weights": row_weights(150)},
    ):
        asked: dict[str, Any] = options | {"horizon": (3, 100)}
        first, again = (column_scores(q, k, backend="triton", **asked) for _ in range(2))
        tensors.assert_same(again, first)
        with forced(lambda key: [Tile(64, 16, 1, 1)]):
            tensors.assert_same(column_scores(q, k, backend="triton", **asked), first, rtol=1e-5, atol=1e-6)


def test_nothing_to_do() -> None:
    q, k = normal(12, 4, 16), normal(12, 2, 16, seed=1)
    assert column_scores(q[:0], k[:0], reduce="max", backend="triton").shape == (4, 0)
    empty = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    bounds = torch.tensor([0, 12], dtype=torch.int32, device=DEVICE)
    options = {"cu_seqlens": empty, "cu_seqlens_k": bounds, "backend": "triton"}
    assert column_scores(q[:0], k, reduce="max", **options).isnan().all()
    assert (column_scores(q[:0], k, row_weights=torch.ones(12, device=DEVICE), **options) == 0).all()
