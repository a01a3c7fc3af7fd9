"""Tile sizes: a small table per architecture whose first fitting entry is the fixed default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import triton

# "column" is the bands after a row sweep, "bands" for a given lse; "_band" means narrow_bands.py's kernel.
KERNELS = ("row", "row_values", "column", "column_band", "bands", "bands_band", "sampled", "column_sums", "row_answers")


class Tile(NamedTuple):
    """The sizes of a tile and the launch options that go with it; kernels take it as a constant.

    Attributes:
        rows, keys: rows of q and keys in a tile.
        warps: warps per program.
        stages: stages of the pipeline that loads tiles.
        tma: tiles are loaded by the tensor memory accelerator instead of by threads.
        max_registers: limit on the registers per thread, for tiles where the compiler would otherwise take more than
            lets enough programs share a multiprocessor; None: no limit. NVIDIA only.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    tma: bool = False
    max_registers: int | None = None


@dataclass(frozen=True)
class KernelKey:
    """What the best tile depends on.

    Attributes:
        kernel: one of KERNELS.
        itemsize: bytes per element of q.
        padded: head size, padded to a power of two.
        plain: whether attention has no sliding window, softcap or sink, and q as many rows as k.
    """

    kernel: str
    itemsize: int
    padded: int
    plain: bool = True

    @property
    def group(self) -> str:
        """The column of the table: half (2 bytes) or float (4 bytes), heads up to 128 or up to 256."""
        return f"{'half' if self.itemsize == 2 else 'float'}{128 if self.padded <= 128 else 256}"


TMA = True
# A band is narrow: a tile beyond it is wasted.
BAND = {
    "half128": [Tile(64, 64, 4, 2)],
    "half256": [Tile(64, 64, 4, 1), Tile(32, 64, 4, 2)],
    "float128": [Tile(32, 64, 8, 1)],
    "float256": [Tile(16, 16, 8, 1)],
}
SAMPLED = {
    "half128": [Tile(64, 64, 4, 2), Tile(64, 128, 8, 2), Tile(32, 64, 4, 3)],
    "half256": [Tile(64, 64, 4, 1), Tile(32, 64, 4, 2)],
    "float128": [Tile(32, 32, 4, 1), Tile(32, 64, 8, 1)],
    "float256": [Tile(32, 16, 8, 1)],
}
# Full fp32 products take registers, not tensor cores: small tiles of many warps.
FLOATS = {
    "row": {"float128": [Tile(32, 64, 8, 1)], "float256": [Tile(16, 16, 8, 1)]},
    "row_values": {"float128": [Tile(32, 32, 8, 1)], "float256": [Tile(16, 16, 8, 1)]},
    "column": {"float128": [Tile(32, 64, 8, 1), Tile(32, 32, 4, 1)], "float256": [Tile(32, 16, 8, 1)]},
}
AMPERE = {
    "row": {
        "half128": [Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(128, 32, 4, 3)],
        "half256": [Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)],
    },
    "row_values": {
        "half128": [Tile(128, 64, 8, 2), Tile(128, 32, 8, 3)],
        "half256": [Tile(64, 32, 8, 2), Tile(64, 32, 8, 1)],
    },
    "column": {
        "half128": [Tile(64, 128, 8, 3), Tile(64, 128, 4, 3), Tile(32, 128, 4, 3)],
        "half256": [Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)],
    },
    "row_answers": {"float128": [Tile(32, 32, 4, 1)]},
}
# Two programs of 128 registers per thread and about 100 kB share a multiprocessor: while one waits for its product, the
# other computes exponentials. With values there is room for one. Without a limit Triton takes 132 to 160 registers for
# the first tiles of rows and columns; limited to 128 it spills none.
HOPPER = {
    "row": {
        "half128": [
            Tile(128, 128, 8, 2, TMA, 128),
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
    # Four programs share a multiprocessor; with 128 keys two, of which each reads less per token.
    "column_band": {"half128": [Tile(64, 64, 4, 2, False, 120), Tile(64, 128, 4, 2)]},
    "bands_band": {"half128": [Tile(64, 64, 4, 2, False, 128), Tile(64, 128, 4, 2)]},
}
# gluon_row.py: the rows, warps and registers are those of each of its four warpgroups. It has no other tile.
HOPPER_GLUON = Tile(64, 128, 4, 4, TMA, 112)
# 128 registers spill here, and two programs share a multiprocessor with 64 keys.
BLACKWELL = HOPPER | {
    "row": {
        "half128": [
            Tile(128, 64, 4, 3, TMA),
            Tile(256, 64, 8, 3, TMA),
            Tile(128, 128, 8, 2, TMA),
            Tile(128, 128, 8, 2),
            Tile(64, 128, 4, 2, TMA),
        ],
        "half256": HOPPER["row"]["half256"],
    },
    "row_values": {
        "half128": [Tile(128, 128, 8, 2, TMA), Tile(128, 64, 8, 2), Tile(128, 64, 8, 3, TMA)],
        "half256": HOPPER["row_values"]["half256"],
    },
    "column": {
        "half128": [Tile(64, 128, 8, 3, TMA), Tile(64, 128, 8, 3), Tile(64, 64, 4, 3, TMA)],
        "half256": HOPPER["column"]["half256"],
    },
    "column_band": {"half256": BAND["half256"][:1]},
    "bands_band": {"half256": BAND["half256"][:1]},
}
# Small tiles, so that short sequences reach every loop.
INTERPRETER = {
    kernel: {group: [Tile(32, 32, 1, 1)] for group in ("half128", "half256", "float128", "float256")}
    for kernel in KERNELS
}
# Per thread 8 warps of 64 lanes leave 256 registers, which these need all, 4 leave 512.
CDNA_FLOAT = [Tile(32, 32, 4, 1)]
CDNA = {
    "row": {"float128": CDNA_FLOAT},
    "row_values": {"half256": [Tile(32, 32, 4, 2)]},
    "column": {"float128": CDNA_FLOAT},
    "column_band": {"float128": CDNA_FLOAT},
    "bands_band": {"float128": CDNA_FLOAT},
    "sampled": {"float128": CDNA_FLOAT},
}
# The largest weights need more registers than sums do.
SUMS_FLOAT = {"float256": [Tile(16, 32, 4, 1)]}


def _merged(
    one: Mapping[str, dict[str, list[Tile]]], other: Mapping[str, dict[str, list[Tile]]]
) -> dict[str, dict[str, list[Tile]]]:
    """The tiles of both by kernel and group; where both have some, the other's."""
    return {kernel: one.get(kernel, {}) | other.get(kernel, {}) for kernel in one.keys() | other.keys()}


def _joined(half: Mapping[str, dict[str, list[Tile]]]) -> dict[str, dict[str, list[Tile]]]:
    """A table of all kernels. Column sums and answers of rows run with the first tile of columns and of rows, if they
    have none of their own: the others are compared for the kernels that they were made for.
    """
    others = FLOATS | {"column_band": BAND, "bands_band": BAND, "sampled": SAMPLED}
    table = {kernel: groups | half.get(kernel, {}) for kernel, groups in others.items()}
    first = {kernel: {group: tiles[:1] for group, tiles in table[kernel].items()} for kernel in ("row", "column")}
    return table | {
        "bands": table["column"],
        "column_sums": first["column"] | SUMS_FLOAT,
        "row_answers": first["row"] | half.get("row_answers", {}),
    }


TABLES = {
    "sm_80": _joined(AMPERE),
    "sm_90": _joined(HOPPER) | {"row_gluon": {"half128": [HOPPER_GLUON]}},
    "sm_100": _joined(BLACKWELL),
    "gfx942": _joined(_merged(AMPERE, CDNA)),
    "interpreter": INTERPRETER,
}
# What runs with forms of attention other than plain where the table's first tile would spill: masks take registers, and
# tanh does.
FORM_TILES: dict[str, dict[str, dict[str, Tile]]] = {
    "sm_100": {
        "row_values": {"half128": Tile(128, 64, 8, 3, TMA), "half256": Tile(64, 32, 8, 1)},
        "column_sums": {"half256": Tile(64, 64, 8, 2)},
    },
    "gfx942": {"row_values": {"half128": Tile(64, 32, 4, 2)}},
}


@cache
def architecture(device: torch.device) -> str:
    """The device's name in TABLES."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm_80" if major < 9 else "sm_90" if major == 9 else "sm_100"


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take."""
    if device.type == "cpu":
        return 1 << 20
    return int(triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"])


def needed_memory(tile: Tile, key: KernelKey) -> int:
    """Bytes of shared memory per program: the operand that stays, and per stage the operands that are streamed."""
    by_columns = key.kernel.startswith(("column", "bands"))
    resident, streamed = (tile.keys, tile.rows) if by_columns else (tile.rows, tile.keys)
    operands = 2 if key.kernel == "row_values" else 1
    return (resident + tile.stages * operands * streamed) * key.padded * key.itemsize


def tiles_of(table: str, key: KernelKey) -> list[Tile]:
    """The table's tiles for a kernel; with forms of attention other than plain only one."""
    tiles = TABLES[table][key.kernel][key.group]
    if key.plain:
        return tiles
    return [FORM_TILES.get(table, {}).get(key.kernel, {}).get(key.group, tiles[0])]


def candidates(table: str, key: KernelKey, memory: int, tma: bool) -> list[Tile]:
    """The tiles of the table that fit into `memory` bytes; without `tma` all of them load by threads, which takes more
    registers than the limits of the others allow.

    If none fits: the smallest, with one stage.
    """
    tiles = tiles_of(table, key)
    if not tma:
        tiles = [tile._replace(tma=False, max_registers=None) if tile.tma else tile for tile in tiles]
    fitting = [tile for tile in dict.fromkeys(tiles) if needed_memory(tile, key) <= memory]
    return fitting or [min(tiles, key=lambda tile: needed_memory(tile, key))._replace(stages=1)]
