"""Measures which of a table's tiles is fastest, with RHYTHM_AUTOTUNE=1; else the first one runs.

Tiles are timed on a sample of fixed length, whatever the lengths of the call, and the fastest is stored in a file
($RHYTHM_CACHE, else ~/.cache/rhythm). Its key there contains all that it depends on: the device, Triton's version, the
kernel, and the types and shapes of the heads. Tiles differ in the order of their sums, so results of a tuned and an
untuned run may differ in the last bits.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import triton
from torch import Tensor

from rhythm.kernels.sequences import Sequences
from rhythm.kernels.softmax import Softmax
from rhythm.kernels.tile_tables import KernelKey, Tile
from rhythm.kernels.tiles import dot_precision

logger = logging.getLogger("rhythm")

SAMPLE_TOKENS = 8192
"""Enough tokens to fill a GPU and to spend most time in the steady loops, as in the calls that are worth tuning for."""


@dataclass(frozen=True)
class Sample:
    """One sequence of SAMPLE_TOKENS tokens without a prompt.

    Attributes:
        q: [T, Hq, D].
        k, v: [T, Hkv, D].
        lse: fp32 [Hq, T].
        results, softmax: memory that kernels write; results are fp32 [Hq, T].
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
        """A sample with the heads, head size, type and device of q and k, drawn from a generator of its own."""
        generator = torch.Generator(q.device).manual_seed(0)

        def normal(x: Tensor) -> Tensor:
            shape = (SAMPLE_TOKENS, *x.shape[-2:])
            return torch.randn(shape, generator=generator, dtype=x.dtype, device=q.device)

        # About the logarithm of the number of keys, so that weights have an ordinary size.
        lse, *results = (torch.full((q.shape[-2], SAMPLE_TOKENS), 9.5, device=q.device) for _ in range(4))
        one, two, three = results
        sequences = Sequences(None, None, SAMPLE_TOKENS, 1)
        softmax = Softmax.empty(q.shape[-2], SAMPLE_TOKENS, q.device)
        softmax.parts.fill_(9.5)
        softmax.steep.zero_()
        return Sample(normal(q), normal(k), normal(k), lse, (one, two, three), sequences, softmax)


_lost: set[str] = set()
"""Keys for which no tile ran. They are not in the file, so that the next process tries again."""


def autotuning() -> bool:
    return os.environ.get("RHYTHM_AUTOTUNE") == "1"


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured. Capture forbids waiting for the device, which timing needs."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def cache_file() -> Path:
    home = os.environ.get("RHYTHM_CACHE")
    return (Path(home) if home else Path.home() / ".cache" / "rhythm") / "tiles.json"


@cache
def _remembered(path: Path) -> dict[str, dict[str, object]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def cache_key(key: KernelKey, q: Tensor, k: Tensor, tiles: list[Tile]) -> str:
    """What the fastest tile depends on, in words; the lengths of the sequences are not part of it."""
    name = torch.cuda.get_device_name(q.device) if q.device.type == "cuda" else "interpreter"
    precision = f" {dot_precision()}" if key.itemsize == 4 else ""
    return (
        f"{name}, triton {triton.__version__}, {key.kernel}, {key.itemsize} bytes{precision}, D {q.shape[-1]}, "
        f"group {q.shape[-2] // k.shape[-2]}, {'TMA' if any(tile.tma for tile in tiles) else 'threads'}"
    )


def tuned(key: KernelKey, q: Tensor, k: Tensor, tiles: list[Tile], run: Callable[[Sample, Tile], None]) -> Tile:
    """The fastest of the tiles: from memory or the file, else measured now and written there.

    The first tile if none of them ran, or if none is remembered while a graph is captured: then none is measured.
    """
    path = cache_file()
    remembered = _remembered(path)
    name = cache_key(key, q, k, tiles)
    # Compared as dicts, since the file may come from another version, where tiles had other fields.
    known = next((tile for tile in tiles if tile._asdict() == remembered.get(name)), None)
    if known is not None:
        return known
    if name in _lost or capturing(q.device):
        return tiles[0]
    try:
        sample = Sample.like(q, k)
    except torch.cuda.OutOfMemoryError as error:
        logger.warning("tiles for %s can't be timed: %s; the default runs", name, error)
        return tiles[0]
    times = {tile: measured(lambda tile: run(sample, tile), tile) for tile in tiles}
    best = min(times, key=lambda tile: times[tile])
    if times[best] == float("inf"):
        logger.warning("no tile for %s could be timed; the default runs: %s", name, tiles[0])
        _lost.add(name)
        return tiles[0]
    logger.info("tile for %s: %s, %.4f ms", name, best, times[best])
    remembered[name] = best._asdict()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(remembered, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)  # atomic, also if other processes write it
    return best


def measured(run: Callable[[Tile], None], tile: Tile) -> float:
    """Milliseconds per launch with the tile, from a graph's replays; infinite where it does not compile or run.

    Any exception counts as that: ptxas fails, memory is short, a compiler pass gives up or asserts. If every tile
    fails, the default runs and raises its own error.
    """
    try:
        return float(triton.testing.do_bench_cudagraph(lambda: run(tile), rep=50, return_mode="median"))
    except Exception as error:  # see above
        logger.warning("tile left out: %s: %s: %s", tile, type(error).__name__, error)
        return float("inf")
