"""A timed call copies nothing from the host and reads nothing there: capture forbids it, and a clock would count it.

There is no GPU here, so tensors on the CPU stand in for those on the device. What would be a copy from unpinned memory
is then the making of a tensor from Python's values, and what would wait for the device is the reading of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from benchmarks import implementations
from benchmarks.gpu import suite
from benchmarks.shapes import Shape, make_inputs
from rhythm.ops import arguments, registered, statistics

OPS = {
    "rhythm::attention_statistics": registered.attention_statistics,
    "rhythm::attention_with_statistics": registered.attention_with_statistics,
}
FORBIDDEN = ("lift_fresh", "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "item", "equal")
FORBIDDEN_METHODS = ("tolist", "numpy", "cpu", "item", "__array__")


class HostTouchedError(AssertionError):
    """A call copied from the host or waited for the device."""


class NoHost(TorchDispatchMode):
    """Raises if anything copies from the host or waits for the device, inside rhythm's ops too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in OPS:
            with self:  # a mode is off while it handles an op: the op's body runs under it again
                return OPS[name]._init_fn(*args, **(kwargs or {}))
        if name.removeprefix("aten::") in FORBIDDEN:
            raise HostTouchedError(f"{name} copies from the host or waits for the device")
        if name == "aten::index" and any(x is not None and x.dtype == torch.bool for x in args[1]):
            raise HostTouchedError("a mask as an index waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values on a GPU are not checked; kernels are launched, their results are ignored."""
    monkeypatch.setattr(arguments, "check_values", lambda sequences: None)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda self, *args, **kwargs: None)


@contextmanager
def no_host() -> Iterator[None]:
    def refuse(name: str) -> Callable[..., Any]:
        def refused(self: Any, *args: Any, **kwargs: Any) -> Any:
            raise HostTouchedError(f"Tensor.{name} waits for the device")

        return refused

    with pytest.MonkeyPatch.context() as patch:
        for name in FORBIDDEN_METHODS:
            patch.setattr(Tensor, name, refuse(name))
        for name in ("from_numpy", "as_tensor"):
            patch.setattr(torch, name, refuse(name))
        with NoHost():
            yield


SHAPE = Shape(70, prompt=9, query_heads=4, key_heads=2, head_size=16)
MAKERS = {name: getattr(implementations, name) for name in suite.OURS}


@pytest.mark.parametrize("prompt", [0, 9])
@pytest.mark.parametrize("name", MAKERS)
def test_our_implementations_touch_no_host(name: str, prompt: int) -> None:
    shape = Shape(70, prompt=prompt, query_heads=4, key_heads=2, head_size=16)
    run = MAKERS[name](make_inputs(shape, torch.bfloat16, backend="triton"))
    with no_host():
        results = run()
    assert {"waad", "fai"} <= set(results)


@pytest.mark.parametrize("name", suite.OURS)
def test_our_packed_implementations_touch_no_host(name: str) -> None:
    inputs = make_inputs(SHAPE, torch.bfloat16, backend="triton")
    cu_seqlens, prompt_lens = torch.tensor([0, 30, 70], dtype=torch.int32), torch.tensor([4, 9])
    run = suite.packed_ops(inputs, cu_seqlens, prompt_lens)[name]()
    with no_host():
        run()


def test_lists_of_numbers_are_noticed() -> None:
    """A former fault: prompt_lens as a list, copied to the device in every call."""
    inputs = make_inputs(SHAPE, torch.bfloat16, backend="triton")
    with no_host(), pytest.raises(HostTouchedError, match="lift_fresh"):
        statistics.attention_statistics(inputs.q, inputs.k, prompt_lens=[9], backend="triton")


@pytest.mark.parametrize(
    "touch",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: x + torch.tensor([1.0]),
        lambda x: int(x[0]),
    ],
)
def test_the_stand_in_notices(touch: Callable[[Tensor], Any]) -> None:
    x = torch.ones(3)
    with no_host(), pytest.raises(HostTouchedError):
        touch(x)


def test_the_ops_own_body_is_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the lengths inside of the op, as checks of values do, is noticed as well."""
    inputs = make_inputs(SHAPE, torch.bfloat16, backend="triton")
    monkeypatch.setattr(arguments, "check_values", lambda sequences: sequences.host)
    run = implementations.statistics(inputs)
    with no_host(), pytest.raises(HostTouchedError, match="tolist"):
        run()


def test_the_prompt_is_built_once_on_the_device() -> None:
    inputs = make_inputs(SHAPE, torch.bfloat16)
    assert inputs.prompt_lens is inputs.prompt_lens
    assert inputs.prompt_lens is not None
    assert inputs.prompt_lens.tolist() == [9]
    assert inputs.prompt_lens.dtype == torch.int32
    assert make_inputs(Shape(70, query_heads=4, key_heads=2, head_size=16), torch.bfloat16).prompt_lens is None
