"""python -m benchmarks.run --device cpu: checks every op against the reference, then times them in interleaved rounds.

A run of all ops at full size writes its record into benchmarks/records/<machine>/. Exit code 1 if an op is wrong; no
number is reported then.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import given_lse, suite
from benchmarks.measure import PEAK_RESET
from benchmarks.record import RECORDS, commit, cores, machine, record_path, software, write_record
from benchmarks.registry import REGISTRY, Benchmark, select
from benchmarks.suite import QUICK, Metric, Part, Settings
from benchmarks.verify import WrongResultError


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    if options.device != "cpu":
        from benchmarks.gpu.clock import Budget
        from benchmarks.gpu.run import run

        # Times of the interpreter are meaningless, so it writes a record only into a given directory.
        records = None if options.device != "cuda" and options.records == RECORDS else options.records
        return run(options.device, records, console, errors, Budget(options.budget))
    settings = QUICK if options.quick else Settings()
    settings = replace(settings, threads=options.threads, with_targets=settings.with_targets and options.threads == 1)
    try:
        benchmarks = select(options.ops)
    except ValueError as error:
        errors.print(str(error), style="red", markup=False)
        return 2
    torch.set_num_threads(options.threads)
    where = machine()
    console.print(", ".join(f"{key} {value}" for key, value in (where | software()).items()), soft_wrap=True)
    try:
        with console.status("checking every op against the reference in fp64"):
            checked = suite.check(benchmarks, settings, options.device)
    except WrongResultError as error:
        errors.print(f"The correctness check failed: no number is reported.\n{error}", style="red", markup=False)
        return 1
    results = sum(len(shape.results) for shape in checked)
    console.print(f"{results} results of {len(benchmarks)} ops agree with the reference\n")

    parts = []
    for run_part in _parts(benchmarks, settings, options.device, console):
        with console.status("timing"):
            part = run_part()
        _show(console, part)
        parts.append(part)
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": where,
        "software": software(),
        "commit": commit(),
        "threads": options.threads,
        "settings": asdict(settings),
        "correctness": [suite.check_json(shape) for shape in checked],
        "parts": {part.name: suite.part_json(part) for part in parts},
    }
    paths = [options.json] if options.json else []
    if not options.quick and options.ops is None and options.threads == 1:
        paths.append(record_path(options.device, where, options.records))
    for path in paths:
        write_record(path, record)
        console.print(f"written: {path}", soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda", "interpreter", "rehearsal"), default="cpu")
    parser.add_argument("--ops", nargs="+", metavar="OP", help=f"only these of: {', '.join(REGISTRY)}")
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes, to see that it runs; without targets and record"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of every implementation (1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    parser.add_argument("--budget", type=float, default=400, metavar="S", help="GPU only: seconds to end within (400)")
    parser.add_argument("--records", type=Path, default=RECORDS, metavar="DIR", help="where records are kept")
    return parser


def _parts(benchmarks: list[Benchmark], settings: Settings, device: str, console: Console) -> list[Callable[[], Part]]:
    """The parts to run: those whose ops are all among the benchmarks. Prints which ones this machine can't run."""
    chosen = {benchmark.name: benchmark for benchmark in benchmarks}
    parts: list[Callable[[], Part]] = [
        partial(suite.comparison_part, benchmarks, settings, device, dtype) for dtype in suite.DTYPES
    ]
    if {"statistics", "bands"} <= chosen.keys():
        parts.append(partial(suite.bands_part, chosen, settings, device))
    if "statistics" in chosen:
        parts.append(partial(suite.windows_part, chosen, settings, device))
        parts.append(partial(suite.also_part, chosen["statistics"], settings, device))
        parts.append(partial(given_lse.columns_part, settings, device))
        parts.append(partial(given_lse.several_bands_part, settings, device))
        if cores() > 1:
            parts.append(partial(suite.threads_part, chosen["statistics"], settings, device))
        else:
            console.print("not measured: two threads, because there is one core\n")
        if PEAK_RESET.exists():
            parts.append(partial(suite.memory_part, chosen["statistics"], settings))
        else:
            console.print(f"not measured: memory, because there is no {PEAK_RESET}\n")
    return parts


def _show(console: Console, part: Part) -> None:
    if part.measurements:
        table = Table(title=part.name, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for column in ("op", "T", "threads", "ms", "fastest", "slowest", "GFLOP/s"):
            table.add_column(column, justify="left" if column == "op" else "right")
        for m in part.measurements:
            times = [f"{1e3 * seconds:,.2f}" for seconds in (m.seconds_median, m.seconds_min, m.seconds_max)]
            table.add_row(m.op, f"{m.shape.tokens}", f"{m.threads}", *times, f"{m.gflops:.1f}")
        console.print(table)
    else:
        console.print(part.name, style="bold")
    for metric in part.metrics:
        console.print(
            f"  {_mark(metric)} {metric.name}: [bold]{metric.value:.2f}{metric.unit}[/bold]{_target(metric)}",
            soft_wrap=True,
        )
    console.print()


def _mark(metric: Metric) -> str:
    return {None: " ", True: "[green]✓[/green]", False: "[red]✗[/red]"}[metric.met]


def _target(metric: Metric) -> str:
    if metric.at_least is not None:
        return f"  (target ≥ {metric.at_least:g}{metric.unit})"
    return "" if metric.at_most is None else f"  (target ≤ {metric.at_most:g}{metric.unit})"


if __name__ == "__main__":
    sys.exit(main())
