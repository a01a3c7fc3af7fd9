"""The choice among the tiles that a table offers: the first, or with RHYTHM_AUTOTUNE=1 the fastest.

The tiles race on the first call of their kind, and the winner is kept in a file ($RHYTHM_CACHE, else ~/.cache/rhythm)
under the device, Triton's version, the kernel and its kind. A tile decides in which order sums run: without the file,
a tuned run and an untuned one may differ in the last bits.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
import triton
from rhythm.kernels.configurations import Kind, Tile

logger = logging.getLogger("rhythm")


def autotuning(device: torch.device) -> bool:
    """Whether to race: asked for, and not while a CUDA graph is being captured, which forbids waiting."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return os.environ.get("RHYTHM_AUTOTUNE") == "1" and not capturing


def cache_file() -> Path:
    home = os.environ.get("RHYTHM_CACHE")
    return (Path(home) if home else Path.home() / ".cache" / "rhythm") / "tiles.json"


@cache
def _remembered(path: Path) -> dict[str, dict[str, object]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def tuned(kind: Kind, device: torch.device, tiles: list[Tile], run: Callable[[Tile], None]) -> Tile:
    """The fastest of the tiles, from the file, or measured now and written there."""
    path = cache_file()
    remembered = _remembered(path)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    key = f"{name}, triton {triton.__version__}, {kind.sweep}, {kind.itemsize} bytes, D {kind.padded}"
    if key in remembered and (tile := Tile(**remembered[key])) in tiles:
        return tile
    times = {tile: measured(run, tile) for tile in tiles}
    best = min(times, key=lambda tile: times[tile])
    logger.info("tile for %s: %s, %.4f ms", key, best, times[best])
    remembered[key] = asdict(best)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(remembered, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)  # whole or not at all, whoever else writes
    return best


def measured(run: Callable[[Tile], None], tile: Tile) -> float:
    """Milliseconds a launch takes with the tile; infinite where the device has no room for it."""
    try:
        return float(triton.testing.do_bench(lambda: run(tile), warmup=10, rep=50, return_mode="median"))
    except triton.runtime.errors.OutOfResources:
        return float("inf")
