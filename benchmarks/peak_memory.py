"""python -m benchmarks.peak_memory OP TOKENS DTYPE THREADS: prints the peak bytes of one call in addition to its
inputs.

It runs in a separate process, because Linux reports the peak per process; the peak is reset before the call.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

from benchmarks.measure import PEAK_RESET
from benchmarks.registry import REGISTRY
from benchmarks.shapes import Shape, make_inputs


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (the peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def main(op: str, tokens: str, dtype_name: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    dtype = getattr(torch, dtype_name)
    make = REGISTRY[op].make
    make(make_inputs(Shape(512), dtype))()  # so that what is loaded or allocated once doesn't count
    run = make(make_inputs(Shape(int(tokens)), dtype))
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the C library keeps would hide what the call takes
    PEAK_RESET.write_text("5")
    before = resident_bytes("VmRSS")
    run()
    print(resident_bytes("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
