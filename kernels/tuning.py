"""The choice among the tiles that a table offers: the first, or with RHYTHM_AUTOTUNE=1 the fastest.

The tiles race on a sample of the tuner's own, of one length whatever was called, and the winner is kept in a file
($RHYTHM_CACHE, else ~/.cache/rhythm) under all that it depends on: the device, Triton's version, the kernel, and the
types and shapes of the heads. A tile decides in which order sums run: without the file, a tuned run and an untuned one
may differ in the last bits.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
import triton
from torch import Tensor

from rhythm.kernels.configurations import Kind, Tile
from rhythm.kernels.sequences import Sequences
from rhythm.kernels.softmax import Softmax
from rhythm.kernels.tiles import dot_precision

logger = logging.getLogger("rhythm")

RACED_TOKENS = 8192
"""Long enough to fill a GPU and to spend its time in the steady loops, as the calls do that are worth tuning for."""


@dataclass(frozen=True)
class Sample:
    """One sequence of RACED_TOKENS tokens without a prompt: q [T, Hq, D], k and v [T, Hkv, D], lse and results [Hq, T].

    The results, fp32, are to be written; several kernels may write the same. So is softmax.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor
    results: tuple[Tensor, Tensor, Tensor]
    sequences: Sequences
    softmax: Softmax

    @staticmethod
    def like(q: Tensor, k: Tensor) -> Sample:
        """With the heads, head size, type and device of q and k. Draws from a generator of its own."""
        generator = torch.Generator(q.device).manual_seed(0)

        def normal(x: Tensor) -> Tensor:
            shape = (RACED_TOKENS, *x.shape[-2:])
            return torch.randn(shape, generator=generator, dtype=x.dtype, device=q.device)

        # About the logarithm of the number of keys, so that weights are of an ordinary size.
        lse, *results = (torch.full((q.shape[-2], RACED_TOKENS), 9.5, device=q.device) for _ in range(4))
        one, two, three = results
        sequences = Sequences(None, None, RACED_TOKENS, 1)
        softmax = Softmax.empty(q.shape[-2], RACED_TOKENS, q.device)
        softmax.parts.fill_(9.5)
        softmax.steep.zero_()
        return Sample(normal(q), normal(k), normal(k), lse, (one, two, three), sequences, softmax)


_lost: set[str] = set()
"""Keys for which no tile ran: not in the file, so that the next process tries again."""


def autotuning() -> bool:
    return os.environ.get("RHYTHM_AUTOTUNE") == "1"


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: a race waits for the device, which capture forbids."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def cache_file() -> Path:
    home = os.environ.get("RHYTHM_CACHE")
    return (Path(home) if home else Path.home() / ".cache" / "rhythm") / "tiles.json"


@cache
def _remembered(path: Path) -> dict[str, dict[str, object]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def key_of(kind: Kind, q: Tensor, k: Tensor, tiles: list[Tile]) -> str:
    """What the fastest tile depends on, in words. The lengths of the sequences are not among it."""
    name = torch.cuda.get_device_name(q.device) if q.device.type == "cuda" else "interpreter"
    precision = f" {dot_precision()}" if kind.itemsize == 4 else ""
    return (
        f"{name}, triton {triton.__version__}, {kind.sweep}, {kind.itemsize} bytes{precision}, D {q.shape[-1]}, "
        f"group {q.shape[-2] // k.shape[-2]}, {'TMA' if any(tile.tma for tile in tiles) else 'threads'}"
    )


def tuned(kind: Kind, q: Tensor, k: Tensor, tiles: list[Tile], run: Callable[[Sample, Tile], None]) -> Tile:
    """The fastest of the tiles, from memory or the file, or measured now and written there.

    While a graph is captured nothing is measured: without a remembered tile, and where none of them ran, the first.
    """
    path = cache_file()
    remembered = _remembered(path)
    key = key_of(kind, q, k, tiles)
    # Compared as what the file holds, which may come from another version with other fields.
    known = next((tile for tile in tiles if asdict(tile) == remembered.get(key)), None)
    if known is not None:
        return known
    if key in _lost or capturing(q.device):
        return tiles[0]
    try:
        sample = Sample.like(q, k)
    except torch.cuda.OutOfMemoryError as error:
        logger.warning("no race of tiles for %s: %s; the default runs", key, error)
        return tiles[0]
    times = {tile: measured(lambda tile: run(sample, tile), tile) for tile in tiles}
    best = min(times, key=lambda tile: times[tile])
    if times[best] == float("inf"):
        logger.warning("no tile for %s ran in the race; the default runs: %s", key, tiles[0])
        _lost.add(key)
        return tiles[0]
    logger.info("tile for %s: %s, %.4f ms", key, best, times[best])
    remembered[key] = asdict(best)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(remembered, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)  # whole or not at all, whoever else writes
    return best


def measured(run: Callable[[Tile], None], tile: Tile) -> float:
    """Milliseconds a launch takes with the tile, in a graph's replay; infinite where it does not compile or run.

    Compilers fail in many ways: ptxas, no room for it, a pass that gives up, an assertion. None of them is the
    caller's: should every tile fail, the default runs and says why.
    """
    try:
        return float(triton.testing.do_bench_cudagraph(lambda: run(tile), rep=50, return_mode="median"))
    except Exception as error:
        logger.warning("out of the race: %s: %s: %s", tile, type(error).__name__, error)
        return float("inf")
