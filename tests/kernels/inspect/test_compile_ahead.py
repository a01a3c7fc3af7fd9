"""The kernels compiled without a GPU: no spills, wgmma on Hopper, and no worse than recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs the extra triton")

import triton

from rhythm.kernels.inspect.compile_ahead import MULTIPROCESSORS, main

pytestmark = pytest.mark.triton

RECORDS = Path(__file__).parents[3] / "benchmarks/records/compile_ahead"
RECORD = RECORDS / f"triton-{triton.__version__}.json"
LOOPS = {"row", "row_values", "column", "column_band", "bands", "bands_band", "sampled"}
VARIANTS = {
    "column_max": "column_sums", "column_weighted": "column_sums",
    "row_largest": "row_answers", "row_entropy": "row_answers", "row_mass": "row_answers",
}  # fmt: skip
"""By their names in the tile tables; recorded for plain attention and for all forms."""
WITH_FORMS = {"sm_90", "sm_100", "gfx942"}
"""Architectures for which records have every kernel in 2-byte types with forms of attention."""


def compile_ahead(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "rhythm.kernels.inspect.compile_ahead", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def key(kernel: dict[str, Any]) -> tuple[Any, ...]:
    tile = tuple((kernel["tile"] or {}).values())
    return kernel["arch"], kernel["kernel"], kernel["form"], kernel["dtype"], kernel["head_size"], tile


def read(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    kernels = json.loads(path.read_text(encoding="utf-8"))["kernels"]
    by_key = {key(kernel): kernel for kernel in kernels}
    assert len(by_key) == len(kernels)
    return by_key


@pytest.fixture(scope="module")
def record() -> dict[tuple[Any, ...], dict[str, Any]]:
    assert RECORD.exists(), f"no record for this Triton: make compile-ahead writes {RECORD}"
    return read(RECORD)


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Reports on the default tiles, for 2-byte types at both head sizes and for fp32 at the smaller one; the forms for
    2-byte types at the smaller one.
    """
    kernels = []
    for i, (dtype, sizes, forms) in enumerate(
        (("bf16", "128,256", "plain"), ("fp32", "128", "plain"), ("bf16", "128", "window,softcap,all"))
    ):
        file = tmp_path_factory.mktemp("ahead") / f"{i}.json"
        options = ("--arch", "sm_90", "--defaults", "--dtypes", dtype, "--head-sizes", sizes, "--forms", forms)
        run = compile_ahead(*options, "--json", str(file))
        assert run.returncode == 0, run.stderr
        kernels += json.loads(file.read_text(encoding="utf-8"))["kernels"]
    return kernels


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_defaults_on_hopper(hopper: list[dict[str, Any]], record: dict[tuple[Any, ...], dict[str, Any]]) -> None:
    assert {kernel["kernel"] for kernel in hopper} == LOOPS | set(VARIANTS) | {"row_gluon", "results"}
    for kernel in hopper:
        recorded = record[key(kernel)]
        assert kernel["spills"] == 0, key(kernel)
        assert kernel["registers"] <= recorded["registers"], key(kernel)
        assert kernel["programs"] >= recorded["programs"], key(kernel)
        if kernel["kernel"] in LOOPS | set(VARIANTS):
            assert kernel["per_score"]["all"] <= 1.01 * recorded["per_score"]["all"], key(kernel)
            if recorded["barriers"] is not None:
                assert kernel["immediate_waits"] <= recorded["immediate_waits"], key(kernel)
                assert kernel["barriers"] <= recorded["barriers"], key(kernel)
            assert any("GMMA" in opcode for opcode in kernel["matrix"]) == (kernel["dtype"] == "bf16"), key(kernel)
    (row,) = [k for k in hopper if key(k)[1:-1] == ("row", "plain", "bf16", 128)]
    (windowed,) = [k for k in hopper if key(k)[1:-1] == ("row", "window", "bf16", 128)]
    assert windowed["per_score"]["all"] <= 1.02 * row["per_score"]["all"]  # the loop within the window has no masks
    assert row["per_score"]["all"] <= 5.4  # no maxima, no rescaling
    assert 1 <= row["per_score"]["exp2"] <= 1.05
    assert row["registers"] <= 128
    assert 2 * row["shared"] <= 227 * 1024  # two programs share a multiprocessor
    (gluon,) = [k for k in hopper if k["kernel"] == "row_gluon"]
    assert_gluon_is_lean(gluon)


def assert_gluon_is_lean(kernel: dict[str, Any]) -> None:
    """Four warpgroups and the warp that loads: 20 warps, one program per multiprocessor."""
    assert key(kernel)[:-1] == ("sm_90", "row_gluon", "plain", "bf16", 128)
    assert kernel["spills"] == 0
    assert kernel["per_score"]["all"] <= 4.8
    assert kernel["per_score"]["exp2"] == 1
    assert kernel["per_score"]["max"] == kernel["per_score"]["shuffle"] == 0
    assert kernel["registers"] <= 96  # 65,536 for 640 threads
    assert kernel["shared"] <= 227 * 1024
    assert kernel["matrix"] == {"HGMMA.64x128x16.F32.BF16": 4 * 2 * 8}  # warpgroups, loops, steps of 16 dimensions


@pytest.mark.parametrize("path", sorted(RECORDS.glob("triton-*.json")), ids=lambda path: path.stem)
def test_every_record_has_the_row_sweep_in_gluon(path: Path) -> None:
    (kernel,) = [k for k in json.loads(path.read_text(encoding="utf-8"))["kernels"] if k["kernel"] == "row_gluon"]
    assert_gluon_is_lean(kernel)


@pytest.mark.parametrize("path", sorted(RECORDS.glob("triton-*.json")), ids=lambda path: path.stem)
def test_no_shipped_tile_spills(path: Path) -> None:
    """Every record has every tile of the tables, without spills (Triton 3.6: but MAY_SPILL)."""
    from rhythm.kernels.tile_tables import TABLES

    record = read(path)
    assert json.loads(path.read_text(encoding="utf-8"))["triton"] == path.stem.removeprefix("triton-")
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        for table_name, groups in TABLES[arch].items():
            for name, (group, tiles) in product(names_of(table_name), groups.items()):
                dtype, size = ("bf16", "fp32")[group.startswith("float")], int(group[-3:])
                for tile in tiles:
                    kernel = record[arch, name, "plain", dtype, size, tile]
                    assert kernel["default"] == (tile == tiles[0]), kernel
                    may = path.stem == "triton-3.6.0" and (arch, name, dtype, size) in MAY_SPILL
                    assert kernel["spills"] == 0 or may, kernel
                    of_program = kernel["registers"], kernel["shared"], tile.warps
                    assert kernel["programs"] == MULTIPROCESSORS[arch].resident(*of_program), kernel


MAY_SPILL = {
    ("sm_80", "column", "bf16", 128), ("sm_80", "bands", "bf16", 128), ("sm_80", "sampled", "bf16", 256),
    ("sm_80", "column_band", "fp32", 256), ("sm_100", "row", "fp32", 256), ("sm_100", "row_values", "fp32", 256),
    ("sm_100", "row_largest", "fp32", 256),
}  # fmt: skip
"""With Triton 3.6."""


def names_of(table_name: str) -> list[str]:
    """A kernel's names in the records, by that in the tile tables."""
    return [name for name, kernel in VARIANTS.items() if kernel == table_name] or [table_name]


@pytest.mark.parametrize("path", sorted(RECORDS.glob("triton-*.json")), ids=lambda path: path.stem)
def test_no_tile_spills_with_forms(path: Path) -> None:
    from rhythm.kernels.inspect.compile_ahead import FORMS
    from rhythm.kernels.inspect.compile_ahead import VARIANTS as OWN_VARIANTS
    from rhythm.kernels.tile_tables import KernelKey, tiles_of

    record = read(path)
    assert list(FORMS) == ["plain", "window", "softcap", "all"]
    assert OWN_VARIANTS == VARIANTS
    for arch in WITH_FORMS:
        for name, size in product((*LOOPS, *VARIANTS), (128, 256)):
            key = KernelKey(VARIANTS.get(name, name), 2, size, plain=False)
            (tile,) = tiles_of(arch, key)
            for form in ("window", "softcap", "all") if name in LOOPS else ("all",):
                kernel = record[arch, name, form, "bf16", size, tile]
                assert kernel["spills"] == 0, kernel
                assert kernel["default"]


@pytest.mark.parametrize("path", sorted(RECORDS.glob("triton-*.json")), ids=lambda path: path.stem)
@pytest.mark.parametrize("name", ["row", "column", "column_band", "bands", "bands_band"])
def test_two_programs_share_a_multiprocessor_of_hopper(path: Path, name: str) -> None:
    """Heads of 128 in 2-byte types, with either Triton: a single program would leave the units idle while it waits."""
    from rhythm.kernels.tile_tables import TABLES

    default = TABLES["sm_90"][name]["half128"][0]
    kernel = read(path)["sm_90", name, "plain", "bf16", 128, default]
    assert kernel["default"]
    assert kernel["programs"] >= 2
    assert kernel["spills"] == 0
    assert kernel["immediate_waits"] >= 0
    assert kernel["barriers"] >= 0


def test_programs_per_multiprocessor() -> None:
    """Worked by hand from NVIDIA's table of compute capability 9.0: 65,536 registers, 228 kB less 1 kB per program."""
    hopper = MULTIPROCESSORS["sm_90"]
    assert hopper.resident(128, 66064, 8) == 2
    assert (
        hopper.resident(129, 66064, 8) == 1
    )  # 136 registers in units of 256 per warp: 15 warps fit, two programs don't
    assert hopper.resident(64, 115 * 1024, 8) == 1  # 116 kB each
    assert hopper.resident(64, 113 * 1024, 8) == 2
    assert hopper.resident(32, 0, 4) == 16  # 64 warps
    assert hopper.resident(16, 0, 1) == 32
    assert MULTIPROCESSORS["sm_80"].resident(96, 49408, 4) == 3  # 164 kB
    assert MULTIPROCESSORS["gfx942"].resident(128, 20 * 1024, 4) == 3  # 64 kB of LDS; registers allow 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--arch", "sm_70"), "--arch names 'sm_70'; allowed are sm_80, sm_90, sm_100, gfx942"),
        (("--forms", "windows"), "--forms names 'windows'; allowed are plain, window, softcap, all"),
        (("--kernels", "row,rwo"), "--kernels names 'rwo'; allowed are row, row_values"),
        (("--head-sizes", "96"), "--head-sizes names '96'; allowed are 16, 32"),
    ],
)
def test_bad_options(
    options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit, match="2"):
        main(options)
    assert message in capsys.readouterr().err


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_way_of_launching_compiles() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compile_variants.py"))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    lines = run.stdout.splitlines()
    assert len(lines) == 15
    in_gluon = {"no lengths", "batched"}  # two kernels more
    assert all(line.endswith(f": {14 if line.split(':')[0] in in_gluon else 12} kernels") for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("batches", ["--batches", "--windowed"])
def test_other_lengths_windows_and_horizons_compile_nothing_anew(batches: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compile_variants.py")), batches]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.splitlines() == [
        f"gluon_row_kernel: {int(batches == '--batches')}",
        f"row_sweep_kernel: {1 + (batches == '--batches')}",
        "row_values_kernel: 1",
        "bands_kernel: 3",  # after a row sweep, for a given lse, and for both
        "narrow_bands_kernel: 3",
        "sampled_span_kernel: 1",
        "results_kernel: 1",
        "mend_output_kernel: 1",
        "column_sums_kernel: 2",  # the largest, and the sum with factors
        "row_answers_kernel: 2",  # after a row sweep, and for a given lse
    ]
