"""The way of every kernel onto the device: which tile, and whether it runs or is only compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from rhythm.kernels.configurations import Kind, Tile, architecture, candidates, shared_memory
from rhythm.kernels.tuning import Sample, autotuning, tuned

Choice = Callable[[Kind], list[Tile]]
Compiled = Callable[[Any], None]

_forced: ContextVar[Choice | None] = ContextVar("forced", default=None)
_compiled: ContextVar[Compiled | None] = ContextVar("compiled", default=None)


def launch(
    kind: Kind, q: Tensor, k: Tensor, tma: bool, run: Callable[[Tile], None], again: Callable[[Sample], object]
) -> None:
    """Runs the kernel with the tile chosen for its kind: `run(tile)` starts it, and may be called several times.

    tma: whether the tensor memory accelerator could read the operands.
    again: the same launcher with the tensors of a sample, on which tiles race.
    """
    if (choice := _forced.get()) is not None:
        for tile in choice(kind):
            run(tile)
        return
    tiles = candidates(architecture(q.device), kind, shared_memory(q.device), tma)

    def on_sample(sample: Sample, tile: Tile) -> None:
        with forced(lambda kind: [tile]):
            again(sample)

    run(tuned(kind, q, k, tiles, on_sample) if len(tiles) > 1 and autotuning() else tiles[0])


def options(tile: Tile) -> dict[str, Any]:
    """Triton's launch options for a tile; AMD's compiler knows no maxnreg, not even None."""
    limit = {} if tile.max_registers is None else {"maxnreg": tile.max_registers}
    return {"num_warps": tile.warps, "num_stages": tile.stages, **limit}


def start(kernel: Any, programs: int, **arguments: Any) -> None:
    """Starts that many programs of a kernel; under `compiling` it is compiled and goes to the receiver instead."""
    if (receive := _compiled.get()) is None:
        kernel[(programs,)](**arguments)
    else:
        receive(kernel.warmup(grid=(programs,), **arguments))


@contextmanager
def forced(choice: Choice) -> Iterator[None]:
    """While open, kernels run with each tile that `choice` names for their kind, in turn."""
    token = _forced.set(choice)
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def compiling(receive: Compiled) -> Iterator[None]:
    """While open, kernels are compiled for Triton's active driver and do not run."""
    token = _compiled.set(receive)
    try:
        yield
    finally:
        _compiled.reset(token)
