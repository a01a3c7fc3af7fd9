"""Which tile runs: what fits, the fixed default, the race and its memory."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from rhythm.kernels import tuning
from rhythm.kernels.configurations import SWEEPS, TABLES, Kind, Tile, architecture, candidates, needed_memory
from rhythm.kernels.launch import launch
from torch import Tensor
from triton.runtime.errors import OutOfResources

ROW = Kind("row", 2, 128)
KB = 1024
FAST, SLOW = Tile(32, 32, 1, 1), Tile(64, 64, 1, 1)


def test_needed_memory() -> None:
    # 128 rows of q stay, two stages of 64 keys come: 256 rows of 128 two-byte elements; with values twice the keys.
    assert needed_memory(Tile(128, 64, 4, 2), ROW) == 256 * 256
    assert needed_memory(Tile(128, 64, 4, 2), Kind("row_values", 2, 128)) == 384 * 256
    # Columns: the keys stay, the rows come.
    assert needed_memory(Tile(128, 64, 4, 2), Kind("column", 4, 64)) == (64 + 2 * 128) * 256
    assert needed_memory(Tile(128, 64, 4, 2), Kind("bands_band", 4, 64)) == (64 + 2 * 128) * 256


def test_candidates_fit_and_load_as_they_can() -> None:
    first, *_ = TABLES["sm_90"]["row"]["half128"]
    assert candidates("sm_90", ROW, 227 * KB, tma=True)[0] == first == Tile(128, 128, 8, 2, True)
    without = candidates("sm_90", ROW, 227 * KB, tma=False)
    assert not any(tile.tma for tile in without)
    assert len(without) == len(set(without)) < len(TABLES["sm_90"]["row"]["half128"])
    # A GPU with less shared memory: the first that fits, and with none a smaller pipeline of the smallest.
    assert candidates("sm_80", ROW, 60 * KB, tma=False)[0] == Tile(128, 32, 4, 3)
    assert candidates("sm_80", ROW, 20 * KB, tma=False) == [Tile(128, 32, 4, 1)]


@pytest.mark.parametrize("arch", TABLES)
def test_every_table_is_complete(arch: str) -> None:
    for sweep in SWEEPS:
        for itemsize in (2, 4):
            for padded in (16, 64, 128, 256):
                tile = candidates(arch, Kind(sweep, itemsize, padded), 160 * KB, tma=True)[0]
                assert needed_memory(tile, Kind(sweep, itemsize, padded)) <= 160 * KB


@pytest.mark.parametrize(
    ("capability", "table"), [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((12, 0), "sm_100")]
)
def test_architecture(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], table: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    architecture.cache_clear()
    assert architecture(torch.device("cuda", 0)) == table
    architecture.cache_clear()


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Tile]:
    """Autotuning on, over two tiles, with times by the clock of this list of what was timed."""
    timed: list[Tile] = []

    def measured(run: object, tile: Tile) -> float:
        timed.append(tile)
        return 1.0 if tile == FAST else 2.0

    monkeypatch.setenv("RHYTHM_AUTOTUNE", "1")
    monkeypatch.setenv("RHYTHM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "measured", measured)
    monkeypatch.setitem(TABLES, "interpreter", {"row": {"half128": [SLOW, FAST]}})
    tuning._remembered.cache_clear()
    return timed


def launched(q: Tensor | None = None) -> list[Tile]:
    ran: list[Tile] = []
    launch(ROW, torch.empty(1, dtype=torch.bfloat16) if q is None else q, False, ran.append)
    return ran


def test_the_default_runs_unless_asked(races: list[Tile], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RHYTHM_AUTOTUNE")
    assert launched() == [SLOW]
    assert races == []


def test_the_fastest_runs_and_is_remembered(races: list[Tile], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="rhythm"):
        assert launched() == [FAST]
    assert races == [SLOW, FAST]
    assert "Tile(rows=32, keys=32" in caplog.text
    assert launched() == [FAST]
    tuning._remembered.cache_clear()  # as in another process
    assert launched() == [FAST]
    assert races == [SLOW, FAST]
    (kept,) = json.loads(tuning.cache_file().read_text(encoding="utf-8")).items()
    assert kept[0].startswith("interpreter, triton ")
    assert kept[0].endswith("row, 2 bytes, D 128")
    assert Tile(**kept[1]) == FAST


def test_a_remembered_tile_that_is_no_longer_offered_races_again(races: list[Tile]) -> None:
    launched()
    path = tuning.cache_file()
    path.write_text(path.read_text(encoding="utf-8").replace('"rows": 32', '"rows": 16'), encoding="utf-8")
    tuning._remembered.cache_clear()
    assert launched() == [FAST]
    assert races == [SLOW, FAST, SLOW, FAST]


def test_a_tile_without_room_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(tile: Tile) -> None:
        raise OutOfResources(300, 200, "shared memory")

    monkeypatch.setattr("triton.testing.do_bench", lambda call, **options: call())
    assert tuning.measured(run, FAST) == float("inf")


def test_nothing_races_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHYTHM_AUTOTUNE", "1")
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert tuning.autotuning(torch.device("cuda")) is not capturing
