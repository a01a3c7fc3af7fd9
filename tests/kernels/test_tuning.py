"""Which tile runs: the tiles that fit, the fixed default, autotuning and its file."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs the extra triton")

import triton
from triton.runtime.errors import OutOfResources, PTXASError

from rhythm import attention_statistics, attention_with_statistics, column_scores
from rhythm.kernels import tuning
from rhythm.kernels.launch import kernel_key, options, run_with_tile
from rhythm.kernels.tile_tables import (
    FORM_TILES,
    KERNELS,
    TABLES,
    KernelKey,
    Tile,
    architecture,
    candidates,
    needed_memory,
)
from rhythm.kernels.tuning import Sample

pytestmark = pytest.mark.triton

ROW = KernelKey("row", 2, 128)
KB = 1024
MEASURED = tuning.measured
FAST, SLOW = Tile(32, 32, 1, 1), Tile(64, 64, 1, 1)


def test_needed_memory() -> None:
    # 128 rows of q stay, two stages of 64 keys come: 256 rows of 128 two-byte elements; with values twice the keys.
    assert needed_memory(Tile(128, 64, 4, 2), ROW) == 256 * 256
    assert needed_memory(Tile(128, 64, 4, 2), KernelKey("row_values", 2, 128)) == 384 * 256
    # Columns: the keys stay, the rows come.
    assert needed_memory(Tile(128, 64, 4, 2), KernelKey("column", 4, 64)) == (64 + 2 * 128) * 256
    assert needed_memory(Tile(128, 64, 4, 2), KernelKey("bands_band", 4, 64)) == (64 + 2 * 128) * 256


def test_candidates_fit_and_load_as_they_can() -> None:
    first, *_ = TABLES["sm_90"]["row"]["half128"]
    assert candidates("sm_90", ROW, 227 * KB, tma=True)[0] == first == Tile(128, 128, 8, 2, True, 128)
    without = candidates("sm_90", ROW, 227 * KB, tma=False)
    assert not any(tile.tma for tile in without)
    assert len(without) == len(set(without)) < len(TABLES["sm_90"]["row"]["half128"])
    # A GPU with less shared memory: the first that fits, and with none a smaller pipeline of the smallest.
    assert candidates("sm_80", ROW, 60 * KB, tma=False)[0] == Tile(128, 32, 4, 3)
    assert candidates("sm_80", ROW, 20 * KB, tma=False) == [Tile(128, 32, 4, 1)]


def test_columns_to_the_end_are_held_to_two_programs_a_multiprocessor() -> None:
    for kernel in ("column", "bands"):
        first = candidates("sm_90", KernelKey(kernel, 2, 128), 227 * KB, tma=True)[0]
        assert (first.max_registers, options(first)["maxnreg"]) == (128, 128)
        assert candidates("sm_100", KernelKey(kernel, 2, 128), 227 * KB, tma=True)[0].max_registers is None
    assert options(FAST) == {"num_warps": 1, "num_stages": 1}  # AMD's compiler refuses even a None


def test_forms_of_attention_run_with_one_tile() -> None:
    """The first of the table, or their own where that would spill."""
    plain, forms = KernelKey("row_values", 2, 128), KernelKey("row_values", 2, 128, plain=False)
    assert len(candidates("sm_100", plain, 227 * KB, tma=True)) == 3
    assert candidates("sm_100", forms, 227 * KB, tma=True) == [FORM_TILES["sm_100"]["row_values"]["half128"]]
    assert candidates("sm_90", forms, 227 * KB, tma=True) == candidates("sm_90", plain, 227 * KB, tma=True)[:1]


@pytest.mark.parametrize(
    "arguments", [{"rows": 8}, {"sliding_window": 5}, {"cap_scale": 0.1}, {"sinks": torch.ones(2)}]
)
def test_a_call_with_a_form_is_not_plain(arguments: dict[str, Any]) -> None:
    q = torch.empty(9, 2, 80, dtype=torch.bfloat16)
    none = dict.fromkeys(("rows", "sliding_window", "cap_scale", "sinks"))
    assert kernel_key("row", q, none) == KernelKey("row", 2, 128)
    assert kernel_key("row", q, none | arguments) == KernelKey("row", 2, 128, plain=False)


@pytest.mark.parametrize("arch", TABLES)
def test_every_table_is_complete(arch: str) -> None:
    for kernel in KERNELS:
        for itemsize in (2, 4):
            for padded in (16, 64, 128, 256):
                tile = candidates(arch, KernelKey(kernel, itemsize, padded), 160 * KB, tma=True)[0]
                assert needed_memory(tile, KernelKey(kernel, itemsize, padded)) <= 160 * KB


@pytest.mark.parametrize(
    ("capability", "table"), [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((12, 0), "sm_100")]
)
def test_architecture(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], table: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    architecture.cache_clear()
    assert architecture(torch.device("cuda", 0)) == table
    architecture.cache_clear()


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Tile]:
    """Turns autotuning on, over two tiles with made-up times; the list names the tiles that were timed."""
    timed: list[Tile] = []

    def measured(run: Callable[[Tile], None], tile: Tile) -> float:
        timed.append(tile)
        return 1.0 if tile == FAST else 2.0

    monkeypatch.setenv("RHYTHM_AUTOTUNE", "1")
    monkeypatch.setenv("RHYTHM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "measured", measured)
    monkeypatch.setitem(TABLES, "interpreter", {"row": {"half128": [SLOW, FAST], "float128": [SLOW, FAST]}})
    tuning._remembered.cache_clear()
    tuning._lost.clear()
    return timed


def heads(tokens: int = 3, query: int = 2, key: int = 1, size: int = 128, dtype: torch.dtype = torch.bfloat16) -> Any:
    return torch.ones(tokens, query, size, dtype=dtype), torch.ones(tokens, key, size, dtype=dtype)


def launched(*qk: Tensor, key: KernelKey = ROW) -> list[Tile]:
    ran: list[Tile] = []
    q, k = qk or heads()
    run_with_tile(key, q, k, False, ran.append, lambda sample: None)
    return ran


def test_the_default_runs_unless_asked(timed: list[Tile], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RHYTHM_AUTOTUNE")
    assert launched() == [SLOW]
    assert timed == []


def test_the_fastest_runs_and_is_remembered(timed: list[Tile], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="rhythm"):
        assert launched() == [FAST]
    assert timed == [SLOW, FAST]
    assert "Tile(rows=32, keys=32" in caplog.text
    assert launched() == [FAST]
    tuning._remembered.cache_clear()  # as in another process
    assert launched() == [FAST]
    assert timed == [SLOW, FAST]
    (kept,) = json.loads(tuning.cache_file().read_text(encoding="utf-8")).items()
    assert kept[0] == f"interpreter, triton {triton.__version__}, row, 2 bytes, D 128, group 2, threads"
    assert Tile(**kept[1]) == FAST


def test_tiles_are_timed_on_a_sample_of_one_length(timed: list[Tile], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles for a call with 3 tokens are timed on 8192, with its own heads, head size and type."""
    seen: list[tuple[Tile, Sample]] = []

    def measured(run: Callable[[Tile], None], tile: Tile) -> float:
        run(tile)
        return 0.0

    def on_sample(sample: Sample) -> None:
        run_with_tile(ROW, sample.q, sample.k, False, lambda tile: seen.append((tile, sample)), on_sample)

    monkeypatch.setattr(tuning, "measured", measured)
    before = torch.get_rng_state()
    q, k = heads(size=80)
    run_with_tile(ROW, q, k, False, lambda tile: None, on_sample)
    assert torch.equal(torch.get_rng_state(), before)
    assert [tile for tile, _ in seen] == [SLOW, FAST]
    for _, sample in seen:
        assert sample.q.shape == (8192, 2, 80)
        assert sample.k.shape == sample.v.shape == (8192, 1, 80)
        assert sample.q.dtype == torch.bfloat16
        assert sample.q.float().std() == pytest.approx(1, abs=0.01)
        assert (sample.sequences.tokens, sample.sequences.count) == (8192, 1)
        assert {x.shape for x in (sample.lse, *sample.results)} == {(2, 8192)}


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_launcher_races_itself(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile runs, on a sample of 96 tokens."""
    monkeypatch.setenv("RHYTHM_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "SAMPLE_TOKENS", 96)
    monkeypatch.setattr("rhythm.kernels.launch.candidates", lambda *a, **options: [FAST, Tile(16, 32, 1, 1)])
    keys: list[KernelKey] = []

    def tuned(key: KernelKey, q: Tensor, k: Tensor, tiles: list[Tile], run: Callable[[Sample, Tile], None]) -> Tile:
        sample = Sample.like(q, k)
        for tile in tiles:
            run(sample, tile)
        keys.append(key)
        assert sample.results[0].isfinite().all()
        if kernel not in ("row", "sampled", "row_answers"):
            assert (sample.results[0] != 9.5).any()
        return tiles[0]

    monkeypatch.setattr("rhythm.kernels.launch.tuned", tuned)
    q = torch.ones(40, 2, 16)
    horizon = (2, 9 if kernel.endswith("_band") else None)
    lse = torch.arange(1.0, 41).log().expand(2, 40)
    if kernel == "row_values":
        attention_with_statistics(q, q, q, backend="triton")
    elif kernel == "column_sums":
        column_scores(q, q, reduce="max", backend="triton")
    elif kernel == "row_answers":
        attention_statistics(q, q, also=("entropy", "top1"), backend="triton")
    elif kernel == "sampled":
        attention_statistics(q, q, lse=lse, span_rows=4, backend="triton")
    else:
        given = {"lse": lse, "span": False} if kernel.startswith("bands") else {}
        attention_statistics(q, q, horizon=horizon, backend="triton", **given)
    assert kernel in [key.kernel for key in keys]


def test_the_fastest_tile_depends_on_heads_and_type(timed: list[Tile]) -> None:
    ways = [
        heads(),
        heads(query=4),
        heads(size=96),
        heads(dtype=torch.float16),  # as wide as bf16, so as fast
        heads(tokens=5, query=4, key=2),  # the group of the first
        heads(dtype=torch.float32),
    ]
    for q, k in ways:
        assert launched(q, k, key=KernelKey("row", q.element_size(), 128)) == [FAST]
    assert len(timed) == 2 * 4
    assert launched(*heads(dtype=torch.float32), key=KernelKey("row", 4, 128)) == [FAST]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert launched(*heads(dtype=torch.float32), key=KernelKey("row", 4, 128)) == [FAST]
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(timed) == 2 * 5


def test_a_remembered_tile_that_is_no_longer_offered_is_timed_again(timed: list[Tile]) -> None:
    launched()
    path = tuning.cache_file()
    text = path.read_text(encoding="utf-8")
    for other in (text.replace('"rows": 32', '"rows": 16'), text.replace('"rows"', '"lines"')):
        path.write_text(other, encoding="utf-8")
        tuning._remembered.cache_clear()
        timed.clear()
        assert launched() == [FAST]
        assert timed == [SLOW, FAST]


@pytest.mark.parametrize(
    "error",
    [
        OutOfResources(300, 200, "shared memory"),
        PTXASError("ptxas fatal"),
        RuntimeError("PassManager::run failed"),
        AssertionError("not divisible"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_tile_that_does_not_compile_loses(
    error: Exception, timed: list[Tile], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run(tile: Tile) -> None:
        if tile == FAST:
            raise error

    monkeypatch.setattr("triton.testing.do_bench_cudagraph", lambda call, **options: call() or 2.0)
    monkeypatch.setattr(tuning, "measured", MEASURED)
    q, k = heads()
    assert tuning.tuned(ROW, q, k, [FAST, SLOW], lambda sample, tile: run(tile)) == SLOW
    assert f"tile left out: {FAST}: {type(error).__name__}: {error}" in caplog.text


def test_the_default_runs_when_all_lose(
    timed: list[Tile], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def measured(run: Callable[[Tile], None], tile: Tile) -> float:
        timed.append(tile)
        return float("inf")

    monkeypatch.setattr(tuning, "measured", measured)
    assert launched() == [SLOW]
    assert "no tile for interpreter" in caplog.text
    assert launched() == [SLOW]
    assert timed == [SLOW, FAST]  # once a process
    assert not tuning.cache_file().exists()


def test_a_graph_that_is_captured_runs_the_remembered_tile(timed: list[Tile], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "capturing", lambda device: True)
    assert launched() == [SLOW]  # nothing is known yet, and nothing may be timed
    assert timed == []
    monkeypatch.setattr(tuning, "capturing", lambda device: False)
    assert launched() == [FAST]
    monkeypatch.setattr(tuning, "capturing", lambda device: True)
    assert launched() == [FAST]
    tuning._remembered.cache_clear()  # from the file
    assert launched() == [FAST]
    assert timed == [SLOW, FAST]


def test_capture_is_asked_of_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for captured in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda captured=captured: captured)
        assert tuning.capturing(torch.device("cuda")) is captured
        assert not tuning.capturing(torch.device("cpu"))
