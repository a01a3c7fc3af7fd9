"""python -m benchmarks.gpu.prototypes.compile_ahead [NAME ...]: compiles the prototypes for sm_90.

The prototypes run on meta tensors with the launcher set to compile only, so no GPU is needed. Reported per kernel:
registers, shared memory, spills, and the steady loop's instructions per score, counted in SASS.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.gpu.prototypes import Prototype, prototypes
from benchmarks.shapes import Inputs, Shape
from rhythm.kernels.inspect.compile_ahead import ARCHITECTURES, _active
from rhythm.kernels.inspect.sass import nvidia_binary
from rhythm.kernels.launch import compiling

SHAPE = Shape(8192, query_heads=32, key_heads=8, head_size=128)


@dataclass(frozen=True)
class Report:
    """One kernel of a prototype, compiled.

    Attributes:
        registers: per thread at launch; warpgroups may request more.
        shared: bytes of shared memory.
        spills: instructions that move registers to local memory or back.
        loop_spills: the spills in the steady loop, or in another warpgroup's copy of it.
        per_score: instructions of the steady loop per score, by kind; their sum is "all".
    """

    prototype: str
    kernel: str
    registers: int
    shared: int
    spills: int
    loop_spills: int
    per_score: dict[str, float]


def compile_prototype(prototype: Prototype) -> list[Report]:
    """Compile the prototype's kernels; one report per kernel, in launch order."""

    def empty(heads: int) -> torch.Tensor:
        return torch.empty((SHAPE.tokens, heads, SHAPE.head_size), dtype=torch.bfloat16, device="meta")

    inputs = Inputs(SHAPE, empty(SHAPE.query_heads), empty(SHAPE.key_heads), empty(SHAPE.key_heads), "triton")
    kernels: list[Any] = []
    with _active(ARCHITECTURES["sm_90"]), compiling(kernels.append):
        prototype.make(inputs)()
    return [_report(prototype.name, kernel) for kernel in kernels]


def _report(name: str, kernel: Any) -> Report:
    binary = nvidia_binary(kernel.asm["cubin"])
    assert binary.steady is not None
    loop = binary.steady.mix(binary.kinds)
    # A thread takes a power of two of scores in a pass; rescaling takes exponentials too, but fewer.
    scores = 1 << (loop["exp2"].bit_length() - 1)
    per_score = {kind: round(count / scores, 3) for kind, count in loop.items()}
    per_score["all"] = round(sum(loop.values()) / scores, 3)
    # The same loop in other warpgroups, not those around it.
    copies = [
        other
        for other in binary.loops
        if other.mix(binary.kinds)["exp2"] == loop["exp2"] and len(other.opcodes) < 1.2 * sum(loop.values())
    ]
    loop_spills = sum(opcode.startswith(("STL", "LDL")) for copy in copies for opcode in copy.opcodes)
    return Report(
        name, kernel.name, binary.registers, kernel.metadata.shared, binary.spills, loop_spills, per_score
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.prototypes.compile_ahead", description=__doc__)
    known = {prototype.name: prototype for prototype in prototypes()}
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(known)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports to this file")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: kernels are interpreted, not compiled; unset it")
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"no prototype is named {unknown[0]!r}; there are {', '.join(known)}")
    print(f"sm_90, {SHAPE}, bf16, Triton {triton.__version__}\n{HEADER}")
    reports: list[Report] = []
    for name in options.names or known:
        for report in compile_prototype(known[name]):
            print(_row(report), flush=True)
            reports.append(report)
    if options.json:
        options.json.write_text(json.dumps([asdict(report) for report in reports], indent=1) + "\n", encoding="utf-8")
    return 0


KINDS = ("all", "exp2", "fma", "add", "multiply", "max", "shuffle")
HEADER = f"{'prototype':<20} {'kernel':<20} {'regs':>4} {'shared':>7} {'spills':>6} {'in loop':>7}   " + "".join(
    f"{kind:>9}" for kind in KINDS
)


def _row(report: Report) -> str:
    counts = "".join(f"{report.per_score[kind]:>9.2f}" for kind in KINDS)
    return (
        f"{report.prototype:<20} {report.kernel:<20} {report.registers:>4} {report.shared:>7} {report.spills:>6} "
        f"{report.loop_spills:>7}   "
        f"{counts}"
    )


if __name__ == "__main__":
    sys.exit(main())
