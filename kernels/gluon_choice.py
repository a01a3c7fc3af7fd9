"""Whether the row sweep runs in Gluon (gluon_row.py) or in plain Triton, its reference and its fallback.

It runs in Gluon where PROVEN has a record that it was right on a GPU with the installed Triton, or with RHYTHM_GLUON=1;
never with RHYTHM_GLUON=0, never for calls that it does not cover, and never where a tile is forced (launch.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from types import ModuleType

import torch
import triton
from torch import Tensor

from rhythm.kernels.arguments import Forms, scale_and_sign
from rhythm.kernels.launch import tile_is_forced
from rhythm.kernels.sequences import Sequences
from rhythm.kernels.tile_tables import HOPPER_GLUON, TABLES, Tile, architecture
from rhythm.kernels.tiles import padded_size, tma_compatible

PROVEN: Mapping[str, str] = {}
"""Triton's version → a record of `make gpu-check` (a path below benchmarks/records) on a GPU of sm_90 whose part
"gluon" found nothing wrong. None has been made yet. A test reads the records that are named here."""
HALF = (torch.bfloat16, torch.float16)


def uncovered(
    q: Tensor, k: Tensor, v: Tensor | None, sequences: Sequences, scale: float, forms: Forms, given_lse: Tensor | None
) -> str | None:
    """What of a call gluon_row.py does not compute; None: it computes it."""
    features = {
        "values": v is not None,
        "a given lse": given_lse is not None,
        "a sliding window": forms.sliding_window is not None and forms.sliding_window < sequences.tokens,
        "a softcap": forms.softcap is not None,
        "sinks": forms.sinks is not None,
        "fewer queries than keys": sequences.fewer_rows,
        f"dtype {q.dtype}": q.dtype not in HALF,
        f"head size {q.shape[-1]}": padded_size(q.shape[-1]) > 128,
        f"scale {scale}": scale_and_sign(scale)[2] <= 0,
    }
    if reason := next((name for name, present in features.items() if present), None):
        return reason
    loadable = q.is_meta or (tma_compatible(q) and tma_compatible(k))
    return None if loadable else "strides or addresses that are no multiples of 16 bytes"


def chosen(device: torch.device) -> bool:
    """Whether calls that are covered run in Gluon on this device. RHYTHM_GLUON is read per call.

    Raises:
        RuntimeError: RHYTHM_GLUON=1 where it can't run, with the reason.
        ValueError: RHYTHM_GLUON is neither 0 nor 1.
    """
    if tile_is_forced():
        return False
    wanted = os.environ.get("RHYTHM_GLUON", "")
    if wanted not in ("", "0", "1"):
        raise ValueError(f"RHYTHM_GLUON is {wanted!r}; it must be 0 or 1, or unset")
    if wanted == "1" and (reason := unavailable(device)) is not None:
        raise RuntimeError(f"RHYTHM_GLUON=1, but {reason}")
    return wanted == "1" or (not wanted and triton.__version__ in PROVEN and unavailable(device) is None)


@cache
def unavailable(device: torch.device) -> str | None:
    """Why the Gluon kernel can't run on the device; None: it can."""
    if (arch := architecture(device)) != "sm_90":
        return f"the row sweep in Gluon is for sm_90 (Hopper); {device} is {arch}"
    return gluon_absent()


@cache
def gluon_absent() -> str | None:
    """Why the kernel can't even be compiled with the installed Triton; None: it can."""
    try:
        gluon_module()
    except (ImportError, AttributeError) as error:
        return f"Triton {triton.__version__} has another Gluon than 3.6 to 3.9, for which it was written: {error}"
    return None


def gluon_module() -> ModuleType:
    """The module of the kernel, imported at its first use, since Gluon differs between Triton's versions.

    Raises:
        ImportError, AttributeError: the installed Triton has no such Gluon.
    """
    from rhythm.kernels import gluon_row as module

    return module


def tile_again() -> Tile:
    """The plain kernel's tile with as many rows as a warpgroup has."""
    return next(tile for tile in TABLES["sm_90"]["row"]["half128"] if tile.rows == HOPPER_GLUON.rows)
