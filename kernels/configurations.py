"""Tile sizes: a small table per architecture whose first fitting entry is the fixed default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
import triton

# "bands" are columns and the window for a given lse; "_band" says that the horizon is finite.
SWEEPS = ("row", "row_values", "column", "column_band", "bands", "bands_band", "sampled")


@dataclass(frozen=True)
class Tile:
    """Rows (of q) and keys of a tile, warps of a program, stages of its pipeline, and who loads: TMA or threads.

    max_registers: a limit on a thread's registers, where the compiler alone takes more than lets two programs share a
    multiprocessor; None: no limit. NVIDIA only.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    tma: bool = False
    max_registers: int | None = None


@dataclass(frozen=True)
class Kind:
    """What the best tile depends on. sweep: one of SWEEPS."""

    sweep: str
    itemsize: int  # bytes of an element of q
    padded: int  # head size, padded

    @property
    def group(self) -> str:
        """The table's column: types of 2 and 4 bytes, heads up to 128 and up to 256."""
        return f"{'half' if self.itemsize == 2 else 'float'}{128 if self.padded <= 128 else 256}"


TMA = True
# A band is narrow: a tile beyond it is wasted.
BAND = {
    "half128": [Tile(64, 64, 4, 2), Tile(64, 128, 8, 2), Tile(32, 64, 4, 3)],
    "half256": [Tile(64, 64, 4, 1), Tile(32, 64, 4, 2)],
    "float128": [Tile(32, 32, 4, 1), Tile(32, 64, 8, 1)],
    "float256": [Tile(32, 16, 8, 1)],
}
# Full fp32 products take registers, not tensor cores: small tiles of many warps.
FLOATS = {
    "row": {"float128": [Tile(32, 64, 8, 1), Tile(64, 32, 8, 1)], "float256": [Tile(16, 16, 8, 1)]},
    "row_values": {"float128": [Tile(32, 32, 8, 1)], "float256": [Tile(16, 16, 8, 1)]},
    "column": {"float128": [Tile(32, 64, 8, 1), Tile(32, 32, 4, 1)], "float256": [Tile(32, 16, 8, 1)]},
}
AMPERE = {
    "row": {
        "half128": [Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(128, 32, 4, 3)],
        "half256": [Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)],
    },
    "row_values": {
        "half128": [Tile(128, 64, 8, 2), Tile(128, 32, 8, 3), Tile(64, 64, 4, 2)],
        "half256": [Tile(64, 32, 8, 2), Tile(64, 32, 8, 1)],
    },
    "column": {
        "half128": [Tile(64, 128, 8, 3), Tile(64, 128, 4, 3), Tile(32, 128, 4, 3)],
        "half256": [Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)],
    },
}
# Two programs of 128 registers a thread and about 100 kB share a multiprocessor: while one waits for its product, the
# other takes exponentials. With values there is room for one. Left alone, Triton 3.6 takes 138 registers for the first
# tile of columns; held to 128 it spills none.
HOPPER = {
    "row": {
        "half128": [
            Tile(128, 128, 8, 2, TMA),
            Tile(128, 128, 8, 2),
            Tile(128, 128, 8, 3, TMA),
            Tile(64, 128, 4, 2, TMA),
            Tile(128, 64, 4, 3, TMA),
            Tile(256, 64, 8, 3, TMA),
        ],
        "half256": [Tile(128, 64, 8, 2, TMA), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2, TMA)],
    },
    "row_values": {
        "half128": [Tile(128, 128, 8, 2, TMA), Tile(128, 64, 8, 2), Tile(128, 64, 8, 3, TMA), Tile(64, 64, 4, 2, TMA)],
        "half256": [Tile(128, 32, 8, 2, TMA), Tile(64, 32, 8, 2)],
    },
    "column": {
        "half128": [
            Tile(64, 128, 8, 3, TMA, 128),
            Tile(64, 128, 8, 3),
            Tile(128, 128, 8, 2, TMA),
            Tile(64, 64, 4, 3, TMA),
        ],
        "half256": [Tile(64, 128, 8, 2, TMA), Tile(64, 128, 8, 2), Tile(64, 64, 4, 2)],
    },
}
BLACKWELL = HOPPER | {
    "column": {
        "half128": [Tile(64, 128, 8, 3, TMA), Tile(64, 128, 8, 3), Tile(64, 64, 4, 3, TMA)],  # 128 registers spill here
        "half256": HOPPER["column"]["half256"],
    }
}
# Small tiles, so that short sequences reach every loop.
INTERPRETER = {
    sweep: {group: [Tile(32, 32, 1, 1)] for group in ("half128", "half256", "float128", "float256")} for sweep in SWEEPS
}


def _joined(half: Mapping[str, dict[str, list[Tile]]]) -> dict[str, dict[str, list[Tile]]]:
    table = {sweep: FLOATS[sweep] | of_half for sweep, of_half in half.items()}
    return table | {"bands": table["column"], "column_band": BAND, "bands_band": BAND, "sampled": BAND}


TABLES = {
    "sm_80": _joined(AMPERE),
    "sm_90": _joined(HOPPER),
    "sm_100": _joined(BLACKWELL),
    "gfx942": _joined(AMPERE),
    "interpreter": INTERPRETER,
}


@cache
def architecture(device: torch.device) -> str:
    """The table's name for a device."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm_80" if major < 9 else "sm_90" if major == 9 else "sm_100"


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have."""
    if device.type == "cpu":
        return 1 << 20
    return int(triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"])


def needed_memory(tile: Tile, kind: Kind) -> int:
    """Bytes of shared memory that a tile takes: what stands, and what moves, once a stage."""
    stands, moves = (tile.keys, tile.rows) if kind.sweep.startswith(("column", "bands")) else (tile.rows, tile.keys)
    operands = 2 if kind.sweep == "row_values" else 1
    return (stands + tile.stages * operands * moves) * kind.padded * kind.itemsize


def candidates(table: str, kind: Kind, memory: int, tma: bool) -> list[Tile]:
    """The table's tiles that fit; entries that ask for TMA where there is none load by threads instead."""
    tiles = [tile if tma else replace(tile, tma=False) for tile in TABLES[table][kind.sweep][kind.group]]
    fitting = [tile for tile in dict.fromkeys(tiles) if needed_memory(tile, kind) <= memory]
    return fitting or [replace(min(tiles, key=lambda tile: needed_memory(tile, kind)), stages=1)]
