"""Prints and records the parts of a run. The record is written after each part, so a failing part loses no other.

This module and its imports need only torch, Triton and NumPy, since a GPU machine may have little else.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.gpu.clock import Budget, Clock, one_line
from benchmarks.record import commit, software, write_record
from benchmarks.suite import Metric

PACKAGES = ("triton", "transformers", "flash_attn", "flash-colreduce", "flash-attn-4", "nvidia-cudnn-cu13")


class Console(Protocol):
    """The part of rich's Console that is used here."""

    def print(self, *objects: Any, **options: Any) -> None: ...


class Plain:
    """Prints lines on standard output, without rich."""

    def print(self, *objects: Any, **options: Any) -> None:
        print(*objects, flush=True)


@dataclass(frozen=True)
class GpuPart:
    """The results of one part of a run.

    Attributes:
        table: the printed text, one row per implementation or fact, all with the same keys; not recorded.
        rows: the recorded form of the table: numbers as measured.
        absent: what can't run on this machine or at this length, and why; notes.
        not_measured: "what: why" of what should have run, but failed or did not fit.
        failed: whether an op of rhythm failed.
        facts: further entries of the record.
    """

    name: str
    rows: tuple[dict[str, Any], ...] = ()
    metrics: tuple[Metric, ...] = ()
    absent: tuple[str, ...] = ()
    not_measured: tuple[str, ...] = ()
    failed: bool = False
    table: tuple[dict[str, str], ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        metrics = [asdict(metric) | {"met": metric.met} for metric in self.metrics]
        return {"rows": list(self.rows), "metrics": metrics, "absent": list(self.absent)} | self.facts


@dataclass(frozen=True)
class Planned:
    """A part to be run. needed: seconds that must be left in the budget for it to start."""

    name: str
    needed: float
    run: Callable[[], GpuPart]


class Report:
    """The record of one command."""

    def __init__(self, clock: Clock, file: str, records: Path | None, console: Console, errors: Console) -> None:
        self._clock, self._console, self._errors = clock, console, errors
        self.failed = False
        self.record: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(clock),
            "software": software() | versions(),
            "commit": commit(),
            "parts": {},
            "not_measured": [],
        }
        self.path = None if records is None else records / folder(self.record["machine"]["name"]) / file
        self.say(
            ", ".join(f"{key} {value}" for key, value in (self.record["machine"] | self.record["software"]).items())
        )

    def run(self, parts: Sequence[Planned], budget: Budget) -> None:
        """Run every part that the budget allows; the record is written after each."""
        for planned in parts:
            left = budget.left
            if left < planned.needed:
                self.record["not_measured"].append(f"{planned.name}: budget")
                self.say(f"not measured: {planned.name}, because only {left:.0f} s of the budget are left")
            else:
                self._add(planned)
            self.write()

    def write(self) -> None:
        if self.path is not None:
            write_record(self.path, self.record)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def complain(self, text: str) -> None:
        self._errors.print(text, style="red", markup=False, highlight=False, soft_wrap=True)

    def end(self) -> int:
        """Print where the record is. Returns the exit code: 1 if an op of rhythm failed."""
        if self.path is not None:
            self.say(f"written: {self.path}")
        return int(self.failed)

    def _add(self, planned: Planned) -> None:
        try:
            self._clock.free()
            part = planned.run()
        except Exception as error:  # no part may lose the record of the others
            self.failed = True
            self.record["not_measured"].append(f"{planned.name}: {one_line(error)}")
            self.complain(f"{planned.name} failed:\n{traceback.format_exc()}")
            return
        self.failed = self.failed or part.failed
        self.record["parts"][planned.name] = part.json()
        self.record["not_measured"] += [f"{planned.name}, {reason}" for reason in part.not_measured]
        self.say("\n".join(lines(part)))


def lines(part: GpuPart) -> list[str]:
    """The part as text: its table, the metrics with their targets, and what is missing."""
    text = [part.name, *aligned(part.table)]
    for metric in part.metrics:
        mark = {None: " ", True: "✓", False: "✗"}[metric.met]
        target = metric.at_most if metric.at_least is None else metric.at_least
        suffix = "" if target is None else f"  (target {'≤' if metric.at_least is None else '≥'} {target:g})"
        text.append(f"  {mark} {metric.name}: {metric.value:.3f}{metric.unit}{suffix}")
    text += [f"  {reason}" for reason in part.absent]
    text += [f"  not measured: {reason}" for reason in part.not_measured]
    return [*text, ""]


def aligned(table: Sequence[dict[str, str]]) -> list[str]:
    """Lines of a table with a header; the first column is aligned to the left, the others to the right."""
    if not table:
        return []
    rows = [list(table[0]), *(list(row.values()) for row in table)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def machine(clock: Clock) -> dict[str, Any]:
    """The GPU's name, multiprocessors, memory, capability and driver; on the CPU the clock's name."""
    if clock.device != "cuda":
        return {"name": clock.name}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "driver and clocks": nvidia_smi("driver_version,clocks.max.sm,clocks.max.mem,power.limit"),
        "cuda": torch.version.cuda,
    }


def nvidia_smi(fields: str) -> str:
    """nvidia-smi's answer for the first GPU, or why there is none."""
    query = ["nvidia-smi", "--id=0", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"not known: {error}"


def versions() -> dict[str, str]:
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = "not installed"
    return installed


def folder(name: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")
