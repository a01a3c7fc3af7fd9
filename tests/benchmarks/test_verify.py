"""The correctness check: correct ops pass, and no wrong one does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.implementations import Outputs
from benchmarks.registry import REGISTRY, Benchmark, select
from benchmarks.shapes import Inputs, Shape, make_inputs
from benchmarks.verify import WrongResultError, relative_error, verify

SHAPE = Shape(150, prompt=13, query_heads=4, key_heads=2, head_size=32)


def changed(name: str, result: str, change: Callable[[Tensor], Tensor]) -> Benchmark:
    """A benchmark of which one result is changed."""
    benchmark = REGISTRY[name]

    def make(inputs: Inputs) -> Callable[[], Outputs]:
        run = benchmark.make(inputs)

        def wrong() -> Outputs:
            outputs = run()
            return outputs | {result: change(outputs[result].clone())}

        return wrong

    return replace(benchmark, make=make)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_op_passes(dtype: torch.dtype) -> None:
    checked = verify(select(None), make_inputs(SHAPE, dtype))
    results = {(result.op, result.result) for result in checked}
    for op in ("eager", "blocked_64", "blocked_128", "blocked_256", "statistics", "with_output"):
        assert {(op, name) for name in ("span", "waad", "fai", "lse")} <= results
    assert {("sdpa", "out"), ("with_output", "out"), ("bands", "waad"), ("bands", "fai")} <= results
    assert any(result.error > 0 for result in checked)


@pytest.mark.parametrize(
    ("op", "result", "change"),
    [
        ("statistics", "span", lambda x: x * 1.0001),
        ("statistics", "waad", lambda x: x.index_fill_(1, torch.tensor([100]), 5.0)),
        ("statistics", "fai", torch.nan_to_num),
        ("with_output", "lse", lambda x: x.roll(1, dims=0)),
        ("with_output", "out", lambda x: x.index_fill_(0, torch.tensor([149]), torch.nan)),
        ("bands", "waad", lambda x: x.index_fill_(1, torch.tensor([13]), torch.nan)),
        ("sdpa", "out", lambda x: x + 1e-4),
        ("blocked_64", "fai", lambda x: x[:, :-1]),
    ],
)
def test_a_wrong_result_ends_the_run(op: str, result: str, change: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(WrongResultError):
        verify([REGISTRY["eager"], changed(op, result, change)], make_inputs(SHAPE, torch.float32))


def test_the_refusal_names_the_op_and_the_result() -> None:
    wrong = changed("bands", "fai", lambda x: 2 * x)
    with pytest.raises(WrongResultError, match=r"at T=150.*bfloat16:\nbands: fai has error 1\.0e\+00, allowed is"):
        verify([wrong], make_inputs(SHAPE, torch.bfloat16))


def test_relative_error_by_hand() -> None:
    nan, inf = torch.nan, float("inf")
    expected = torch.tensor([1.0, -4.0, nan], dtype=torch.float64)
    assert relative_error(torch.tensor([1.0, -3.0, nan]), expected) == pytest.approx(0.25)
    assert relative_error(torch.tensor([1.0, -4.0, 0.0]), expected) == inf
    assert relative_error(torch.tensor([nan, -4.0, nan]), expected) == inf
    assert relative_error(torch.tensor([nan]), torch.tensor([nan]).double()) == 0.0
