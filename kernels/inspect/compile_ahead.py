"""Compiles the kernels for GPUs that this machine need not have.

    python -m rhythm.kernels.inspect.compile_ahead --arch sm_90 --json FILE

The launchers themselves run, on tensors without data and with a driver that only names the target, so that the result
is what a launch would compile: every kernel with every tile of the architecture's table, in bf16 and fp32 (row_gluon,
the row sweep in Gluon, for sm_90 and 2-byte types), for a packed batch of Qwen3-4B's heads (32 query heads, 8 key
heads) at head sizes 128 and 256; forms of attention other than plain (--forms) with the default tiles. Reported:
registers, shared memory, programs per multiprocessor, spills and matrix instructions, and for the steady loop the
instructions per score element, the products waited for at once and the barriers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from rhythm.kernels import (
    BlockSums,
    Forms,
    bands,
    column_sums,
    row_answers,
    row_sweep,
    sampled_span,
    tile_tables,
    undefined_results,
)
from rhythm.kernels.arguments import PLAIN
from rhythm.kernels.gluon_choice import gluon_absent, gluon_module, tile_again
from rhythm.kernels.inspect.sass import Binary, amd_binary, nvidia_binary
from rhythm.kernels.launch import compiling, forced
from rhythm.kernels.sequences import Sequences
from rhythm.kernels.softmax import Softmax
from rhythm.kernels.tile_tables import TABLES, KernelKey, Tile, tiles_of

ARCHITECTURES = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ANSWERS = {"row_largest": ("max_logit", "top1"), "row_entropy": ("entropy",), "row_mass": ("prompt_mass",)}
"""Kernels of row_answers.py: each by the names that it is asked for."""
VARIANTS = {"column_max": "column_sums", "column_weighted": "column_sums"} | dict.fromkeys(ANSWERS, "row_answers")
"""Kernels by what is asked of them, each with its name in the tile tables: compiled for plain attention and for all
forms at once."""
OF_PRODUCTS = ("column_max", "row_largest")
"""Kernels whose steady loop has a maximum for each score, and no exponential."""
KERNELS = (*(name for name in tile_tables.KERNELS if name not in VARIANTS.values()), *VARIANTS, "row_gluon", "results")
WITHOUT_TILES = ("results",)
PLAIN_ONLY = ("row_gluon", "results")
"""Kernels that other forms of attention don't have."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENS, QUERY_HEADS, KEY_HEADS = 8192, 32, 8
FORMS = {
    "plain": PLAIN,
    "window": Forms(sliding_window=512),
    "softcap": Forms(softcap=50.0),
    "all": Forms(512, 50.0, torch.empty(QUERY_HEADS, device="meta")),  # q has half of the rows, too
}


@dataclass(frozen=True)
class Report:
    """What one kernel compiled to, with one tile.

    Attributes:
        kernel: one of KERNELS.
        form: one of FORMS.
        tile: None for WITHOUT_TILES, which have no tables.
        default: whether the tile is the one that runs when autotuning is off.
        registers: per thread.
        shared: bytes of shared memory.
        programs: how many share a multiprocessor, by their registers, shared memory and warps.
        spills: see Binary.
        matrix: number of matrix instructions by opcode.
        loop: number of instructions of one pass through the steady loop, by kind; None without such a loop.
        per_score: those numbers per score element that a thread computes in a pass, and their sum as "all".
        immediate_waits: number of wgmma products in that loop that warps wait for before other arithmetic.
        barriers: number of points in that loop at which all warps of the program wait for each other.
    """

    arch: str
    kernel: str
    form: str
    dtype: str
    head_size: int
    tile: Tile | None
    default: bool
    registers: int
    shared: int
    programs: int
    spills: int
    matrix: dict[str, int]
    loop: dict[str, int] | None
    per_score: dict[str, float] | None
    immediate_waits: int | None
    barriers: int | None


@dataclass(frozen=True)
class Multiprocessor:
    """The resources of one multiprocessor, from the vendors' tables of compute capabilities.

    Attributes:
        registers: 32-bit registers per quarter, all lanes counted.
        register_unit: warps get registers in multiples of it.
        warps: limit per quarter.
        shared: bytes of shared memory.
        reserved: bytes of it that the system takes per program.
        shared_unit: programs get shared memory in multiples of it, in bytes.
        programs: limit.
        lanes: threads per warp.
    """

    registers: int
    register_unit: int
    warps: int
    shared: int
    reserved: int
    shared_unit: int
    programs: int
    lanes: int = 32
    quarters: int = 4

    def resident(self, registers: int, shared: int, warps: int) -> int:
        """Programs it holds at once, by their registers per thread, bytes of shared memory and warps."""
        per_warp = -(-registers * self.lanes // self.register_unit) * self.register_unit
        by_warps = min(self.warps, self.registers // max(per_warp, 1)) * self.quarters // warps
        needed = -(-shared // self.shared_unit) * self.shared_unit + self.reserved
        return min(self.programs, by_warps, self.shared // needed if needed else self.programs)


KB = 1024
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(16 * KB, 256, 16, 164 * KB, KB, 128, 32),
    "sm_90": Multiprocessor(16 * KB, 256, 16, 228 * KB, KB, 128, 32),
    "sm_100": Multiprocessor(16 * KB, 256, 16, 228 * KB, KB, 128, 32),
    "gfx942": Multiprocessor(32 * KB, 512, 8, 64 * KB, 0, 512, 16, lanes=64),
}


class _Target:
    """A driver that answers what Triton asks before it compiles, and nothing more."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _active(target: GPUTarget) -> Iterator[None]:
    driver.set_active(_Target(target))
    try:
        yield
    finally:
        if torch.cuda.is_available():  # else there is no driver to go back to
            driver.reset_active()


def compile_kernel(
    arch: str, kernel: str, dtype: str, head_size: int, tiles: Sequence[Tile] | None = None, form: str = "plain"
) -> Iterator[Report]:
    """Compiles one of KERNELS with the given tiles, or with all of the architecture's table, in that order."""
    table = _table(arch, kernel, dtype, head_size, form)
    # A kernel without tiles is compiled once.
    chosen: list[Tile | None] = [*(table if tiles is None else tiles)] or [None]
    for tile in chosen:
        # Triton caches what it compiled by device, not by target.
        for function in jit_functions():
            function.device_caches.clear()
        compiled: list[Any] = []
        only = [] if tile is None else [tile]
        with _active(ARCHITECTURES[arch]), compiling(compiled.append), forced(partial(_always, only)):
            _launch(kernel, DTYPES[dtype], head_size, form)
        binary, *_ = compiled  # after row_gluon comes the plain kernel, for blocks that it leaves
        yield _report(binary, arch, kernel, form, dtype, head_size, tile, not table or tile == table[0])


def _always(tiles: list[Tile], key: KernelKey) -> list[Tile]:
    return tiles


def _table(arch: str, kernel: str, dtype: str, head_size: int, form: str = "plain") -> list[Tile]:
    """The tiles of a kernel; none if it has none, or is not for the architecture, the type or the size."""
    key = KernelKey(VARIANTS.get(kernel, kernel), DTYPES[dtype].itemsize, head_size, form == "plain")
    return tiles_of(arch, key) if key.group in TABLES[arch].get(key.kernel, {}) else []


def jit_functions() -> list[Any]:
    """The kernels as Triton's functions."""
    from rhythm.kernels.bands import bands_kernel
    from rhythm.kernels.column_sums import column_sums_kernel
    from rhythm.kernels.narrow_bands import narrow_bands_kernel
    from rhythm.kernels.results import results_kernel
    from rhythm.kernels.row_answers import row_answers_kernel
    from rhythm.kernels.row_sweep import row_sweep_kernel
    from rhythm.kernels.row_values import row_values_kernel
    from rhythm.kernels.sampled_span import sampled_span_kernel
    from rhythm.kernels.values import mend_output_kernel

    gluon = [] if gluon_absent() else [gluon_module().gluon_row_kernel]
    return [
        *gluon, row_sweep_kernel, row_values_kernel, bands_kernel, narrow_bands_kernel, sampled_span_kernel,
        results_kernel, mend_output_kernel, column_sums_kernel, row_answers_kernel,
    ]  # fmt: skip


def _launch(kernel: str, dtype: torch.dtype, head_size: int, form: str) -> None:
    """Calls the launcher of one of KERNELS with tensors of the meta device."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows = TOKENS // 2 if form == "all" else TOKENS
    q, k = (empty(n, heads, head_size, dtype=dtype) for n, heads in ((rows, QUERY_HEADS), (TOKENS, KEY_HEADS)))
    cu_rows = empty(3, dtype=torch.int32) if form == "all" else None
    sequences = Sequences(empty(3, dtype=torch.int32), empty(2, dtype=torch.int32), TOKENS, 2, cu_rows, rows)
    one, two, three = (empty(QUERY_HEADS, TOKENS) for _ in range(3))
    asked: dict[str, Any]
    softmax = Softmax.empty(QUERY_HEADS, TOKENS, q.device)
    attention: dict[str, Any] = {"scale": head_size**-0.5, "forms": FORMS[form]}
    if kernel == "row_gluon":
        gluon_module().gluon_row_sweep(
            q, k, sequences, one, scale=attention["scale"], softmax=softmax, again=tile_again()
        )  # fmt: skip
    elif kernel in ("row", "row_values"):
        v = None if kernel == "row" else empty(*k.shape, dtype=dtype)
        row_sweep(q, k, v, sequences, one, softmax=softmax, **attention)
    elif kernel in ANSWERS:
        answers, asked = empty(len(ANSWERS[kernel]), *one.shape), {"first": 4, "prompt_rows": False, "softmax": softmax}
        row_answers(q, k, one, sequences, answers, ANSWERS[kernel], **asked, **attention)
    elif kernel in ("column_max", "column_weighted"):
        reduce, factors = ("max", None) if kernel == "column_max" else ("sum", two)
        asked = {"reduce": reduce, "factors_HT": factors, "horizon": (0, None), "softmax": softmax}
        column_sums(q, k, one, sequences, three, **asked, **attention)
    elif kernel == "sampled":
        sampled_span(q, k, one, sequences, count=256, **attention)
    elif kernel == "results":
        undefined_results(sequences.count, QUERY_HEADS, TOKENS, q.device, None)
    else:
        horizon = (10, 50) if kernel.endswith("_band") else (10, None)
        near: dict[str, Any] = {"window": 10, "horizon": horizon, **attention}
        if kernel.startswith("bands"):
            bands(q, k, one, sequences, two, three, empty(*one.shape), **near)
        else:
            sums = BlockSums(empty(sequences.blocks(128), QUERY_HEADS, dtype=torch.float64), 128, from_prompt=True)
            near |= {"softmax": softmax, "sums": sums, "span_BH": empty(sequences.count, QUERY_HEADS)}
            bands(q, k, one, sequences, two, three, None, **near)


def _report(
    compiled: Any, arch: str, kernel: str, form: str, dtype: str, head_size: int, tile: Tile | None, default: bool
) -> Report:
    target = ARCHITECTURES[arch]
    amd = target.backend == "hip"
    binary: Binary = amd_binary(compiled.asm["amdgcn"]) if amd else nvidia_binary(compiled.asm["cubin"])
    loop = per_score = waits = barriers = None
    once = "max" if kernel in OF_PRODUCTS else "exp2"  # what each score takes one of
    if tile is not None and (steady := binary.leanest(once)) is not None:
        loop, waits, barriers = steady.mix(binary.kinds), steady.immediate_waits, steady.barriers
        scores = tile.rows * tile.keys / (tile.warps * target.warp_size)
        # A loop that the compiler unrolled computes several tiles. Maxima don't tell: a softcap has others.
        if once == "exp2":
            scores *= max(1, round(loop[once] / scores))
        per_score = {kind: round(count / scores, 3) for kind, count in loop.items()}
        per_score["all"] = round(sum(loop.values()) / scores, 3)
    registers, shared = binary.registers, compiled.metadata.shared
    programs = MULTIPROCESSORS[arch].resident(registers, shared, compiled.metadata.num_warps)
    return Report(
        arch, kernel, form, dtype, head_size, tile, default, registers, shared, programs, binary.spills, binary.matrix,
        loop, per_score, waits, barriers,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rhythm.kernels.inspect.compile_ahead", description=__doc__)
    parser.add_argument("--arch", default="sm_80,sm_90,sm_100", help=f"some of {','.join(ARCHITECTURES)}")
    parser.add_argument("--kernels", default=",".join(KERNELS), help=f"some of {','.join(KERNELS)}")
    parser.add_argument("--forms", default=",".join(FORMS), help=f"some of {','.join(FORMS)}")
    parser.add_argument("--dtypes", default="bf16,fp32", help=f"some of {','.join(DTYPES)}")
    parser.add_argument("--head-sizes", default="128,256", help="powers of two from 16 to 256")
    parser.add_argument("--defaults", action="store_true", help="only the tiles that run when autotuning is off")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports to this file")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: kernels are interpreted, not compiled; unset it")
    names = {
        "--arch": (options.arch.split(","), ARCHITECTURES),
        "--kernels": (options.kernels.split(","), KERNELS),
        "--forms": (options.forms.split(","), FORMS),
        "--dtypes": (options.dtypes.split(","), DTYPES),
        "--head-sizes": (options.head_sizes.split(","), ("16", "32", "64", "128", "256")),
    }
    for option, (given, allowed) in names.items():
        if unknown := [name for name in given if name not in allowed]:
            parser.error(f"{option} names {unknown[0]!r}; allowed are {', '.join(allowed)}")
    (archs, _), (kernels, _), (forms, _), (dtypes, _), (sizes, _) = names.values()

    reports: list[Report] = []
    for arch in archs:
        print(f"{arch}, Triton {triton.__version__}")
        print(HEADER)
        for kernel, form in product(kernels, forms):
            with_tiles = kernel not in WITHOUT_TILES
            if form != "plain" and (kernel in PLAIN_ONLY or (kernel in VARIANTS and form != "all")):
                continue
            if kernel == "row_gluon" and (reason := gluon_absent()) is not None:
                parser.error(f"row_gluon does not compile here: {reason}; --kernels chooses others")
            for dtype in dtypes if with_tiles else ["fp32"]:
                for size in map(int, sizes if with_tiles else sizes[:1]):
                    table = _table(arch, kernel, dtype, size, form)
                    if with_tiles and not table:
                        continue
                    tiles = table[:1] if options.defaults else None
                    for report in compile_kernel(arch, kernel, dtype, size, tiles, form):
                        print(_row(report), flush=True)
                        reports.append(report)
    if options.json:
        head = {"triton": triton.__version__, "tokens": TOKENS, "heads": [QUERY_HEADS, KEY_HEADS]}
        lines = ",\n".join(json.dumps(_record(report)) for report in reports)  # one per line: readable as a diff
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(f'{json.dumps(head)[:-1]}, "kernels": [\n{lines}\n]}}\n', encoding="utf-8")
    return 0


def _record(report: Report) -> dict[str, Any]:
    return asdict(report) | {"tile": None if report.tile is None else report.tile._asdict()}


HEADER = (
    f"{'kernel':<16}{'form':<8}{'type':<6}{'D':>4}  {'rows×keys, warps, stages':<26}{'regs':>5}{'shared':>8}"
    f"{'per SM':>7}{'spills':>7}{'waits':>6}{'barriers':>9}{'per score: all':>15}{'exp2':>6}{'fma':>6}{'other':>6}"
    "  matrix instructions"
)


def _row(report: Report) -> str:
    tile = report.tile
    name = f"{tile.rows}×{tile.keys}, {tile.warps}, {tile.stages}{', TMA' if tile.tma else ''}" if tile else ""
    loop = report.per_score or {}
    rest = loop and loop["all"] - loop["exp2"] - loop["fma"]
    figures = (
        "".join(f"{x:>{w}.2f}" for x, w in ((loop["all"], 15), (loop["exp2"], 6), (loop["fma"], 6), (rest, 6)))
        if loop
        else " " * 33
    )
    matrix = ", ".join(f"{count} {opcode}" for opcode, count in report.matrix.items())
    return (
        f"{report.kernel:<16}{report.form:<8}{report.dtype:<6}{report.head_size:>4}  "
        f"{name + (' *' if report.default else ''):<26}"
        f"{report.registers:>5}{report.shared:>8}{report.programs:>7}{report.spills:>7}"
        f"{_blank(report.immediate_waits):>6}{_blank(report.barriers):>9}{figures}  {matrix}"
    )


def _blank(number: int | None) -> str:
    return "" if number is None else str(number)


if __name__ == "__main__":
    sys.exit(main())
