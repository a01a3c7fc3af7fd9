"""The CPU kernels in a process of their own, in place of rhythm._C, for the ops' tests on kernels compiled for
another processor: `pytest --kernels "qemu-aarch64 build/arm64/kernel_server"`.

The process is ops/kernel_server.cpp, which says what goes over its pipes.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import rhythm
from rhythm.ops.backends import cpu

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes; in the order of csrc's DType
REDUCTIONS = ("mean", "sum", "max")
ALSO = ("max_logit", "top1", "entropy", "first_mass", "prompt_mass")
Address = tuple[int, int]
"""(address, bytes); 0 bytes: none."""


class KernelServer:
    """What rhythm._C has, computed by a process that `command` starts."""

    to_the_end = -1

    def __init__(self, command: str) -> None:
        self._process = subprocess.Popen(shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._one_call_at_a_time = threading.Lock()

    def available_isas(self) -> list[str]:
        # Whatever is forced: an unknown set must not keep the others from being named.
        return self._ask(b"", "")[0].split()

    def selected_isa(self) -> str:
        return self._ask(b"")[1]

    def close(self) -> None:
        self._process.communicate()

    def attention_statistics(self, **given: Any) -> None:
        """Reads and writes the memory that `given` points to, as rhythm._C does."""
        heads, bounds, rows, bytes_each = given["heads"], given["bounds"], given["row_bounds"], DTYPES[given["dtype"]]
        firsts = [
            end - start - (row_end - row)
            for (start, end), (row, row_end) in zip(pairwise(bounds), pairwise(rows), strict=True)
        ]
        spans = {
            "q": [(first, end - start) for first, (start, end) in zip(firsts, pairwise(bounds), strict=True)],
            "k": [(0, end - start) for start, end in pairwise(bounds)],
        }
        per_row = 4 * heads[0] * bounds[-1]
        factors, factors_stride = given["row_weights"]
        outputs = [
            (given["row_span"], per_row),
            (given["waad"], per_row * len(given["windows"])),
            (given["fai"], per_row * len(given["horizons"])),
            (given["lse"], per_row),
            *((given["also"].get(name, 0), per_row) for name in ALSO),
            (given["out"], bytes_each * heads[0] * heads[2] * rows[-1]),
        ]
        call = [
            _numbers(list(DTYPES).index(given["dtype"]), REDUCTIONS.index(given["reduce"]), given["first"]),
            _numbers(given["prompt_rows"], given["threads"]),
            *map(_counted, (heads, bounds, given["prompt_lens"], rows, given["windows"], sum(given["horizons"], ()))),
            _numbers(given["sliding_window"], factors_stride),
            bytes(ctypes.c_float(given["scale"])),
            bytes(ctypes.c_float(given["softcap"])),
            _view(given["q"], spans["q"], heads[0], heads[2], bytes_each),
            _view(given["k"], spans["k"], heads[1], heads[2], bytes_each),
            _view(given["v"], spans["k"], heads[1], heads[2], bytes_each),
            *map(_block, ((given["sinks"], 4 * heads[0]), (factors, per_row if factors_stride else 4 * bounds[-1]))),
            _block((given["given_lse"], per_row)),
            *map(_block, outputs),
        ]
        self._ask(b"".join(call), outputs=[(address, count) for address, count in outputs if address])

    def _ask(self, call: bytes, forced: str | None = None, outputs: Sequence[Address] = ()) -> tuple[str, str]:
        """(instruction sets, the one in use); RuntimeError with the server's words if it had an error."""
        isa = (os.environ.get("RHYTHM_CPU_ISA", "") if forced is None else forced).encode()
        with self._one_call_at_a_time:
            assert self._process.stdin is not None
            self._process.stdin.write(_numbers(len(isa)) + isa + _numbers(bool(call)) + call)
            self._process.stdin.flush()
            error, names, selected = (self._read(int.from_bytes(self._read(8), sys.byteorder)) for _ in range(3))
            for address, count in outputs:
                ctypes.memmove(address, self._read(count), count)
        if error:
            raise RuntimeError(error.decode())
        return names.decode(), selected.decode()

    def _read(self, count: int) -> bytes:
        assert self._process.stdout is not None
        words = self._process.stdout.read(count)
        assert len(words) == count, f"the kernels' process ended with {self._process.wait()}"
        return words


def put_in_place(server: KernelServer) -> None:
    """From here on the ops call it, and `from rhythm import _C` gives it."""
    sys.modules["rhythm._C"] = rhythm._C = cpu._C = server  # type: ignore[assignment]


def _numbers(*values: int) -> bytes:
    return b"".join(int(value).to_bytes(8, sys.byteorder, signed=True) for value in values)


def _counted(values: Sequence[int]) -> bytes:
    return _numbers(len(values), *values)


def _block(memory: Address) -> bytes:
    address, count = memory
    return _numbers(count) + ctypes.string_at(address, count) if address else _numbers(0)


def _view(view: Any, spans: Sequence[tuple[int, int]], heads: int, size: int, bytes_each: int) -> bytes:
    """The memory from its first element to its last. spans: the tokens of each sequence that it holds."""
    if view is None:
        return _numbers(0, 0) + _counted((0, 0, 0))
    address, offsets, (token, head, dim) = view
    held = [(offset, *span) for offset, span in zip(offsets, spans, strict=True) if span[0] < span[1]]
    low = min((offset + first * token for offset, first, _ in held), default=0)
    high = (
        max((offset + (end - 1) * token for offset, _, end in held), default=-1) + (heads - 1) * head + (size - 1) * dim
    )
    memory = _block((address + low * bytes_each, (high + 1 - low) * bytes_each if held else 0))
    return memory + _counted([offset - low for offset in offsets]) + _counted((token, head, dim))
