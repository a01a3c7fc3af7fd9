"""The parts of a benchmark run for the ops beside the statistics that are given an lse: column scores, and bands for
several windows and horizons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.implementations import Outputs
from benchmarks.measure import TimedCall, interleaved, ratio
from benchmarks.registry import Benchmark
from benchmarks.shapes import Inputs, Shape, make_inputs, operand_bytes, score_flops
from benchmarks.suite import DTYPES, Metric, Part, Settings, measurement, type_name
from benchmarks.verify import verify_by_reference
from rhythm.ops.bands import attention_bands
from rhythm.ops.column_scores import column_scores
from rhythm.ops.statistics import attention_statistics

WINDOWS = (5, 10, 20)
HORIZONS = ((10, 50), (10, 100), (20, 60))

_COLUMNS = "FLOPs: 2·D per causal pair and query head. Bytes: q, k, lse read once; the scores of keys written"
_BANDS = (
    f"FLOPs: 2·D per pair within {max(hi for _, hi in HORIZONS)} tokens and query head. Bytes: q, k, lse read once; "
    "waad, fai of each window and horizon written"
)


@dataclass(frozen=True)
class Columns:
    """column_scores of a given lse; calling it makes the call on some inputs, as Benchmark.make."""

    reduce: str
    weighted: bool

    def __call__(self, inputs: Inputs) -> Callable[[], Outputs]:
        lse, weights = inputs.lse, row_weights(inputs) if self.weighted else None

        def run() -> Outputs:
            given = {"lse": lse, "row_weights": weights, "backend": inputs.backend}
            return {"scores": column_scores(inputs.q, inputs.k, reduce=self.reduce, **given)}  # type: ignore[arg-type]

        return run


COLUMNS = {
    "columns_sum": Columns("sum", False),
    "columns_max": Columns("max", False),
    "columns_sum_weighted": Columns("sum", True),
    "columns_max_weighted": Columns("max", True),
}


def row_weights(inputs: Inputs) -> Tensor:
    """fp32 [T], one factor for each row, half of them negative."""
    generator = torch.Generator(device=inputs.q.device).manual_seed(1)
    return torch.randn(inputs.shape.tokens, generator=generator, device=inputs.q.device)


def bands_at_once(inputs: Inputs) -> Callable[[], Outputs]:
    """rhythm.attention_bands with all of WINDOWS and HORIZONS."""
    lse = inputs.lse

    def run() -> Outputs:
        waad, fai = attention_bands(inputs.q, inputs.k, lse, windows=WINDOWS, horizons=HORIZONS, backend=inputs.backend)
        return {"waad": waad, "fai": fai}

    return run


def bands_one_by_one(inputs: Inputs) -> Callable[[], Outputs]:
    """rhythm.attention_statistics, with a given lse and without span, once for each of them."""
    lse = inputs.lse

    def run() -> Outputs:
        results = [
            attention_statistics(
                inputs.q, inputs.k, lse=lse, span=False, window=window, horizon=horizon, backend=inputs.backend
            )
            for window, horizon in zip(WINDOWS, HORIZONS, strict=True)
        ]
        return {"waad": torch.stack([r.waad for r in results]), "fai": torch.stack([r.fai for r in results])}

    return run


def columns_part(settings: Settings, device: str) -> Part:
    """Compare the largest and the weighted column scores with their plain sums.

    Raises:
        WrongResultError: a result is not that of the reference in fp64, at the odd shape that is checked.
    """
    ops = [Benchmark(name, make, score_flops, _column_bytes, _COLUMNS) for name, make in COLUMNS.items()]
    return _part("columns", ops, settings, device, "time over that of the sums", inverse=True)


def several_bands_part(settings: Settings, device: str) -> Part:
    """Compare bands for several windows and horizons at once with one call for each.

    Raises:
        WrongResultError: a result is not that of the reference in fp64, at the odd shape that is checked.
    """
    makers = {"bands_one_by_one": bands_one_by_one, "bands_at_once": bands_at_once}
    ops = [Benchmark(name, make, _band_flops, _band_bytes, _BANDS) for name, make in makers.items()]
    return _part("several_bands", ops, settings, device, "times as fast as one by one", inverse=False)


def _part(name: str, ops: list[Benchmark], settings: Settings, device: str, unit: str, inverse: bool) -> Part:
    """Times the ops against the first of them: its time over theirs, or the inverse."""
    measurements, metrics = [], []
    shape = replace(settings.shape, prompt=0)
    for dtype in DTYPES:
        for op in ops:
            verify_by_reference(op, make_inputs(replace(settings.odd_shape, prompt=0), dtype, device))
        inputs = make_inputs(shape, dtype, device)
        calls = {op.name: TimedCall(op.make(inputs), settings.threads) for op in ops}
        timings = interleaved(calls, rounds=settings.rounds, least_seconds=settings.least_seconds)
        measurements += [measurement(op, timings[op.name], shape, dtype, settings.threads) for op in ops]
        first, *others = (timings[op.name] for op in ops)
        for op, other in zip(ops[1:], others, strict=True):
            value = ratio(other, first) if inverse else ratio(first, other)
            metrics.append(Metric(f"{op.name}, {type_name(dtype)}: {unit}", value, "×"))
    return Part(name, tuple(measurements), tuple(metrics))


def _column_bytes(shape: Shape, dtype: torch.dtype) -> int:
    return operand_bytes(shape, dtype, shape.query_heads + shape.key_heads) + 2 * 4 * shape.tokens * shape.query_heads


def _band_flops(shape: Shape) -> int:
    return score_flops(shape, max(hi for _, hi in HORIZONS) + 1)


def _band_bytes(shape: Shape, dtype: torch.dtype) -> int:
    rows = 1 + len(WINDOWS) + len(HORIZONS)
    return (
        operand_bytes(shape, dtype, shape.query_heads + shape.key_heads) + rows * 4 * shape.tokens * shape.query_heads
    )
