"""Races every tile that the tables offer for a kernel, at one shape, by graph replays."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.clock import Budget, Clock, told
from benchmarks.gpu.report import Part
from benchmarks.gpu.suite import Field
from benchmarks.implementations import Outputs
from benchmarks.shapes import HORIZON, WINDOW, Inputs, Shape, make_inputs
from benchmarks.verify import relative_error
from rhythm import attention_statistics, attention_with_statistics

# Against the tile that runs by default; sums in another order differ in fp32's last bits, outputs in bf16's.
SAME, SAME_OUT = 1e-3, 1e-2


def ops(inputs: Inputs) -> dict[str, Callable[[], Outputs]]:
    """For each kernel of the tile tables an op that runs it."""
    from rhythm.kernels import Sequences, column_sweep

    q, k, v, lse = inputs.q, inputs.k, inputs.v, inputs.lse
    sequences = Sequences(None, inputs.prompt_lens, inputs.shape.tokens, 1)
    given: dict[str, Any] = {"prompt_lens": inputs.prompt_lens, "window": WINDOW, "backend": inputs.backend}
    to_end = (HORIZON[0], None)

    def with_output() -> Outputs:
        out, found = attention_with_statistics(q, k, v, horizon=HORIZON, **given)
        return {"out": out} | _named(found)

    def swept(horizon: tuple[int, int | None], **more: Any) -> Callable[[], Outputs]:
        return lambda: _named(attention_statistics(q, k, horizon=horizon, **more, **given))

    def columns(horizon: tuple[int, int | None]) -> Outputs:
        """The launcher alone: in the op it follows the rows, which can't be left out."""
        fai = torch.full_like(lse, torch.nan)
        column_sweep(q, k, lse, sequences, fai, scale=inputs.scale, horizon=horizon)
        return {"fai": fai}

    return {
        "row": swept(HORIZON),
        "row_values": with_output,
        "column": lambda: columns(to_end),
        "column_band": lambda: columns(HORIZON),
        "bands": swept(to_end, lse=lse, span=False),
        "bands_band": swept(HORIZON, lse=lse, span=False),
        "sampled": swept(HORIZON, lse=lse, span_rows=256),
    }


def tiles_part(sweep: str, shape: Shape, clock: Clock, rounds: int, budget: Budget) -> Part:
    """Races the tiles of one kernel: each is checked within the whole op, then timed without the other kernels."""
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
    tiles, found = offered(keys[0]), Field()
    for tile in tiles:
        if budget.left < 10.0:
            found.failed[described(tile)] = "budget"
            continue
        try:
            wrong = different(with_tile(tile, True), expected)
        except Exception as error:  # a tile that does not compile, or has no room, costs itself
            wrong = told(error)
        if wrong is None:
            found.enter(described(tile), lambda tile=tile: partial(with_tile, tile, False), clock)
        else:
            found.failed[described(tile)] = wrong
    found.replayed, reasons = clock.race_replays(found.runs, rounds)
    found.failed |= reasons
    return _part(sweep, found, tiles)


def different(actual: Outputs, expected: Outputs) -> str | None:
    """Which result is not the default tile's, and by how much; None: they agree."""
    for name, value in expected.items():
        error = relative_error(actual[name], value)
        if not error <= (SAME_OUT if name == "out" else SAME):
            return f"WRONG: {name} differs by {error:.1e} from the default tile's"
    return None


def described(tile: Any) -> str:
    """128 × 128, 8 warps, 2 stages, TMA; and whatever else a tile has, by name."""
    fields = tile._asdict()
    rows, keys, warps, stages = (fields.pop(name) for name in ("rows", "keys", "warps", "stages"))
    text = f"{rows} × {keys}, {warps} warps, {stages} stages" + (", TMA" if fields.pop("tma") else "")
    return text + "".join(f", {name} {value}" for name, value in fields.items() if value is not None)


def tuner_part(inputs: Callable[[], Inputs]) -> Part:
    """What the tuner itself chooses and keeps for RHYTHM_AUTOTUNE=1; no record is made with it."""
    from rhythm.kernels import tuning

    with _autotuning():
        failed = []
        for sweep, op in ops(inputs()).items():
            try:
                op()
            except Exception as error:
                failed.append(f"{sweep}: {told(error)}")
    path = tuning.cache_file()
    kept = path.read_text(encoding="utf-8") if path.exists() else "no tiles raced: none has another beside it"
    return Part("tuner", (), (), (), tuple(failed), bool(failed), facts={"file": kept})


def _part(sweep: str, found: Field, tiles: Sequence[Any]) -> Part:
    default = described(tiles[0])
    names = sorted(found.replayed, key=lambda name: found.replayed[name].median)
    over = found.replayed.get(default)
    rows, table = [], []
    for name in names:
        timing = found.replayed[name]
        share = timing.median / over.median if over else None
        marks = [mark for mark, is_so in (("default", name == default), ("fastest", name == names[0])) if is_so]
        rows.append({"sweep": sweep, "tile": name, "seconds": timing.median, "to_default": share, "is": marks})
        shown = "" if share is None else f"{share:.3f}"
        table.append({"tile": name, "ms": f"{1e3 * timing.median:,.4f}", "over default": shown, "": ", ".join(marks)})
    wrong = any(reason.startswith("WRONG") for reason in found.failed.values()) or default in found.failed
    return Part(f"tiles_{sweep}", tuple(rows), (), (), found.not_measured(), wrong, tuple(table))


def _named(found: Any) -> Outputs:
    results: dict[str, Tensor | None] = {"span": found.span, "waad": found.waad, "fai": found.fai, "lse": found.lse}
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
