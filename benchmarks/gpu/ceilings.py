"""Measures this GPU's peak rates: matrix products, copies, reads from the L2 cache, and the plain forwards.

The other numbers depend on them: the floors in docs/roofline.md take their rates from data sheets, and a ratio to the
best plain forward means little if that forward is slow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from benchmarks.gpu.clock import Clock, Run, one_line
from benchmarks.gpu.implementations import Implementation
from benchmarks.gpu.report import GpuPart, nvidia_smi
from benchmarks.measure import Timing
from benchmarks.shapes import Shape, make_inputs
from benchmarks.suite import Metric

BLOCK = 4096  # fp32 elements per read
SLOWEST_FORWARD = 500.0  # TFLOP/s below which a ratio to the best plain forward flatters
CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,pstate"


@dataclass(frozen=True)
class Sizes:
    """matmul: rows of square matrices; copied, cached: bytes; passes: reads per program."""

    matmul: int = 8192
    copied: int = 1 << 30
    cached: tuple[int, ...] = (8 << 20, 24 << 20)
    passes: int = 512
    programs: int = 132 * 8


HOPPER = Sizes()


@triton.jit
def read_kernel(x, sums, size, BLOCK: tl.constexpr, PASSES: tl.constexpr):
    """Read PASSES blocks per program, bypassing L1. Their sum is stored, so that no read is optimized away."""
    program = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    for turn in range(PASSES):
        first = ((program * 7 + turn) * BLOCK) % size
        total += tl.load(x + first + tl.arange(0, BLOCK), cache_modifier=".cg")
    tl.store(sums + program, tl.sum(total, 0))


def card_part() -> GpuPart:
    """Report clocks and power before anything runs."""
    answer = nvidia_smi(CLOCKS)
    missing = (f"nvidia-smi: {answer}",) if answer.startswith("not known") else ()
    return GpuPart("card", (), (), (f"{CLOCKS}: {answer}",), missing, facts={"nvidia-smi": {CLOCKS: answer}})


def ceilings_part(
    clock: Clock, sizes: Sizes, shape: Shape, forwards: tuple[Implementation, ...], rounds: int
) -> GpuPart:
    """Measure each peak rate by graph replays; one that fails is listed, and the others are still measured."""
    wanted: dict[str, tuple[Callable[[], Run], float, str]] = {
        f"matmul {sizes.matmul}³, bf16": (lambda: _matmul(clock, sizes), 2 * sizes.matmul**3 / 1e12, "TFLOP/s"),
        "copy, read and written": (lambda: _copy(clock, sizes), 2 * sizes.copied / 1e12, "TB/s"),
    }
    for cached in sizes.cached:
        read = 4 * BLOCK * sizes.passes * sizes.programs / 1e12
        wanted[f"L2 read, {cached >> 20} MB"] = (lambda cached=cached: _read(clock, sizes, cached), read, "TB/s")
    inputs = make_inputs(shape, torch.bfloat16, clock.device, clock.backend)
    absent, failed = [], []
    for one in forwards:
        if (reason := one.absent()) is not None:
            absent.append(f"{one.name}: {reason}")
        else:
            wanted[f"{one.name} {shape}"] = (lambda one=one: one.make(inputs), one.flops(shape) / 1e12, "TFLOP/s")
    rows, table, fastest = [], [], 0.0
    for name, (make, amount, unit) in wanted.items():
        try:
            run = make()
            run()
            timings, reasons = clock.interleaved_replays({name: run}, rounds)
            timing: Timing = timings[name] if name in timings else clock.interleaved({name: run}, rounds)[name]
        except Exception as error:  # a library may be missing, or out of memory
            failed.append(f"{name}: {one_line(error)}")
            continue
        by = "replayed" if name in timings else f"eager ({reasons[name]})"
        rate = amount / timing.median
        rows.append({"name": name, "seconds": timing.median, "rate": rate, "unit": unit, "by": by})
        table.append({"ceiling": name, "ms": f"{1e3 * timing.median:,.3f}", "rate": f"{rate:,.2f} {unit}", "by": by})
        if name.startswith(tuple(one.name for one in forwards)):
            fastest = max(fastest, rate)
    metrics = (Metric("best plain forward", fastest, " TFLOP/s", at_least=SLOWEST_FORWARD),) if fastest else ()
    return GpuPart("ceilings", tuple(rows), metrics, tuple(absent), tuple(failed), table=tuple(table))


def _matmul(clock: Clock, sizes: Sizes) -> Run:
    """Multiply random numbers: products of zeros take less power and run faster."""
    generator = torch.Generator(device=clock.device).manual_seed(0)
    size = (2, sizes.matmul, sizes.matmul)
    a, b = torch.randn(size, generator=generator, device=clock.device).to(torch.bfloat16)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _copy(clock: Clock, sizes: Sizes) -> Run:
    source = torch.ones(sizes.copied, dtype=torch.int8, device=clock.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _read(clock: Clock, sizes: Sizes, cached: int) -> Run:
    x = torch.ones(cached // 4, device=clock.device)
    sums = torch.empty(sizes.programs, device=clock.device)
    return lambda: read_kernel[(sizes.programs,)](x, sums, cached // 4, BLOCK=BLOCK, PASSES=sizes.passes, num_warps=8)
