"""A complete rehearsal of gpu-race at the smallest shapes: kernels in the interpreter, times made up."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from benchmarks import implementations as ops
from benchmarks.gpu import race, tiles
from benchmarks.gpu.clock import Budget, MadeUpClock
from benchmarks.gpu.prototypes import Prototype
from benchmarks.gpu.suite import GpuSettings
from benchmarks.implementations import Maker
from benchmarks.shapes import Inputs, Shape
from rhythm.kernels.launch import _forced, run_with_tile
from rhythm.kernels.tile_tables import TABLES, KernelKey, Tile

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # numpy's and flex attention's, uncompiled
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is chosen where there is no GPU"),
]
MADE_UP = MadeUpClock.made_up
SHAPE = Shape(40, query_heads=2, key_heads=1, head_size=16)
TILES = [Tile(32, 32, 1, 1), Tile(16, 32, 1, 1), Tile(16, 16, 1, 1)]


def settings_of(smallest: GpuSettings) -> race.RaceSettings:
    """Settings whose prototypes have the head size that prototypes require."""
    checked, timed = (Shape(tokens, query_heads=2, key_heads=1, head_size=64) for tokens in (33, 40))
    return replace(race.REHEARSED, suite=smallest, checked_shapes=(checked,), timed_shape=timed)


def names(part: dict[str, Any], key: str = "op") -> list[str]:
    return [row[key] for row in part["rows"]]


def trial(name: str, make: Maker, reason: str | None = None) -> Prototype:
    return Prototype(name, make, absent=lambda: reason, interprets=True)


def span_and_lse(inputs: Inputs) -> Callable[[], Any]:
    call = ops.eager(inputs)

    def run() -> Any:
        results = call()
        return {"span": results["span"][None], "lse": results["lse"]}

    return run


def compiles_not(inputs: Inputs) -> Callable[[], Any]:
    raise ValueError("ptxas fatal")


TRIALS = (
    trial("right", span_and_lse),
    trial("wrong", lambda inputs: lambda: {"lse": 1.1 * ops.eager(inputs)()["lse"]}),
    trial("raises", compiles_not),
    trial("elsewhere", span_and_lse, "needs another card"),
)


@pytest.fixture(scope="module")
def recorded(
    tmp_path_factory: pytest.TempPathFactory, smallest: GpuSettings, rehearse: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    """Two kinds of sweep; the last of the row sweep's three tiles does not fit."""
    folder = tmp_path_factory.mktemp("records")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(race, "REHEARSED", replace(settings_of(smallest), sweeps=("row", "bands_band")))
        patch.setattr(race, "prototypes", lambda: TRIALS)
        patch.setattr(tiles, "attention_statistics", without_room(tiles.attention_statistics))
        patch.setitem(TABLES, "interpreter", TABLES["interpreter"] | {"row": {"half128": TILES}})
        patch.setenv("RHYTHM_CACHE", str(folder / "cache"))
        patch.setattr("rhythm.kernels.tuning.measured", lambda call, tile: float(tile.rows + tile.keys))
        return rehearse("race", folder)


def without_room(op: Callable[..., Any]) -> Callable[..., Any]:
    """The op, raising what Triton raises at launch if a tile does not fit; here 16 × 16."""

    def run(*arguments: Any, **more: Any) -> Any:
        choice = _forced.get()
        if choice is not None and TILES[2] in choice(KernelKey("row", 2, 16)):
            raise OutOfResources(300, 200, "shared memory")
        return op(*arguments, **more)

    return run


def test_tiles_are_timed_by_replays(recorded: dict[str, Any]) -> None:
    part = recorded["parts"]["tiles_row"]
    named = ["32 × 32, 1 warps, 1 stages", "16 × 32, 1 warps, 1 stages"]
    assert sorted(names(part, "tile")) == sorted(named)
    times = {row["tile"]: row["seconds"] for row in part["rows"]}
    assert times == {name: pytest.approx(MADE_UP(name) * 1.005) for name in named}
    fastest = min(named, key=MADE_UP)
    assert [row["tile"] for row in part["rows"] if "fastest" in row["is"]] == [fastest]
    assert [row["tile"] for row in part["rows"] if "default" in row["is"]] == [named[0]]
    missing = [reason for reason in recorded["not_measured"] if reason.startswith("tiles_row")]
    assert len(missing) == 1
    assert missing[0].startswith("tiles_row, 16 × 16, 1 warps, 1 stages: OutOfResources: ")
    assert names(recorded["parts"]["tiles_bands_band"], "tile") == [named[0]]


def test_a_tile_with_other_results_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLES, "interpreter", TABLES["interpreter"] | {"row": {"half128": TILES[:2]}})
    compared: list[str] = []

    def different(actual: Any, expected: Any) -> str | None:
        compared.append("")
        changed = actual | {"lse": actual["lse"] + (len(compared) - 1)}
        return real(changed, expected)

    real = tiles.different
    monkeypatch.setattr(tiles, "different", different)
    part = tiles.tiles_part("row", SHAPE, MadeUpClock(), 2, Budget(100))
    assert part.failed
    assert [row["tile"] for row in part.rows] == ["32 × 32, 1 warps, 1 stages"]
    (reason,) = part.not_measured
    assert reason.startswith("16 × 32, 1 warps, 1 stages: WRONG: lse differs by ")


def test_only_the_raced_sweep_runs_while_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[int]] = {}

    def watched(key: KernelKey, *arguments: Any, **more: Any) -> Any:
        choice = _forced.get()
        assert choice is not None
        seen.setdefault(key.kernel, []).append(len(choice(key)))
        return run_with_tile(key, *arguments, **more)

    class Watching(MadeUpClock):
        def interleaved_replays(self, runs: Any, rounds: int) -> Any:
            for name, module in list(sys.modules.items()):
                if name.startswith("rhythm.kernels.") and getattr(module, "run_with_tile", None) is run_with_tile:
                    monkeypatch.setattr(module, "run_with_tile", watched)
            return super().interleaved_replays(runs, rounds)

    tiles.tiles_part("row", SHAPE, Watching(), 2, Budget(100))
    assert seen == {"row": [1], "column_band": [0]}


@pytest.mark.parametrize("sweep", race.SWEEPS)
def test_every_kind_of_sweep_has_an_op_that_runs_it(sweep: str) -> None:
    part = tiles.tiles_part(sweep, SHAPE, MadeUpClock(), 2, Budget(100))
    assert [row["tile"] for row in part.rows] == ["32 × 32, 1 warps, 1 stages"]
    assert part.not_measured == ()


def test_prototypes_are_timed_with_the_plain_forward(recorded: dict[str, Any]) -> None:
    part = recorded["parts"]["prototypes"]
    assert names(part) == ["sdpa_flash", "statistics", "with_output", "right"]
    right = part["rows"][-1]
    assert right["to_best_forward"] == pytest.approx(MADE_UP("right") / MADE_UP("sdpa_flash"))
    assert "elsewhere: needs another card" in part["absent"]
    assert "prototypes, raises: ValueError: ptxas fatal" in recorded["not_measured"]
    assert any(reason.startswith("prototypes, wrong: lse has error 1.0e-01") for reason in recorded["not_measured"])


def test_the_trees_own_prototypes_are_right(smallest: GpuSettings) -> None:
    """The prototypes that the interpreter can run; without any, the part says so."""
    trials: Sequence[Any] = [one for one in race.prototypes() if one.absent() is None]
    part = race.prototypes_part(race.prototypes(), (), settings_of(smallest), MadeUpClock(), Budget(100))
    assert {row["op"] for row in part.rows} == {"statistics", "with_output", *(one.name for one in trials)}
    assert part.not_measured == ()
    assert trials or part.absent[-1] == "prototypes: there are none (benchmarks.gpu.prototypes)"


def test_profiles(recorded: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = recorded["parts"]["kernels"]["rows"]
    assert {row["op"] for row in rows} == {"sdpa_flash", "statistics", "with_output", "bands"}
    assert any(row["kernel"] == "rhythm::attention_statistics" and row["seconds"] > 0 for row in rows)
    assert "counters, ncu: the command ncu (Nsight Compute) is not on the PATH" in recorded["not_measured"]

    ncu = tmp_path / "ncu"
    ncu.write_text(
        '#!/bin/sh\ncase "$*" in *cudnn*) echo "==ERROR== no kernel"; exit 3;; esac\necho "$@"\n', encoding="utf-8"
    )
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    part = race.counters_part("rehearsal", Budget(1000))
    assert list(part.facts["ncu"]) == ["statistics, row_sweep", "bands, bands", "with_output, row_values"]
    (said,) = part.facts["ncu"]["bands, bands"]
    assert "--clock-control none" in said
    assert "-k regex:bands " in said
    assert said.endswith("-m benchmarks.gpu.profile bands rehearsal")
    assert part.not_measured == ("sdpa_cudnn, .: ncu ended with 3: ==ERROR== no kernel",)


def test_the_tuner_keeps_what_it_chose(recorded: dict[str, Any]) -> None:
    kept = json.loads(recorded["parts"]["tuner"]["file"])
    ((key, tile),) = kept.items()
    assert ", row, 2 bytes" in key
    assert (tile["rows"], tile["keys"]) == (16, 16)
    assert list(recorded["parts"])[-1] == "tuner"
