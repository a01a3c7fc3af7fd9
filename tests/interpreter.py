"""Triton's interpreter without what it does again and again: the kernels' tests take less than a third of the time.

What it computes and refuses is the same. tests/kernels/test_interpreter.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def make_faster() -> None:
    _swap_once_a_launch()
    TritonSemantic.binary_op_sanitize_overflow_impl = _refuse_overflow
    interpreter._get_np_dtype = _scalars_remembered(interpreter._get_np_dtype)


def _swap_once_a_launch() -> None:
    """The interpreter swaps the functions of `tl` for its own at every launch and again, without need, at every call
    of a device function.
    """
    swap, swapped = interpreter._patch_lang, set()

    def once_a_launch(function: Callable[..., object]) -> Any:
        if function in swapped:
            return None  # only a launch wants the scope
        swapped.add(function)
        scope = swap(function)
        restore = scope.restore

        def end() -> None:  # of the launch
            swapped.clear()
            restore()

        scope.restore = end
        return scope

    interpreter._patch_lang = once_a_launch


def _refuse_overflow(self: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor, binary_op: Callable[..., Any]) -> None:
    """Asserts that the sum, difference or product of integers of less than 64 bits is one of their type. Triton's own
    check is six more operations of the interpreter per operation of a kernel, half of all.
    """
    kind = lhs.type.scalar
    if kind.int_bitwidth >= 64:
        return
    exact = OPERATIONS[binary_op.__name__](lhs.handle.data, rhs.handle.data, dtype=np.int64)
    low, high = kind.get_int_min_value(), kind.get_int_max_value()
    fits = low <= exact.min() and exact.max() <= high
    assert fits, f"int{kind.int_bitwidth} overflow detected for operation {binary_op.__name__}"


def _scalars_remembered(numpy_type: Callable[[tl.dtype], np.dtype]) -> Callable[[tl.dtype], np.dtype]:
    """Triton's builds a table of all types at every call."""
    of_scalar = cache(numpy_type)
    return lambda kind: numpy_type(kind) if isinstance(kind, tl.pointer_type) else of_scalar(kind.scalar)
