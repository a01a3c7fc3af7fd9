"""gpu-record: the correctness check, then the parts that the budget allows; the record is written after each."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from benchmarks.gpu.clock import Budget, clock_of
from benchmarks.gpu.report import Console, Report
from benchmarks.gpu.suite import INTERPRETED, GpuSettings, check, parts, refusals
from benchmarks.verify import WrongResultError


def run(device: str, records: Path | None, console: Console, errors: Console, budget: Budget) -> int:
    """Run everything on `device` (cuda, interpreter or rehearsal); write a record if `records` is given.

    Returns the exit code. 1: a result or an op of rhythm is wrong or failed. 2: there is no such device.
    """
    clock = clock_of(device)
    if clock is None:
        errors.print("--device cuda: torch sees no CUDA device", style="red")
        return 2
    settings = GpuSettings() if device == "cuda" else INTERPRETED
    report = Report(clock, f"attention_{device}.json", records, console, errors)
    try:
        passed = check(settings, clock)
    except WrongResultError as error:
        report.complain(f"The correctness check failed: no number is reported.\n{error}")
        return 1
    report.record["correctness"] = [
        {"shape": asdict(shape), "dtype": dtype, "results": {f"{v.op} {v.result}": f"{v.error:.1e}" for v in results}}
        for shape, dtype, results in passed
    ]
    report.say(f"{sum(len(v) for *_, v in passed)} results agree with the reference\n")
    report.run(parts(settings, clock, refusals(settings, clock), budget), budget)
    return report.end()
