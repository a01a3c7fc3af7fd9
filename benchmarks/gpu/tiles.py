"""Times every tile that the tables offer for a kernel, at one shape, by graph replays."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.clock import Budget, Clock, one_line
from benchmarks.gpu.comparison import Comparison
from benchmarks.gpu.report import GpuPart
from benchmarks.implementations import Outputs
from benchmarks.shapes import HORIZON, WINDOW, Inputs, Shape, make_inputs
from benchmarks.verify import relative_error
from rhythm import attention_statistics, attention_with_statistics

# Against the tile that runs by default; sums in another order differ in fp32's last bits, outputs in bf16's.
SAME, SAME_OUT = 1e-3, 1e-2


def ops(inputs: Inputs) -> dict[str, Callable[[], Outputs]]:
    """For each kernel of the tile tables, an op that runs it."""
    from rhythm.kernels import Sequences, Softmax, bands
    from rhythm.kernels.tiles import LOG2_E

    q, k, v, lse = inputs.q, inputs.k, inputs.v, inputs.lse
    sequences = Sequences(None, inputs.prompt_lens, inputs.shape.tokens, 1)
    given: dict[str, Any] = {"prompt_lens": inputs.prompt_lens, "window": WINDOW, "backend": inputs.backend}
    to_end = (HORIZON[0], None)

    def with_output() -> Outputs:
        out, statistics = attention_with_statistics(q, k, v, horizon=HORIZON, **given)
        return {"out": out} | _named(statistics)

    def swept(horizon: tuple[int, int | None], **more: Any) -> Callable[[], Outputs]:
        return lambda: _named(attention_statistics(q, k, horizon=horizon, **more, **given))

    def columns(horizon: tuple[int, int | None]) -> Outputs:
        """Only the launcher: in the op it runs after the row sweep, which can't be left out."""
        waad, fai = (torch.full_like(lse, torch.nan) for _ in range(2))
        parts = torch.stack([torch.zeros_like(lse), lse * LOG2_E.value], dim=-1)
        softmax = Softmax(parts, torch.zeros(1, dtype=torch.int32, device=lse.device))
        near: dict[str, Any] = {"scale": inputs.scale, "window": WINDOW, "horizon": horizon, "softmax": softmax}
        bands(q, k, lse, sequences, waad, fai, None, **near)
        return {"waad": waad, "fai": fai}

    return {
        "row": swept(HORIZON),
        "row_values": with_output,
        "column": lambda: columns(to_end),
        "column_band": lambda: columns(HORIZON),
        "bands": swept(to_end, lse=lse, span=False),
        "bands_band": swept(HORIZON, lse=lse, span=False),
        "sampled": swept(HORIZON, lse=lse, span_rows=256),
    }


def tiles_part(sweep: str, shape: Shape, clock: Clock, rounds: int, budget: Budget) -> GpuPart:
    """Time the tiles of one kernel: each is checked in the whole op, then timed without the other kernels."""
    from rhythm.kernels.launch import forced
    from rhythm.kernels.tile_tables import KernelKey, Tile, architecture, candidates, shared_memory

    inputs = make_inputs(shape, torch.bfloat16, clock.device, clock.backend)
    device = inputs.q.device
    op, keys = ops(inputs)[sweep], []

    def offered(key: KernelKey) -> list[Tile]:
        return candidates(architecture(device), key, shared_memory(device), True)

    def only(tile: Tile | None, others: bool, key: KernelKey) -> list[Tile]:
        if key.kernel != sweep:
            return offered(key)[:1] if others else []
        keys.append(key)
        return offered(key)[:1] if tile is None else [tile]

    def with_tile(tile: Tile | None, others: bool) -> Outputs:
        with forced(partial(only, tile, others)):
            return op()

    expected = with_tile(None, True)
    if not keys:
        raise ValueError(f"the op for {sweep} does not run it")
    tiles, comparison = offered(keys[0]), Comparison()
    for tile in tiles:
        if budget.left < 10.0:
            comparison.failed[tile_label(tile)] = "budget"
            continue
        try:
            wrong = different(with_tile(tile, True), expected)
        except Exception as error:  # a tile may not compile or not fit
            wrong = one_line(error)
        if wrong is None:
            comparison.enter(tile_label(tile), lambda tile=tile: partial(with_tile, tile, False), clock)
        else:
            comparison.failed[tile_label(tile)] = wrong
    comparison.replayed, reasons = clock.interleaved_replays(comparison.runs, rounds)
    comparison.failed |= reasons
    return _part(sweep, comparison, tiles)


def different(actual: Outputs, expected: Outputs) -> str | None:
    """The first result that differs from the default tile's, and by how much; None: all agree."""
    for name, value in expected.items():
        error = relative_error(actual[name], value)
        if not error <= (SAME_OUT if name == "out" else SAME):
            return f"WRONG: {name} differs by {error:.1e} from the default tile's"
    return None


def tile_label(tile: Any) -> str:
    """A tile as text: "128 × 128, 8 warps, 2 stages, TMA", then its other options by name."""
    fields = tile._asdict()
    rows, keys, warps, stages = (fields.pop(name) for name in ("rows", "keys", "warps", "stages"))
    text = f"{rows} × {keys}, {warps} warps, {stages} stages" + (", TMA" if fields.pop("tma") else "")
    return text + "".join(f", {name} {value}" for name, value in fields.items() if value is not None)


def tuner_part(inputs: Callable[[], Inputs]) -> GpuPart:
    """The tiles that the autotuner chooses and stores with RHYTHM_AUTOTUNE=1; the other parts don't use them."""
    from rhythm.kernels import tuning

    with _autotuning():
        failed = []
        for sweep, op in ops(inputs()).items():
            try:
                op()
            except Exception as error:  # reported; the other kernels are still timed
                failed.append(f"{sweep}: {one_line(error)}")
    path = tuning.cache_file()
    kept = path.read_text(encoding="utf-8") if path.exists() else "no tiles were timed: each kernel has only one"
    return GpuPart("tuner", (), (), (), tuple(failed), bool(failed), facts={"file": kept})


def _part(sweep: str, comparison: Comparison, tiles: Sequence[Any]) -> GpuPart:
    default = tile_label(tiles[0])
    names = sorted(comparison.replayed, key=lambda name: comparison.replayed[name].median)
    over = comparison.replayed.get(default)
    rows, table = [], []
    for name in names:
        timing = comparison.replayed[name]
        share = timing.median / over.median if over else None
        marks = [mark for mark, is_so in (("default", name == default), ("fastest", name == names[0])) if is_so]
        rows.append({"sweep": sweep, "tile": name, "seconds": timing.median, "to_default": share, "is": marks})
        shown = "" if share is None else f"{share:.3f}"
        table.append({"tile": name, "ms": f"{1e3 * timing.median:,.4f}", "over default": shown, "": ", ".join(marks)})
    wrong = any(reason.startswith("WRONG") for reason in comparison.failed.values()) or default in comparison.failed
    return GpuPart(f"tiles_{sweep}", tuple(rows), (), (), comparison.not_measured(), wrong, tuple(table))


def _named(statistics: Any) -> Outputs:
    results: dict[str, Tensor | None] = {
        "span": statistics.span,
        "waad": statistics.waad,
        "fai": statistics.fai,
        "lse": statistics.lse,
    }
    return {name: value for name, value in results.items() if value is not None}


@contextmanager
def _autotuning() -> Iterator[None]:
    before = os.environ.get("RHYTHM_AUTOTUNE")
    os.environ["RHYTHM_AUTOTUNE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["RHYTHM_AUTOTUNE"]
        else:
            os.environ["RHYTHM_AUTOTUNE"] = before
