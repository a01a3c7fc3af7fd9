"""What the kernels compile to, for GPUs that are not here: no spills, wgmma on Hopper, and no worse than recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

RECORD = Path(__file__).parents[2] / f"benchmarks/records/compile_ahead/triton-{triton.__version__}.json"
LOOPS = {"row", "row_values", "column", "column_band", "bands", "bands_band", "sampled"}


def compile_ahead(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "rhythm.kernels.compile_ahead", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def key(kernel: dict[str, Any]) -> tuple[Any, ...]:
    tile = tuple((kernel["tile"] or {}).values())
    return kernel["arch"], kernel["sweep"], kernel["dtype"], kernel["head_size"], tile


@pytest.fixture(scope="module")
def record() -> dict[tuple[Any, ...], dict[str, Any]]:
    assert RECORD.exists(), f"no record for this Triton: make compile-ahead writes {RECORD}"
    return {key(kernel): kernel for kernel in json.loads(RECORD.read_text(encoding="utf-8"))["kernels"]}


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The tiles that run by default, for 2-byte types at both head sizes and fp32 at the smaller."""
    kernels = []
    for dtype, sizes in (("bf16", "128,256"), ("fp32", "128")):
        file = tmp_path_factory.mktemp("ahead") / f"{dtype}.json"
        options = ("--arch", "sm_90", "--defaults", "--dtypes", dtype, "--head-sizes", sizes, "--json", str(file))
        run = compile_ahead(*options)
        assert run.returncode == 0, run.stderr
        kernels += json.loads(file.read_text(encoding="utf-8"))["kernels"]
    return kernels


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_defaults_on_hopper(hopper: list[dict[str, Any]], record: dict[tuple[Any, ...], dict[str, Any]]) -> None:
    assert {kernel["sweep"] for kernel in hopper} == LOOPS | {"mean_span"}
    for kernel in hopper:
        recorded = record[key(kernel)]
        assert kernel["spills"] == 0, key(kernel)
        assert kernel["registers"] <= recorded["registers"], key(kernel)
        if kernel["sweep"] in LOOPS:
            assert kernel["per_score"]["all"] <= 1.01 * recorded["per_score"]["all"], key(kernel)
            assert any("GMMA" in opcode for opcode in kernel["matrix"]) == (kernel["dtype"] == "bf16"), key(kernel)
    (row,) = [k for k in hopper if (k["sweep"], k["dtype"], k["head_size"]) == ("row", "bf16", 128)]
    assert row["per_score"]["all"] <= 8
    assert 1 <= row["per_score"]["exp2"] <= 1.05
    assert row["registers"] <= 128
    assert 2 * row["shared"] <= 227 * 1024  # two programs share a multiprocessor


def test_the_record_covers_every_shipped_tile(record: dict[tuple[Any, ...], dict[str, Any]]) -> None:
    from rhythm.kernels.configurations import TABLES

    for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        for sweep, groups in TABLES[arch].items():
            for group, tiles in groups.items():
                dtype, size = ("bf16", "fp32")[group.startswith("float")], int(group[-3:])
                for tile in tiles:
                    kernel = record[arch, sweep, dtype, size, (tile.rows, tile.keys, tile.warps, tile.stages, tile.tma)]
                    assert kernel["spills"] == 0 or arch == "gfx942", kernel


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--arch", "sm_70"), "--arch names 'sm_70'; allowed are sm_80, sm_90, sm_100, gfx942"),
        (("--sweeps", "row,rwo"), "--sweeps names 'rwo'; allowed are row, row_values"),
        (("--head-sizes", "96"), "--head-sizes names '96'; allowed are 16, 32"),
    ],
)
def test_bad_options(options: tuple[str, ...], message: str) -> None:
    run = compile_ahead(*options)
    assert run.returncode == 2
    assert message in run.stderr


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "rhythm.kernels.compile_ahead"]
    run = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert "TRITON_INTERPRET=1 is set" in run.stderr


@pytest.mark.slow
def test_every_way_of_launching_compiles() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compile_variants.py"))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    lines = run.stdout.splitlines()
    assert len(lines) == 11
    assert all(line.endswith(": 6 kernels") for line in lines)
