"""gpu-race: which tile, and which prototype, is fastest on this card; and where the time goes.

Nothing here changes what runs by default: the tables of kernels/tile_tables.py are edited after reading it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.gpu.clock import Budget, Clock, clock_of, told
from benchmarks.gpu.implementations import Implementation
from benchmarks.gpu.profile import counters_part, kernels_part
from benchmarks.gpu.report import Console, Part, Planned, Report
from benchmarks.gpu.suite import FULL, INTERPRETED, OURS, Field, Settings
from benchmarks.gpu.tile_race import tiles_part, tuner_part
from benchmarks.implementations import Maker, Outputs
from benchmarks.registry import Benchmark
from benchmarks.shapes import Inputs, Shape, make_inputs, score_flops
from benchmarks.verify import WrongResultError, verify

PROTOTYPES = "benchmarks.gpu.prototypes"
SWEEPS = ("row", "bands_band", "row_values", "column_band", "column", "bands", "sampled")


class Prototype(Protocol):
    """What races beside the kernels: `make` gives a callable that returns span and lse, or out, or all of them."""

    @property
    def name(self) -> str: ...
    @property
    def make(self) -> Maker: ...
    @property
    def absent(self) -> Callable[[], str | None]: ...


@dataclass(frozen=True)
class RaceSettings:
    """gates: shapes at which prototypes are checked; raced: the shape at which they race."""

    suite: Settings = FULL
    sweeps: tuple[str, ...] = SWEEPS
    gates: tuple[Shape, ...] = (
        Shape(1024, query_heads=8, key_heads=2, head_size=128),
        Shape(1000, query_heads=4, key_heads=1, head_size=128),
    )
    raced: Shape = FULL.shape
    rounds: int = 15


REHEARSED = RaceSettings(
    INTERPRETED,
    gates=(Shape(40, query_heads=2, key_heads=1, head_size=64),),
    raced=Shape(70, query_heads=2, key_heads=1, head_size=64),
    rounds=2,
)


def run(device: str, records: Path | None, console: Console, errors: Console, budget: Budget) -> int:
    """The parts in turn; see `benchmarks.gpu.run.run` for arguments and exit codes."""
    clock = clock_of(device)
    if clock is None:
        errors.print("--device cuda: torch sees no CUDA device", style="red")
        return 2
    settings = RaceSettings() if device == "cuda" else REHEARSED
    report = Report(clock, "gpu_race.json", records, console, errors)
    report.run(parts(settings, clock, device, budget), budget)
    return report.end()


def parts(settings: RaceSettings, clock: Clock, device: str, budget: Budget) -> list[Planned]:
    """The prototypes between the sweeps that matter most and the others; profiles at the end, the tuner last."""
    suite = settings.suite
    tiles = [
        Planned(f"tiles_{sweep}", 15.0, partial(tiles_part, sweep, suite.shape, clock, settings.rounds, budget))
        for sweep in settings.sweeps
    ]
    plain = tuple(one for one in suite.implementations if one.plain)
    profiled = [one for one in suite.implementations if one.name in OURS or one.plain]

    def inputs() -> Inputs:
        return make_inputs(suite.shape, torch.bfloat16, clock.device, clock.backend)

    return [
        *tiles[:2],
        Planned("prototypes", 45.0, lambda: prototypes_part(prototypes(), plain, settings, clock, budget)),
        *tiles[2:],
        Planned("kernels", 15.0, lambda: kernels_part(profiled, suite.shape, clock)),
        Planned("counters", 30.0, lambda: counters_part(device, budget)),
        Planned("tuner", 60.0, lambda: tuner_part(inputs)),
    ]


def prototypes() -> Sequence[Prototype]:
    """Those in this tree."""
    if find_spec(PROTOTYPES) is None:
        return ()
    found: Sequence[Prototype] = import_module(PROTOTYPES).prototypes()
    return found


def prototypes_part(
    racing: Sequence[Prototype], plain: Sequence[Implementation], settings: RaceSettings, clock: Clock, budget: Budget
) -> Part:
    """Each checked against the fp64 reference at the gates, then all raced beside the plain forwards and the ops."""
    inputs = make_inputs(settings.raced, torch.bfloat16, clock.device, clock.backend)
    found = Field()
    beside = [*plain, *(one for one in settings.suite.implementations if one.name in ("statistics", "with_output"))]
    for one in beside:
        if (reason := one.absent()) is not None:
            found.absent.append(f"{one.name}: {reason}")
        else:
            found.enter(one.name, partial(one.make, inputs), clock)
    for trial in racing:
        if (reason := trial.absent()) is not None:
            found.absent.append(f"{trial.name}: {reason}")
        elif (wrong := "budget" if budget.left < 20.0 else _refused(trial, settings, clock)) is not None:
            found.failed[trial.name] = wrong
        else:
            found.enter(trial.name, partial(trial.make, inputs), clock)
    if not racing:
        found.absent.append(f"prototypes: there are none ({PROTOTYPES})")
    found.race(clock, settings.rounds)
    flops = {one.name: one.flops(settings.raced) for one in beside}
    flops |= {one.name: score_flops(settings.raced) * (2 if getattr(one, "values", False) else 1) for one in racing}
    rows = found.rows(settings.raced.tokens, flops, found.best([one.name for one in plain]))
    json, cells = tuple(row.json() for row in rows), tuple(row.cells() for row in rows)
    return Part("prototypes", json, (), tuple(found.absent), found.not_measured(), found.ours_failed(), cells)


def _refused(trial: Prototype, settings: RaceSettings, clock: Clock) -> str | None:
    """Why a prototype may not race: a wrong result, or whatever it raised. None: it is right at every gate."""

    def make(inputs: Inputs) -> Callable[[], Outputs]:
        call = trial.make(inputs)

        def named() -> Outputs:
            found: dict[str, Any] = dict(call())
            return found | ({"span": found["span"].flatten()} if "span" in found else {})

        return named

    try:
        for shape in settings.gates:
            inputs = make_inputs(shape, torch.bfloat16, clock.device, clock.backend)
            verify([Benchmark(trial.name, make, score_flops, lambda shape, dtype: 0, "")], inputs)
    except WrongResultError as error:
        return str(error).splitlines()[-1].removeprefix(f"{trial.name}: ")
    except Exception as error:
        return told(error)
    return None
