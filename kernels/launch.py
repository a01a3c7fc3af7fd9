"""Launches kernels: picks the tile, then runs the kernel or only compiles it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, TypeVar

from torch import Tensor

from rhythm.kernels.tile_tables import KernelKey, Tile, architecture, candidates, shared_memory
from rhythm.kernels.tiles import padded_size
from rhythm.kernels.tuning import Sample, autotuning, tuned

T = TypeVar("T")
Choice = Callable[[KernelKey], list[Tile]]
Receiver = Callable[[Any], None]

_forced: ContextVar[Choice | None] = ContextVar("forced", default=None)
_receiver: ContextVar[Receiver | None] = ContextVar("receiver", default=None)


def run_with_tile(
    key: KernelKey, q: Tensor, k: Tensor, tma: bool, run: Callable[[Tile], T], on_sample: Callable[[Sample], object]
) -> list[T]:
    """Calls `run`, which launches a kernel, with the tile chosen for it; under `forced` with each of the given tiles.

    Args:
        key: of the kernel.
        q, k: its operands: their heads and type determine which tiles are compared.
        tma: whether the tensor memory accelerator can load the operands.
        run: launches the kernel with a tile.
        on_sample: calls the same launcher with a sample's tensors; tiles are timed on it.

    Returns:
        The results of `run`, one per tile.
    """
    if (choice := _forced.get()) is not None:
        return [run(tile) for tile in choice(key)]
    tiles = candidates(architecture(q.device), key, shared_memory(q.device), tma)

    def run_on_sample(sample: Sample, tile: Tile) -> None:
        with forced(lambda key: [tile]):
            on_sample(sample)

    return [run(tuned(key, q, k, tiles, run_on_sample) if len(tiles) > 1 and autotuning() else tiles[0])]


def kernel_key(kernel: str, q: Tensor, arguments: Mapping[str, Any]) -> KernelKey:
    """What the tile of a call depends on; arguments: by name, as the kernel takes them."""
    forms = (arguments.get(name) for name in ("rows", "sliding_window", "cap_scale", "sinks"))
    return KernelKey(kernel, q.element_size(), padded_size(q.shape[-1]), all(form is None for form in forms))


def options(tile: Tile, arguments: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Triton's launch options for a tile; AMD's compiler rejects maxnreg, even as None.

    Windows and softcaps (in the kernel's arguments) need more registers than the tile's limit allows without spills.
    """
    plain = arguments.get("sliding_window") is None and arguments.get("cap_scale") is None
    limit = {"maxnreg": tile.max_registers} if tile.max_registers is not None and plain else {}
    return {"num_warps": tile.warps, "num_stages": tile.stages, **limit}


def launch(kernel: Any, programs: int, **arguments: Any) -> None:
    """Launches that many programs of a kernel. Under `compiling` it is compiled instead, and handed to the receiver."""
    if (receive := _receiver.get()) is None:
        kernel[(programs,)](**arguments)
    else:
        receive(kernel.warmup(grid=(programs,), **arguments))


@contextmanager
def forced(choice: Choice) -> Iterator[None]:
    """Within it kernels run with each tile that `choice` gives for their key, in turn."""
    token = _forced.set(choice)
    try:
        yield
    finally:
        _forced.reset(token)


def tile_is_forced() -> bool:
    return _forced.get() is not None


@contextmanager
def compiling(receive: Receiver) -> Iterator[None]:
    """Within it kernels are compiled for Triton's active driver and passed to `receive`; they do not run."""
    token = _receiver.set(receive)
    try:
        yield
    finally:
        _receiver.reset(token)
