"""The registry of benchmarked ops, with the FLOPs and bytes counted for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import implementations
from benchmarks.implementations import Maker
from benchmarks.shapes import Shape, band_flops, operand_bytes, score_flops, statistics_bytes


@dataclass(frozen=True)
class Benchmark:
    """One op.

    Attributes:
        make: takes inputs, returns a callable that computes the op once and returns its results by name.
        flops, bytes: the minimum that the computation needs, not what this implementation uses; `counted` says how.
    """

    name: str
    make: Maker
    flops: Callable[[Shape], int]
    bytes: Callable[[Shape, torch.dtype], int]
    counted: str


_SCORES = "FLOPs: 2·D per causal pair and query head. Bytes: q, k read once; waad, fai, lse written"
_FORWARD = "FLOPs: 4·D per causal pair and query head. Bytes: q, k, v read once; out written"
_BOTH = "FLOPs: 4·D per causal pair and query head. Bytes: q, k, v read once; out, waad, fai, lse written"
_BANDS = "FLOPs: 2·D per pair of the bands and query head. Bytes: q, k, lse read once; waad, fai written"

BLOCKS = (64, 128, 256)


def _score_bytes(shape: Shape, dtype: torch.dtype) -> int:
    return operand_bytes(shape, dtype, shape.query_heads + shape.key_heads) + statistics_bytes(shape)


def _forward_bytes(shape: Shape, dtype: torch.dtype) -> int:
    return operand_bytes(shape, dtype, 2 * shape.query_heads + 2 * shape.key_heads)


def _both_bytes(shape: Shape, dtype: torch.dtype) -> int:
    return _forward_bytes(shape, dtype) + statistics_bytes(shape)


def _forward_flops(shape: Shape) -> int:
    return 2 * score_flops(shape)


REGISTRY: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("eager", implementations.eager, score_flops, _score_bytes, _SCORES),
        *(
            Benchmark(f"blocked_{block}", implementations.blocked(block), score_flops, _score_bytes, _SCORES)
            for block in BLOCKS
        ),
        Benchmark("sdpa", implementations.sdpa, _forward_flops, _forward_bytes, _FORWARD),
        Benchmark("statistics", implementations.statistics, score_flops, _score_bytes, _SCORES),
        Benchmark("with_output", implementations.with_output, _forward_flops, _both_bytes, _BOTH),
        Benchmark("bands", implementations.bands, band_flops, _score_bytes, _BANDS),
    )
}


def select(names: list[str] | None) -> list[Benchmark]:
    """The named benchmarks in the registry's order; all for None.

    Raises:
        ValueError: a name that is not in the registry.
    """
    for name in names or []:
        if name not in REGISTRY:
            raise ValueError(f"--ops names {name!r}; allowed are {', '.join(REGISTRY)}")
    return [benchmark for name, benchmark in REGISTRY.items() if names is None or name in names]
