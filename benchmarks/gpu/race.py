"""gpu-race: times every tile and prototype on this GPU, and profiles the ops.

Nothing here changes what runs by default: the tables in kernels/tile_tables.py are edited by hand afterwards.
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

from benchmarks.gpu.clock import Budget, Clock, clock_of, one_line
from benchmarks.gpu.comparison import OURS, Comparison
from benchmarks.gpu.implementations import Implementation
from benchmarks.gpu.profile import counters_part, kernels_part
from benchmarks.gpu.report import Console, GpuPart, Planned, Report
from benchmarks.gpu.suite import FULL, INTERPRETED, GpuSettings
from benchmarks.gpu.tiles import tiles_part, tuner_part
from benchmarks.implementations import Maker, Outputs
from benchmarks.registry import Benchmark
from benchmarks.shapes import Inputs, Shape, make_inputs, score_flops
from benchmarks.verify import WrongResultError, verify

PROTOTYPES = "benchmarks.gpu.prototypes"
SWEEPS = ("row", "bands_band", "row_values", "column_band", "column", "bands", "sampled")


class Prototype(Protocol):
    """A trial kernel, timed with rhythm's own: `make` returns a callable that returns span and lse, or out, or all."""

    @property
    def name(self) -> str: ...
    @property
    def make(self) -> Maker: ...
    @property
    def absent(self) -> Callable[[], str | None]: ...


@dataclass(frozen=True)
class RaceSettings:
    """checked_shapes, timed_shape: where prototypes are checked, and where they are timed."""

    suite: GpuSettings = FULL
    sweeps: tuple[str, ...] = SWEEPS
    checked_shapes: tuple[Shape, ...] = (
        Shape(1024, query_heads=8, key_heads=2, head_size=128),
        Shape(1000, query_heads=4, key_heads=1, head_size=128),
    )
    timed_shape: Shape = FULL.shape
    rounds: int = 15


REHEARSED = RaceSettings(
    INTERPRETED,
    checked_shapes=(Shape(40, query_heads=2, key_heads=1, head_size=64),),
    timed_shape=Shape(70, query_heads=2, key_heads=1, head_size=64),
    rounds=2,
)


def run(device: str, records: Path | None, console: Console, errors: Console, budget: Budget) -> int:
    """Run the parts in order; see `benchmarks.gpu.run.run` for arguments and exit codes."""
    clock = clock_of(device)
    if clock is None:
        errors.print("--device cuda: torch sees no CUDA device", style="red")
        return 2
    settings = RaceSettings() if device == "cuda" else REHEARSED
    report = Report(clock, "gpu_race.json", records, console, errors)
    report.run(parts(settings, clock, device, budget), budget)
    return report.end()


def parts(settings: RaceSettings, clock: Clock, device: str, budget: Budget) -> list[Planned]:
    """The parts to run: tiles of the two most important kernels, prototypes, other tiles, profiles, the tuner."""
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
    """The prototypes in this tree; none if their package is missing."""
    if find_spec(PROTOTYPES) is None:
        return ()
    trials: Sequence[Prototype] = import_module(PROTOTYPES).prototypes()
    return trials


def prototypes_part(
    trials: Sequence[Prototype], plain: Sequence[Implementation], settings: RaceSettings, clock: Clock, budget: Budget
) -> GpuPart:
    """Check each prototype against the fp64 reference, then time all of them with the plain forwards and the ops."""
    inputs = make_inputs(settings.timed_shape, torch.bfloat16, clock.device, clock.backend)
    comparison = Comparison()
    references = [*plain, *(one for one in settings.suite.implementations if one.name in ("statistics", "with_output"))]
    for one in references:
        if (reason := one.absent()) is not None:
            comparison.absent.append(f"{one.name}: {reason}")
        else:
            comparison.enter(one.name, partial(one.make, inputs), clock)
    for trial in trials:
        if (reason := trial.absent()) is not None:
            comparison.absent.append(f"{trial.name}: {reason}")
        elif (wrong := "budget" if budget.left < 20.0 else _refused(trial, settings, clock)) is not None:
            comparison.failed[trial.name] = wrong
        else:
            comparison.enter(trial.name, partial(trial.make, inputs), clock)
    if not trials:
        comparison.absent.append(f"prototypes: there are none ({PROTOTYPES})")
    comparison.measure(clock, settings.rounds)
    flops = {one.name: one.flops(settings.timed_shape) for one in references}
    flops |= {one.name: score_flops(settings.timed_shape) * (2 if one.values else 1) for one in trials}
    rows = comparison.rows(settings.timed_shape.tokens, flops, comparison.best([one.name for one in plain]))
    json, cells = tuple(row.json() for row in rows), tuple(row.cells() for row in rows)
    return GpuPart(
        "prototypes", json, (), tuple(comparison.absent), comparison.not_measured(), comparison.ours_failed(), cells
    )


def _refused(trial: Prototype, settings: RaceSettings, clock: Clock) -> str | None:
    """Why a prototype is not timed: a wrong result, or the error it raised. None: it is right at all shapes."""

    def make(inputs: Inputs) -> Callable[[], Outputs]:
        call = trial.make(inputs)

        def named() -> Outputs:
            results: dict[str, Any] = dict(call())
            return results | ({"span": results["span"].flatten()} if "span" in results else {})

        return named

    try:
        for shape in settings.checked_shapes:
            inputs = make_inputs(shape, torch.bfloat16, clock.device, clock.backend)
            verify([Benchmark(trial.name, make, score_flops, lambda shape, dtype: 0, "")], inputs)
    except WrongResultError as error:
        return str(error).splitlines()[-1].removeprefix(f"{trial.name}: ")
    except Exception as error:  # a trial kernel may not compile; that is its result
        return one_line(error)
    return None
