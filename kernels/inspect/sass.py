"""Reads compiled kernels: registers, spills, matrix instructions, and the steady loop by kinds of instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import triton

# Kinds of instructions, by the first pattern that matches; the rest is "other" (addresses, branches, barriers, moves).
NVIDIA_KINDS = {
    "exp2": r"MUFU\.EX2",
    "fma": r"FFMA",
    "add": r"FADD",
    "multiply": r"FMUL",
    "max": r"FMNMX",
    "select": r"FSEL|FSETP|SEL\b|ISETP|I2FP?",
    "matrix": r"HGMMA|QGMMA|WGMMA|HMMA|UTC\w*MMA",
    "load": r"LD|UTMALDG|UBLKCP|TMEM",
    "shuffle": r"SHFL",
}
AMD_KINDS = {
    "exp2": r"v_exp_f32",
    "fma": r"v_(pk_)?(fma|fmac|mac)",
    "add": r"v_(pk_)?(add|sub)_f32",
    "multiply": r"v_(pk_)?mul_f32",
    "max": r"v_(pk_)?max",
    "select": r"v_cndmask|v_cmp|v_cvt",
    "matrix": r"v_mfma|v_smfmac",
    "load": r"buffer_load|global_load|ds_read|s_load",
    "shuffle": r"ds_bpermute|ds_swizzle|.*_dpp|v_permlane",
}

ARITHMETIC = r"MUFU|FFMA|FADD|FMUL|FMNMX"


@dataclass(frozen=True)
class Loop:
    """The opcodes of a loop, in order."""

    opcodes: tuple[str, ...]

    @property
    def immediate_waits(self) -> int:
        """Number of wgmma products that warps wait for without arithmetic of their own in the meantime."""
        waits, alone = 0, False
        for opcode in self.opcodes:
            if re.match(r"[HQ]GMMA", opcode):
                alone = True
            elif opcode.startswith("WARPGROUP.DEPBAR"):
                waits += alone and opcode.endswith(", 0x0")
                alone = False
            elif re.match(ARITHMETIC, opcode):
                alone = False
        return waits

    @property
    def barriers(self) -> int:
        """Number of points at which all warps of a program wait for each other."""
        return sum(opcode.startswith(("BAR.", "s_barrier")) for opcode in self.opcodes)

    def mix(self, kinds: dict[str, str]) -> dict[str, int]:
        """Number of instructions of each kind."""
        counts = Counter(kind_of(opcode, kinds) for opcode in self.opcodes)
        return {kind: counts[kind] for kind in (*kinds, "other")}


@dataclass(frozen=True)
class Binary:
    """A kernel for one architecture. `spills` are instructions that move registers to local memory or back."""

    registers: int
    spills: int
    matrix: dict[str, int]
    loops: tuple[Loop, ...]
    kinds: dict[str, str]

    @property
    def steady(self) -> Loop | None:
        """The loop with the fewest instructions per exponential, which is the one without masks."""
        return self.leanest("exp2")

    def leanest(self, kind: str) -> Loop | None:
        """The loop with the fewest instructions per instruction of a kind."""
        loops = [loop for loop in self.loops if loop.mix(self.kinds)[kind]]
        return min(loops, key=lambda loop: len(loop.opcodes) / loop.mix(self.kinds)[kind], default=None)


def kind_of(opcode: str, kinds: dict[str, str]) -> str:
    return next((kind for kind, pattern in kinds.items() if re.match(pattern, opcode)), "other")


def nvidia_binary(cubin: bytes) -> Binary:
    """Reads a cubin, with the cuobjdump and nvdisasm of Triton's package."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(tools / "cuobjdump", "-res-usage", file.name)
        text = _run(tools / "nvdisasm", "-c", file.name)
    opcodes, loops = parse(text, nvidia_line)
    return Binary(
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        spills=sum(opcode.startswith(("STL", "LDL")) for opcode in opcodes),
        matrix=dict(Counter(o for o in opcodes if kind_of(o, NVIDIA_KINDS) == "matrix")),
        loops=loops,
        kinds=NVIDIA_KINDS,
    )


def amd_binary(text: str) -> Binary:
    """Reads AMD's assembler text."""
    opcodes, loops = parse(text, amd_line)
    return Binary(
        registers=int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[0]),
        spills=int(re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)[0]),
        matrix=dict(Counter(o for o in opcodes if kind_of(o, AMD_KINDS) == "matrix")),
        loops=loops,
        kinds=AMD_KINDS,
    )


# (label, opcode, label that the opcode may jump to) of a line of assembler.
Line = tuple[str | None, str | None, str | None]


def nvidia_line(line: str) -> Line:
    if label := re.match(r"(\.L_x?_?\d+):", line):
        return label[1], None, None
    if instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Za-z0-9_.]*)(.*)", line):
        target = re.search(r"`\((\.L_x?_?\d+)\)", instruction[2]) if instruction[1].startswith("BRA") else None
        # A wait's operands say how many products may remain in flight.
        name = instruction[1] + (instruction[2].partition(";")[0].rstrip() if "DEPBAR" in instruction[1] else "")
        return None, name, target[1] if target else None
    return None, None, None


def amd_line(line: str) -> Line:
    if label := re.match(r"(\.?LBB\d+_\d+):", line):
        return label[1], None, None
    if instruction := re.match(r"\s+([a-z]\w+)(?:\s+(.*))?$", line):
        target = re.match(r"\.?LBB\d+_\d+", instruction[2] or "") if "branch" in instruction[1] else None
        return None, instruction[1], target[0] if target else None
    return None, None, None


def parse(text: str, read: Callable[[str], Line]) -> tuple[list[str], tuple[Loop, ...]]:
    """Returns all opcodes, and the loops: the opcodes between a label and a jump back to it."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in text.splitlines():
        label, opcode, target = read(line)
        if label is not None:
            labels[label] = len(opcodes)
        if opcode is not None:
            opcodes.append(opcode)
        if target in labels:
            loops.append(Loop(tuple(opcodes[labels[target] :])))
    return opcodes, tuple(loops)


def _run(tool: Path, *arguments: str) -> str:
    return subprocess.run([str(tool), *arguments], check=True, capture_output=True, text=True).stdout
