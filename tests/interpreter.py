"""Triton's interpreter without what it does again and again: the kernels' tests take a fraction of the time.

What it computes and refuses is the same. tests/kernels/test_interpreter.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
NUMBERS = {"int32": (int,), "int64": (int,), "fp32": (int, float)}
"""Types that stay as they are beside a tensor of their own or one of these numbers."""


def make_faster() -> None:
    _swap_once()
    TritonSemantic.binary_op_sanitize_overflow_impl = _refuse_overflow
    interpreter._get_np_dtype = _scalars_remembered(interpreter._get_np_dtype)
    TritonSemantic.computation_type_impl = cache(TritonSemantic.computation_type_impl)
    TritonSemantic.broadcast_impl_value = _equal_shapes_first(TritonSemantic.broadcast_impl_value)
    TritonSemantic.binary_op_type_checking_impl = _same_types_first(TritonSemantic.binary_op_type_checking_impl)
    core._unwrap_if_constexpr = _tensors_first(core._unwrap_if_constexpr)
    interpreter._patch_attr = _patch_once
    tl.dtype.__eq__ = _itself_first(tl.dtype.__eq__)
    tl.block_type.__init__ = _types_remembered(tl.block_type.__init__)
    tl.tensor.__init__ = _shapes_remembered(tl.tensor.__init__)


def _swap_once() -> None:
    """The interpreter swaps the functions of `tl` for its own at every launch, and again at every call of a device
    function. Here they stay: nothing is compiled in a process that interprets.
    """
    swap, scopes = interpreter._patch_lang, {}

    def swapped(function: Callable[..., object]) -> Any:
        visible = frozenset(name for name, value in function.__globals__.items() if value is tl or value is tl.core)
        if visible not in scopes:
            scopes[visible] = swap(function)
            scopes[visible].restore = lambda: None
        return scopes[visible]

    interpreter._patch_lang = swapped


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


def _equal_shapes_first(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    """Blocks of the same shape need no broadcast."""

    def quick(self: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor) -> Any:
        same = lhs.type.is_block() and rhs.type.is_block() and [*lhs.type.shape] == [*rhs.type.shape]
        return (lhs, rhs) if same else broadcast(self, lhs, rhs)

    return quick


def _same_types_first(checked: Callable[..., Any]) -> Callable[..., Any]:
    """Operands of one type need no conversion, and neither does a tensor beside a number of its kind."""

    def quick(self: TritonSemantic, lhs: Any, rhs: Any, *rules: bool, **named: bool) -> Any:
        if type(lhs) is tl.tensor and (numbers := NUMBERS.get(lhs.dtype.name)):
            if type(rhs) is tl.tensor and rhs.dtype.name == lhs.dtype.name:
                return self.broadcast_impl_value(lhs, rhs)
            if type(rhs) in numbers:
                return self.broadcast_impl_value(lhs, self._cast_to_computation_type(rhs, lhs.dtype))
        return checked(self, lhs, rhs, *rules, **named)

    return quick


def _tensors_first(unwrap: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda x: x if type(x) is tl.tensor else unwrap(x)


def _patch_once(owner: Any, name: str, member: Any, builder: object, scope: Any) -> None:
    """As Triton's own, without a copy of the arguments and a check of them at every call."""
    inner = inspect.unwrap(member)

    def called(*args: Any, **named: Any) -> Any:
        named["_semantic"] = interpreter.interpreter_semantic
        return inner(*args, **named)

    scope.set_attr(owner, name, called)


def _itself_first(equal: Callable[..., bool]) -> Callable[..., bool]:
    return lambda self, other: self is other or equal(self, other)


def _types_remembered(make: Callable[..., None]) -> Callable[..., None]:
    """Triton's checks the shape and writes the name of the type at every operation. Equal types share their fields,
    which nothing changes.
    """
    made: dict[tuple[Any, ...], dict[str, Any]] = {}

    def remembered(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
        key = (id(element_ty), *[s.value if isinstance(s, tl.constexpr) else s for s in shape])
        if key in made:
            self.__dict__ = made[key]
            return
        make(self, element_ty, shape)
        if len(made) > 1000:  # every launch brings pointer types of its own
            made.clear()
        made[key] = self.__dict__  # in which the element type stays, so that its id is no other's

    return remembered


def _shapes_remembered(make: Callable[..., None]) -> Callable[..., None]:
    """All fields of a tensor but its handle are those of its type."""

    def remembered(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
        known = type.__dict__.get("of_tensors")
        if known is None:
            make(self, handle, type)
            type.of_tensors = {name: value for name, value in vars(self).items() if name not in ("handle", "type")}
            return
        self.__dict__.update(known)
        self.handle, self.type = handle, type

    return remembered
