"""A run's record and what it prints: one part after the other, each written when it is done, none losing another.

Only torch, Triton and NumPy are needed here and in what this imports: a machine with a GPU may have little else.
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

from benchmarks.gpu.clock import Budget, Clock, told
from benchmarks.record import commit, software, write_record
from benchmarks.suite import Claim

PACKAGES = ("triton", "transformers", "flash_attn", "flash-colreduce", "flash-attn-4", "nvidia-cudnn-cu13")


class Console(Protocol):
    """What is used of rich's."""

    def print(self, *objects: Any, **options: Any) -> None: ...


class Plain:
    """Lines on standard output, without rich."""

    def print(self, *objects: Any, **options: Any) -> None:
        print(*objects, flush=True)


@dataclass(frozen=True)
class Part:
    """What a part found.

    Attributes:
        table: a row per implementation or fact, each with the same keys; what is printed, and recorded with `rows`.
        rows: what is recorded of the table: numbers as measured.
        absent: what can't run here, or not at this length, and why; notes.
        not_measured: "what: why" of what should have run and failed, or had no room.
        failed: whether something of rhythm's own failed.
        facts: whatever else is recorded.
    """

    name: str
    rows: tuple[dict[str, Any], ...] = ()
    claims: tuple[Claim, ...] = ()
    absent: tuple[str, ...] = ()
    not_measured: tuple[str, ...] = ()
    failed: bool = False
    table: tuple[dict[str, str], ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        claims = [asdict(claim) | {"met": claim.met} for claim in self.claims]
        return {"rows": list(self.rows), "claims": claims, "absent": list(self.absent)} | self.facts


@dataclass(frozen=True)
class Planned:
    """A part yet to be run, and the seconds without which it is not begun."""

    name: str
    needed: float
    run: Callable[[], Part]


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
        """Every part that the budget has room for; the record is written after each."""
        for planned in parts:
            left = budget.left
            if left < planned.needed:
                self.record["not_measured"].append(f"{planned.name}: budget")
                self.say(f"not measured: {planned.name}, because {left:.0f} s of the budget are left")
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
        """Says where the record is. The exit code: 1 if something of rhythm's own failed."""
        if self.path is not None:
            self.say(f"written: {self.path}")
        return int(self.failed)

    def _add(self, planned: Planned) -> None:
        try:
            self._clock.free()
            part = planned.run()
        except Exception as error:  # no part may lose the record of the others
            self.failed = True
            self.record["not_measured"].append(f"{planned.name}: {told(error)}")
            self.complain(f"{planned.name} failed:\n{traceback.format_exc()}")
            return
        self.failed = self.failed or part.failed
        self.record["parts"][planned.name] = part.json()
        self.record["not_measured"] += [f"{planned.name}, {reason}" for reason in part.not_measured]
        self.say("\n".join(lines(part)))


def lines(part: Part) -> list[str]:
    """The part as text: its table, the claims with their aims, and what is missing."""
    text = [part.name, *aligned(part.table)]
    for claim in part.claims:
        mark = {None: " ", True: "✓", False: "✗"}[claim.met]
        aim = claim.at_most if claim.at_least is None else claim.at_least
        aimed = "" if aim is None else f"  (aim {'≤' if claim.at_least is None else '≥'} {aim:g})"
        text.append(f"  {mark} {claim.name}: {claim.value:.3f}{claim.unit}{aimed}")
    text += [f"  {reason}" for reason in part.absent]
    text += [f"  not measured: {reason}" for reason in part.not_measured]
    return [*text, ""]


def aligned(table: Sequence[dict[str, str]]) -> list[str]:
    """Rows under the keys of the first: the first column to the left, the others to the right."""
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
    """The GPU by name, multiprocessors, memory, capability and driver; on the CPU what stands in."""
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
    """What nvidia-smi says of the first GPU, or why it says nothing."""
    query = ["nvidia-smi", "--id=0", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"not known: {error}"


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def folder(name: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")
