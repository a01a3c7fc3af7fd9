"""What tests/interpreter.py makes faster still refuses what Triton's own interpreter refuses."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs the extra triton")

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU kernels are compiled, not interpreted"),
]


@triton.jit
def _sums_kernel(a, b, out, KIND: tl.constexpr):
    at = tl.arange(0, 2)
    x, y = tl.load(a + at), tl.load(b + at)
    if KIND == "add":
        tl.store(out + at, x + y)
    elif KIND == "sub":
        tl.store(out + at, x - y)
    else:
        tl.store(out + at, x * y)


LARGEST, SMALLEST = 2**31 - 1, -(2**31)


@pytest.mark.parametrize(
    ("kind", "x", "y", "exact"),
    [
        ("add", LARGEST, 1, 2**31),
        ("add", SMALLEST, -1, SMALLEST - 1),
        ("sub", LARGEST, -1, 2**31),
        ("sub", SMALLEST, 1, SMALLEST - 1),
        ("mul", 2**16, 2**15, 2**31),
        ("mul", SMALLEST, 2, 2 * SMALLEST),
    ],
)
def test_integers_that_overflow_are_refused(kind: str, x: int, y: int, exact: int) -> None:
    a, b = torch.tensor([3, x], dtype=torch.int32), torch.tensor([2, y], dtype=torch.int32)
    with pytest.raises(InterpreterError, match=f"int32 overflow detected for operation {kind}"):
        _sums_kernel[(1,)](a, b, torch.zeros_like(a), KIND=kind)
    wide = torch.zeros(2, dtype=torch.int64)
    _sums_kernel[(1,)](a.long(), b.long(), wide, KIND=kind)
    assert wide.tolist() == [{"add": 5, "sub": 1, "mul": 6}[kind], exact]


def test_the_largest_and_smallest_integers_are_not_refused() -> None:
    a, b = torch.tensor([LARGEST - 1, SMALLEST + 1], dtype=torch.int32), torch.tensor([1, -1], dtype=torch.int32)
    out = torch.zeros_like(a)
    _sums_kernel[(1,)](a, b, out, KIND="add")
    assert out.tolist() == [LARGEST, SMALLEST]
