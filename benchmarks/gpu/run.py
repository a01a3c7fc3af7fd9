"""One run on a GPU: the gate, then the parts that the budget has room for; the record is written after each."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gpu.clock import Budget, Clock, CudaClock, InterpreterClock
from benchmarks.gpu.suite import INTERPRETED, Part, Settings, check, parts
from benchmarks.record import commit, software, write_record
from benchmarks.verify import GateError

PACKAGES = ("triton", "transformers", "flash_attn", "flash-colreduce")


def run(device: str, records: Path | None, console: Console, errors: Console, budget: Budget) -> int:
    """`device`: cuda or interpreter; no record without `records`. Gives the exit code, 1 if a result is wrong."""
    if device == "cuda" and not torch.cuda.is_available():
        errors.print("--device cuda: torch sees no CUDA device", style="red")
        return 2
    clock: Clock = CudaClock() if device == "cuda" else InterpreterClock()
    settings = Settings() if device == "cuda" else INTERPRETED
    record: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(clock),
        "software": software() | versions(),
        "commit": commit(),
        "parts": {},
        "not_measured": [],
    }
    console.print(", ".join(f"{key} {value}" for key, value in (record["machine"] | record["software"]).items()))
    try:
        with console.status("checking every op against the reference in fp64"):
            passed = check(settings, clock)
    except GateError as error:
        errors.print(f"The gate is closed: no number is reported.\n{error}", style="red", markup=False)
        return 1
    record["gate"] = [
        {"shape": asdict(shape), "dtype": dtype, "results": {f"{v.op} {v.result}": f"{v.error:.1e}" for v in verdicts}}
        for shape, dtype, verdicts in passed
    ]
    console.print(f"{sum(len(v) for *_, v in passed)} results agree with the reference\n")
    path = None if records is None else records / _folder(record["machine"]["name"]) / f"attention_{device}.json"
    for name, needed, part in parts(settings, clock):
        if budget.left < needed:
            record["not_measured"].append(f"{name}: budget")
            console.print(f"not measured: {name}, because {budget.left:.0f} s of the budget are left")
        else:
            with console.status(f"timing {name}"):
                measured = part()
            show(console, measured)
            record["parts"][name] = measured.json()
        if path is not None:
            write_record(path, record)
    if path is not None:
        console.print(f"written: {path}", soft_wrap=True)
    return 0


def machine(clock: Clock) -> dict[str, Any]:
    """The GPU by name, multiprocessors, memory, capability and driver; on the CPU that it is the interpreter."""
    if clock.device != "cuda":
        return {"name": "interpreter"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "driver and clocks": _nvidia_smi(),
        "cuda": torch.version.cuda,
    }


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def show(console: Console, part: Part) -> None:
    table = Table(title=part.name, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in ("op", "T", "ms", "fastest", "slowest", "TFLOP/s", "MB beyond inputs", "over the best forward"):
        table.add_column(column, justify="left" if column == "op" else "right")
    for row in part.rows:
        times = [f"{1e3 * seconds:,.3f}" for seconds in (row.seconds, row.seconds_min, row.seconds_max)]
        share = "" if row.to_best_forward is None else f"{row.to_best_forward:.3f}"
        table.add_row(row.op, str(row.tokens), *times, f"{row.tflops:.1f}", f"{row.peak_bytes / 1e6:,.1f}", share)
    if part.rows:
        console.print(table)
    for claim in part.claims:
        mark = {None: " ", True: "✓", False: "✗"}[claim.met]
        aim = claim.at_most if claim.at_least is None else claim.at_least
        told = "" if aim is None else f"  (aim {'≤' if claim.at_least is None else '≥'} {aim:g})"
        console.print(f"  {mark} {claim.name}: {claim.value:.3f}{claim.unit}{told}", soft_wrap=True)
    for reason in part.absent:
        console.print(f"  {reason}", soft_wrap=True, markup=False)
    console.print()


def _nvidia_smi() -> str:
    query = [
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit",
        "--format=csv,noheader",
    ]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        return f"not known: {error}"


def _folder(name: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")
