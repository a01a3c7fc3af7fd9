"""gpu-check: measures this GPU's peak rates and checks every kernel on it, before anything else is timed.

If a result is wrong, the ops run again with small tiles and without the tensor memory accelerator (TMA), to narrow
down the cause.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import ROOT
from benchmarks.gpu.ceilings import HOPPER, Sizes, card_part, ceilings_part
from benchmarks.gpu.clock import Budget, Clock, clock_of, one_line
from benchmarks.gpu.comparison import OURS
from benchmarks.gpu.forms import forms_part
from benchmarks.gpu.implementations import Implementation
from benchmarks.gpu.report import Console, GpuPart, Planned, Report
from benchmarks.gpu.suite import FULL, INTERPRETED, GpuSettings
from benchmarks.implementations import Outputs
from benchmarks.registry import Benchmark
from benchmarks.shapes import Inputs, Shape, make_inputs
from benchmarks.verify import WrongResultError, verify

IMPORT_MODE = "--import-mode=importlib"
GLUON = "tests/kernels/test_gluon.py"
NO_GLUON = ("--ignore", GLUON)
"""Its tests come last, in a process of their own: a kernel that waits for ever must not take others' results along."""
FORMS = "sliding or softcap or sinks or fewer or forms"
"""Of tests/kernels: attention other than plain."""


@dataclass(frozen=True)
class Selection:
    """A run of pytest: its arguments, and its time limit in seconds."""

    name: str
    arguments: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class CheckSettings:
    suite: GpuSettings = FULL
    sizes: Sizes = HOPPER
    tests: tuple[Selection, ...] = (
        Selection(
            "tests marked gpu", ("-m", "gpu", "tests/kernels", *NO_GLUON, "tests/benchmarks/test_on_gpu.py"), 120.0
        ),
        Selection(
            "the kernels' own tests, compiled",
            (
                "tests/kernels",
                *NO_GLUON,
                "-k",
                "bfloat16 or batched or bit_equal or poison or undefined or thousands or beyond or 131072 or 32_bits"
                f" or tma or {FORMS}",
            ),
            240.0,
        ),
    )
    gluon: Selection = Selection("gluon", (GLUON,), 150.0)
    rounds: int = 15


REHEARSED = CheckSettings(
    INTERPRETED,
    Sizes(matmul=16, copied=64, cached=(4 * 4096,), passes=2, programs=2),
    (Selection("tests of tiles", ("tests/kernels/test_tuning.py", "-k", "needed_memory"), 120.0),),
    Selection("gluon", (GLUON, "-k", "when_it_is_chosen"), 120.0),
    rounds=2,
)


def run(device: str, records: Path | None, console: Console, errors: Console, budget: Budget) -> int:
    """Run the parts in order; see `benchmarks.gpu.run.run` for arguments and exit codes."""
    clock = clock_of(device)
    if clock is None:
        errors.print("--device cuda: torch sees no CUDA device", style="red")
        return 2
    settings = CheckSettings() if device == "cuda" else REHEARSED
    report = Report(clock, "gpu_check.json", records, console, errors)
    report.run(parts(settings, clock, budget), budget)
    if any(report.record["parts"].get(part, {}).get("wrong") for part in ("implementations", "forms")):
        report.run([Planned("bisection", 10.0, lambda: bisection_part(settings.suite, clock))], budget)
    if report.failed:
        report.complain("Something above is wrong: find the cause before running gpu-race or gpu-record (docs/gpu.md).")
    return report.end()


def parts(settings: CheckSettings, clock: Clock, budget: Budget) -> list[Planned]:
    """The parts to run. The implementations come before the tests, since the other two commands time them."""
    suite = settings.suite
    plain = tuple(one for one in suite.implementations if one.plain)
    return [
        Planned("card", 1.0, card_part),
        Planned("ceilings", 20.0, lambda: ceilings_part(clock, settings.sizes, suite.shape, plain, settings.rounds)),
        Planned("implementations", 30.0, lambda: implementations_part(suite, clock)),
        Planned("forms", 30.0, lambda: forms_part(suite, clock)),
        *(Planned(tests.name, 10.0, lambda tests=tests: tests_part(tests, budget)) for tests in settings.tests),
        Planned("gluon", 10.0, lambda: gluon_part(settings.gluon, clock, budget)),
    ]


def implementations_part(suite: GpuSettings, clock: Clock) -> GpuPart:
    """Check rhythm's ops against the fp64 reference: replays of CUDA graphs whose results were overwritten before."""
    rows, wrong = [], []
    for one, shape, dtype in _cases(suite):
        inputs = make_inputs(shape, dtype, clock.device, clock.backend)
        case = {"op": one.name, "shape": str(shape), "dtype": str(dtype).removeprefix("torch.")}
        try:
            results = verify([_replayed(one, clock)], inputs)
        except Exception as error:  # a wrong result, or a graph that could not be captured
            reason = str(error).splitlines()[-1] if isinstance(error, WrongResultError) else one_line(error)
            wrong.append(f"{' '.join(case.values())}: {reason}")
        else:
            rows += [case | {"result": v.result, "error": v.error, "allowed": v.allowed} for v in results]
    table = tuple({key: f"{x:.1e}" if isinstance(x, float) else x for key, x in row.items()} for row in rows)
    return GpuPart("implementations", tuple(rows), (), (), tuple(wrong), bool(wrong), table, {"wrong": wrong})


def bisection_part(suite: GpuSettings, clock: Clock) -> GpuPart:
    """Check again with other tiles. If small ones are right, the tiles are wrong; if those without TMA, its loads."""
    from rhythm.kernels.launch import forced
    from rhythm.kernels.tile_tables import KernelKey, Tile, architecture, candidates, shared_memory

    device = torch.device(clock.device)

    def without_tma(key: KernelKey) -> list[Tile]:
        tile, *_ = candidates(architecture(device), key, shared_memory(device), False)
        return [tile._replace(tma=False)]

    choices = {"tiles of 32 × 32": lambda key: [Tile(32, 32, 4, 1)], "the same tiles, TMA off": without_tma}
    facts: dict[str, list[str]] = {}
    for name, choice in choices.items():
        with forced(choice):
            facts[name] = implementations_part(suite, clock).facts["wrong"] + forms_part(suite, clock).facts["wrong"]
    table = tuple(
        {"tiles": name, "": "right", "what": ""} if not wrong else {"tiles": name, "": "WRONG", "what": wrong[0]}
        for name, wrong in facts.items()
    )
    return GpuPart("bisection", (), table=table, facts={"wrong with": facts})


def tests_part(tests: Selection, budget: Budget) -> GpuPart:
    """Run pytest in a separate process, and stop it when its time or the budget is over."""
    spread = ("-n", "8") if find_spec("xdist") and (os.cpu_count() or 1) >= 8 else ()
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-o",
        f"addopts={IMPORT_MODE}",
        "-q",
        "-rfE",
        "-p",
        "no:cacheprovider",
    ]
    command += [*spread, *tests.arguments]
    seconds = max(min(tests.seconds, budget.left - 5.0), 1.0)
    started = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return GpuPart(tests.name, (), (), (), (f"stopped after {seconds:.0f} s",), True)
    output = done.stdout.strip().splitlines()
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", output[-1])}
    failed = [line for line in output if line.startswith(("FAILED", "ERROR"))]
    facts = {"command": command[1:], "exit": done.returncode, "counts": counts, "failed": failed}
    facts["seconds"] = time.monotonic() - started
    wrong = done.returncode != 0 or not counts.get("passed")
    if wrong:
        facts["tail"] = output[-60:] + done.stderr.splitlines()[-20:]
    said = (", ".join(f"{number} {word}" for word, number in counts.items()) or output[-1], *failed)
    return GpuPart(tests.name, (), (), said, (), wrong, facts=facts)


def gluon_part(tests: Selection, clock: Clock, budget: Budget) -> GpuPart:
    """The row sweep in Gluon against the fp64 reference. The record is what PROVEN in kernels/gluon_choice.py asks for.

    A failure is one of rhythm's ops only where Gluon is the default already.
    """
    import triton

    from rhythm.kernels import gluon_choice

    if clock.device != "cpu" and (reason := gluon_choice.unavailable(torch.device(clock.device))) is not None:
        return GpuPart(tests.name, absent=(reason,))
    part = tests_part(tests, budget)
    reasons = (*part.not_measured, *(["the row sweep in Gluon is wrong: it stays off"] if part.failed else []))
    return replace(part, not_measured=reasons, failed=part.failed and triton.__version__ in gluon_choice.PROVEN)


def _cases(suite: GpuSettings) -> list[tuple[Implementation, Shape, torch.dtype]]:
    ours = [one for one in suite.implementations if one.name in OURS]
    return [(one, shape, dtype) for shape in suite.checked_shapes for dtype in suite.checked_dtypes for one in ours]


def _replayed(one: Implementation, clock: Clock) -> Benchmark:
    """The implementation in the form that `verify` takes."""

    def make(inputs: Inputs) -> Callable[[], Outputs]:
        run = one.make(inputs)
        return lambda: clock.poisoned_replay(run)

    return Benchmark(one.name, make, one.flops, lambda shape, dtype: 0, "")
