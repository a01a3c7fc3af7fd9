"""Profiles calls: time per kernel by torch's profiler, hardware counters of single kernels by Nsight Compute."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import ROOT
from benchmarks.gpu.clock import Budget, Clock, one_line
from benchmarks.gpu.implementations import Implementation
from benchmarks.gpu.report import GpuPart
from benchmarks.shapes import Shape, make_inputs

CALLS = 5
SECONDS = 60.0  # limit for ncu per kernel
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats")
COUNTERS = (
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "lts__t_bytes.sum",
    "l1tex__m_xbar2l1tex_read_bytes.sum",
    "sm__cycles_elapsed.max",
)


@dataclass(frozen=True)
class Counted:
    """A kernel whose counters are read: the implementation that runs it, and a pattern of its name."""

    implementation: str
    kernel: str


COUNTED = (
    Counted("statistics", "row_sweep"),
    Counted("bands", "bands"),
    Counted("sdpa_cudnn", "."),
    Counted("with_output", "row_values"),
)


def kernels_part(implementations: Sequence[Implementation], shape: Shape, clock: Clock) -> GpuPart:
    """torch.profiler: seconds per call of every kernel of an implementation."""
    inputs = make_inputs(shape, torch.bfloat16, clock.device, clock.backend)
    rows, failed = [], []
    for one in implementations:
        if one.absent() is not None:
            continue
        try:
            rows += [{"op": one.name} | row for row in profiled(one.make(inputs), clock)]
        except Exception as error:  # the profiler may lack permission
            failed.append(f"{one.name}: {one_line(error)}")
    table = tuple(
        {
            "op": r["op"],
            "kernel": r["kernel"][:70],
            "calls": str(r["calls"]),
            "µs per call": f"{1e6 * r['seconds']:,.1f}",
        }
        for r in rows
    )
    return GpuPart("kernels", tuple(rows), (), (), tuple(failed), table=table)


def profiled(run: Callable[[], Any], clock: Clock) -> list[dict[str, Any]]:
    """One row per kernel, slowest first: its name, launches per call, seconds per call."""
    on_gpu = clock.device == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    calls = CALLS if on_gpu else 1
    run()
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(calls):
            run()
        if on_gpu:
            torch.cuda.synchronize()
    rows = []
    for event in profile.key_averages():
        micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        rows.append({"kernel": event.key, "calls": event.count / calls, "seconds": micros / calls / 1e6})
    return sorted(rows, key=lambda row: -row["seconds"])[:8]


def counters_part(device: str, budget: Budget) -> GpuPart:
    """Run ncu on one launch of each kernel, in a separate process, without locking the clocks."""
    ncu = shutil.which("ncu")
    if ncu is None:
        return GpuPart("counters", not_measured=("ncu: the command ncu (Nsight Compute) is not on the PATH",))
    outputs, failed = {}, []
    for counted in COUNTED:
        name = f"{counted.implementation}, {counted.kernel}"
        if budget.left < SECONDS / 2:
            failed.append(f"{name}: budget")
            continue
        command = [ncu, "--clock-control", "none", "--launch-skip", "3", "-c", "1", "-k", f"regex:{counted.kernel}"]
        command += [word for section in SECTIONS for word in ("--section", section)]
        command += ["--metrics", ",".join(COUNTERS)]
        command += [sys.executable, "-P", "-m", "benchmarks.gpu.profile", counted.implementation, device]
        try:
            seconds = min(SECONDS, budget.left)
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
        except (OSError, subprocess.SubprocessError) as error:
            failed.append(f"{name}: {one_line(error)}")
            continue
        lines = done.stdout.strip().splitlines()
        if done.returncode != 0 or not any("==PROF==" not in line for line in lines):
            failed.append(f"{name}: ncu ended with {done.returncode}: {(lines or [done.stderr.strip()])[-1]}")
        else:
            outputs[name] = lines
    return GpuPart(
        "counters",
        (),
        (),
        tuple(f"{name}: {len(text)} lines" for name, text in outputs.items()),
        tuple(failed),
        facts={"ncu": outputs},
    )


def main(implementation: str, device: str) -> None:
    """Call an implementation six times under ncu: python -m benchmarks.gpu.profile statistics cuda."""
    from benchmarks.gpu.suite import INTERPRETED, GpuSettings

    settings = GpuSettings() if device == "cuda" else INTERPRETED
    on, backend = ("cuda", "triton") if device == "cuda" else ("cpu", "triton")
    (one,) = (one for one in settings.implementations if one.name == implementation)
    run = one.make(make_inputs(settings.shape, torch.bfloat16, on, backend))
    for _ in range(6):
        run()
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
