"""Runs Gluon kernels on the CPU, since Triton's interpreter does not: a thread per warpgroup, torch for arithmetic.

Their own source is executed, with stand-ins for what it calls. Barriers have the hardware's phases and byte counts, and
a wait that nothing ends raises. A load first overwrites its shared memory with NaN; a product is computed when it is
issued and again when it is waited for, and must be the same: memory that was read too early, or released too early,
shows. Layouts, registers and fences are not modeled.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction

PATIENCE = 20.0  # seconds
NAMESAKES = ("exp2", "log2", "abs", "reshape", "permute", "full_like", "zeros_like")  # the same in torch


class Int(int):
    """An integer of a kernel, which has `.to`."""

    def to(self, dtype: torch.dtype) -> Int | float:
        return float(self) if dtype.is_floating_point else self


def _wrapped(name: str) -> Any:
    def operation(self: Int, other: Any) -> Any:
        result = getattr(int, name)(self, other)
        return Int(result) if type(result) in (int, bool) else result

    return operation


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor"):
    for _method in (f"__{_name}__", f"__r{_name}__"):
        setattr(Int, _method, _wrapped(_method))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Int, f"__{_name}__", _wrapped(f"__{_name}__"))
Int.__hash__ = int.__hash__  # type: ignore[method-assign]


class Value(Tensor):
    """A tensor of a kernel; its layout is nothing."""

    type = property(lambda self: SimpleNamespace(layout=None))  # type: ignore[assignment]


def value(x: Tensor) -> Value:
    return x.as_subclass(Value)  # type: ignore[no-any-return]


def where(condition: Any, x: Any, y: Any) -> Any:
    if any(isinstance(one, Tensor) for one in (condition, x, y)):
        return torch.where(condition, x, y)
    chosen = x if condition else y
    return Int(chosen) if isinstance(chosen, int) else chosen


def extreme(of_tensors: Callable[..., Any], of_numbers: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    def operation(x: Any, y: Any) -> Any:
        if isinstance(x, Tensor) or isinstance(y, Tensor):
            return of_tensors(*(torch.as_tensor(one) for one in (x, y)))
        return Int(of_numbers(x, y))

    return operation


def largest(x: Tensor, axis: int) -> Tensor:
    """As Triton's, which leaves NaN out where there is anything else."""
    return torch.where(x.isnan(), -torch.inf, x).amax(axis) if x.is_floating_point() else x.amax(axis)


class Pointer:
    def __init__(self, memory: Tensor, at: Any = 0) -> None:
        self.memory, self.at = memory, at

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.at + offset)


class Shared:
    """Shared memory of a program: a tile, or several."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def index(self, i: int) -> Shared:
        return Shared(self.data[i])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.data.view(shape))

    def load(self, layout: object) -> Value:
        return value(self.data.clone())


class Barrier:
    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.parity = self.bytes = 0

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def update(self, arrivals: int = 0, expected: int = 0) -> None:
        with self.changed:
            self.pending -= arrivals
            self.bytes += expected
            assert self.pending >= 0, "more arrivals in a phase than the barrier counts"
            if self.pending == 0 and self.bytes == 0:
                self.parity ^= 1
                self.pending = self.count
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.parity != parity, PATIENCE), "nothing ends this wait"


class Barriers(list[Barrier]):
    index = list.__getitem__  # type: ignore[assignment]


class Program:
    """What one program's functions see as gl, mbarrier, warpgroup_mma, warpgroup_mma_wait and load_tile."""

    def __init__(self, program: int, programs: int) -> None:
        self.program, self.programs = Int(program), Int(programs)
        self.local = threading.local()  # each warpgroup's products in flight
        self.mbarrier = SimpleNamespace(
            init=lambda barrier, count: barrier.init(count),
            arrive=lambda barrier: barrier.update(arrivals=1),
            expect=lambda barrier, size: barrier.update(arrivals=1, expected=size),
            wait=lambda barrier, parity: barrier.wait(parity),
            MBarrierLayout=lambda: None,
        )
        ignored = lambda *arguments: None  # noqa: E731
        operations = {
            "program_id": lambda axis: self.program,
            "num_programs": lambda axis: self.programs,
            "constexpr": object,
            "max": largest,
            "sum": torch.sum,
            "split": lambda x: (x[..., 0], x[..., 1]),
            "fma": lambda a, b, c: a * b + c,
            "where": where,
            "minimum": extreme(torch.minimum, min),
            "maximum": extreme(torch.maximum, max),
            "cdiv": lambda x, y: Int(-(-x // y)),
            "load": lambda pointer: Int(pointer.memory.view(-1)[pointer.at]),
            "store": self.store,
            **{name: getattr(torch, name) for name in NAMESAKES},
            **{name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "int32", "int64", "uint32")},
        }
        self.tl = SimpleNamespace(**operations)
        self.gl = SimpleNamespace(
            SliceLayout=ignored,
            NVMMADistributedLayout=ignored,
            NVMMASharedLayout=SimpleNamespace(get_default_for=ignored),
            DotOperandLayout=ignored,
            convert_layout=lambda x, layout: x,
            allocate_shared_memory=self.allocate,
            warp_specialize=self.warp_specialize,
            static_range=range,
            arange=lambda start, end, layout: value(torch.arange(start, end)),
            full=lambda shape, fill, dtype, layout: value(torch.full(shape, fill, dtype=dtype)),
            zeros=lambda shape, dtype, layout: value(torch.zeros(shape, dtype=dtype)),
            **operations,
        )

    def allocate(self, dtype: torch.dtype, shape: list[int], layout: object) -> Any:
        if dtype.is_floating_point:
            return Shared(torch.full(shape, torch.nan, dtype=dtype))
        return Barrier() if len(shape) == 1 else Barriers(Barrier() for _ in range(shape[0]))

    def warp_specialize(self, parts: list[Any], warps: list[int], registers: list[int]) -> None:
        assert len(parts) - 1 == len(warps) == len(registers)
        failures: list[BaseException] = []

        def run(function: Any, arguments: tuple[Any, ...]) -> None:
            try:
                function(*arguments)
                assert not getattr(self.local, "flying", None), "a product that nothing waits for"
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=run, args=part, daemon=True) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * PATIENCE)
        if failures:
            raise failures[0]

    def store(self, pointer: Pointer, x: Any, mask: Any = None) -> None:
        at = torch.as_tensor(pointer.at)
        x = torch.as_tensor(x).expand(at.shape)
        keep = torch.ones_like(at, dtype=torch.bool) if mask is None else mask.expand(at.shape)
        pointer.memory.view(-1)[at[keep]] = x[keep].to(pointer.memory.dtype)

    def load_tile(self, tiles: Any, start: list[int], barrier: Barrier, into: Shared) -> None:
        into.data.fill_(torch.nan)
        assert len(start) == tiles.base.ndim
        tile = torch.zeros(tiles.block_shape, dtype=tiles.dtype)
        spans = [(max(at, 0), at + size) for at, size in zip(start, tiles.block_shape, strict=True)]
        block = tiles.base[tuple(slice(begin, max(end, begin)) for begin, end in spans)]
        tile[tuple(slice(b - at, b - at + n) for at, (b, _), n in zip(start, spans, block.shape, strict=True))] = block
        into.data.copy_(tile)
        barrier.update(expected=-tiles.block_type.nbytes)

    def warpgroup_mma(self, a: Any, b: Shared, sums: Value, *, use_acc: bool = True, is_async: bool) -> Any:
        def product() -> Value:
            left = a.data if isinstance(a, Shared) else a
            result = left.float() @ b.data.float()
            return value(result + sums if use_acc else result)

        flying = self.local.__dict__.setdefault("flying", [])
        flying.append(SimpleNamespace(product=product, issued=product(), done=None))
        return flying[-1]

    def warpgroup_mma_wait(self, outstanding: int, of: list[Any]) -> Value:
        flying = self.local.flying
        while len(flying) > outstanding:
            one = flying.pop(0)
            one.done = one.product()
            assert torch.equal(one.done.nan_to_num(7e7), one.issued.nan_to_num(7e7)), "operands changed under a product"
        (one,) = of
        assert one.done is not None, "the wait leaves this product in flight"
        result: Value = one.done
        return result


def launch(kernel: GluonJITFunction[Any], programs: int, **arguments: Any) -> None:
    """Runs every program, one after the other, in the place of rhythm.kernels.launch.launch."""
    arguments = {name: _argument(x) for name, x in arguments.items()}
    options = {"num_warps", "enable_fp_fusion"}
    arguments = {name: x for name, x in arguments.items() if name not in options}
    for program in range(programs):
        _function(kernel, Program(program, programs), {})(**arguments)


def _argument(x: Any) -> Any:
    if isinstance(x, Tensor):
        return Pointer(x)
    if hasattr(x, "block_shape"):
        dtype, shape = x.base.dtype, x.block_shape
        block_type = SimpleNamespace(nbytes=dtype.itemsize * torch.Size(shape).numel())
        return SimpleNamespace(base=x.base, dtype=dtype, block_shape=shape, layout=None, block_type=block_type)
    if isinstance(x, tuple):
        return type(x)(*map(_argument, x))
    return Int(x) if type(x) is int else x


def _function(kernel: GluonJITFunction[Any], program: Program, done: dict[int, Any]) -> Any:
    """The kernel's Python function, and those that it calls, with the program's stand-ins."""
    if id(kernel) not in done:
        scope = dict(kernel.fn.__globals__)
        done[id(kernel)] = types.FunctionType(kernel.fn.__code__, scope, kernel.fn.__name__, kernel.fn.__defaults__)
        for name in ("gl", "tl", "mbarrier", "warpgroup_mma", "warpgroup_mma_wait", "load_tile"):
            if name in scope:
                scope[name] = getattr(program, name)
        for name, x in scope.items():
            if isinstance(x, tl.constexpr):
                scope[name] = x.value
            elif hasattr(x, "fn") and type(x).__module__.startswith("triton."):
                scope[name] = _function(x, program, done)
    return done[id(kernel)]
