"""A complete rehearsal of gpu-check at the smallest shapes: kernels in the interpreter, times made up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from benchmarks import implementations as ops
from benchmarks.gpu import check, forms
from benchmarks.gpu.check import Selection
from benchmarks.gpu.clock import Budget, InterpreterClock
from benchmarks.gpu.suite import GpuSettings
from benchmarks.shapes import Inputs, Shape
from rhythm.kernels import gluon_choice
from rhythm.kernels.launch import _forced
from rhythm.kernels.tile_tables import TABLES, KernelKey, Tile
from rhythm.ops.answers import ALSO

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # numpy's and flex attention's, uncompiled
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is chosen where there is no GPU"),
]
SHAPE = Shape(40, query_heads=2, key_heads=1, head_size=16)


@pytest.fixture(scope="module")
def checked(
    tmp_path_factory: pytest.TempPathFactory, smallest: GpuSettings, rehearse: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "REHEARSED", replace(check.REHEARSED, suite=smallest))
        return rehearse("check", tmp_path_factory.mktemp("records"))


def test_check_finds_ceilings(checked: dict[str, Any]) -> None:
    assert list(checked["parts"]) == ["card", "ceilings", "implementations", "forms", "tests of tiles", "gluon"]
    rows = {row["name"]: row for row in checked["parts"]["ceilings"]["rows"]}
    assert list(rows) == ["matmul 16³, bf16", "copy, read and written", "L2 read, 0 MB", f"sdpa_flash {SHAPE}"]
    matmul = rows["matmul 16³, bf16"]
    assert matmul["rate"] == pytest.approx(2 * 16**3 / matmul["seconds"] / 1e12)
    read = rows["L2 read, 0 MB"]
    assert read["rate"] == pytest.approx(2 * 2 * 4 * 4096 / read["seconds"] / 1e12)
    (metric,) = checked["parts"]["ceilings"]["metrics"]
    assert metric["at_least"] == 500
    assert metric["value"] == rows[f"sdpa_flash {SHAPE}"]["rate"]
    assert metric["met"] is False


def test_check_compares_our_implementations_with_the_reference(checked: dict[str, Any]) -> None:
    rows = checked["parts"]["implementations"]["rows"]
    assert {(row["op"], row["result"]) for row in rows} == {
        *(("statistics", name) for name in ("span", "waad", "fai", "lse")),
        *(("with_output", name) for name in ("out", "span", "waad", "fai", "lse")),
        ("bands", "waad"), ("bands", "fai"),
    }  # fmt: skip
    assert all(row["error"] <= row["allowed"] for row in rows)
    assert any(row["error"] > 0 for row in rows)
    forms = checked["parts"]["forms"]["rows"]
    columns = {
        (f"columns{way}", name) for way in ("", ", lse given") for name in ("largest", "weighted", "largest, weighted")
    }
    answers = {(f"answers{way}", name) for way in ("", ", lse given") for name in ALSO}
    assert {(row["op"], row["result"]) for row in forms} == {("bands", "lse")} | columns | answers | {
        (row["op"], row["result"]) for row in rows
    }
    assert len({row["form"] for row in forms}) == 6
    assert all(row["error"] <= row["allowed"] for row in forms)
    assert checked["parts"]["tests of tiles"]["counts"] == {"passed": 1}
    assert checked["parts"]["gluon"]["counts"] == {"passed": 1}


def test_a_form_that_is_wrong_is_named(smallest: GpuSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that leave out the sink: only the cases with sinks are wrong."""
    from rhythm.ops.backends import triton

    real = triton._forms
    monkeypatch.setattr(triton, "_forms", lambda request: real(request)._replace(sinks=None))
    part = forms.forms_part(smallest, InterpreterClock())
    assert part.failed
    assert {row["form"] for row in part.rows if row["error"] > row["allowed"]} == {
        "window, sinks", "all forms, half of the rows",
    }  # fmt: skip
    assert any("statistics window, sinks T=33" in reason and "lse has error" in reason for reason in part.not_measured)


def test_a_wrong_kernel_is_bisected(
    smallest: GpuSettings,
    rehearse: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Statistics that are wrong unless tiles of 32 × 32 are forced; the interpreter's own tile has another size. Plain
    attention alone, as each way of the bisection checks the forms as well.
    """
    monkeypatch.setattr(forms, "forms", lambda inputs: {"plain": ({}, inputs.shape.tokens)})
    monkeypatch.setitem(
        TABLES, "interpreter", {s: {g: [Tile(16, 16, 1, 1)] for g in t} for s, t in TABLES["interpreter"].items()}
    )
    real = ops.statistics

    def make(inputs: Inputs) -> Callable[[], Any]:
        call = real(inputs)

        def wrong_with_large_tiles() -> Any:
            results, choice = call(), _forced.get()
            small = choice is not None and choice(KernelKey("row", 2, 16)) == [Tile(32, 32, 4, 1)]
            return results if small else results | {"waad": results["waad"] + 0.5}

        return wrong_with_large_tiles

    implementations_ = tuple(replace(one, make=make) for one in smallest.implementations if one.name == "statistics")
    settings = replace(check.REHEARSED, suite=replace(smallest, implementations=implementations_), tests=())
    monkeypatch.setattr(check, "REHEARSED", settings)
    record = rehearse("check", tmp_path, code=1)
    (reason,) = record["parts"]["implementations"]["wrong"]
    assert reason.startswith("statistics T=33, Hq=2, Hkv=1, D=16 bfloat16: statistics: waad has error ")
    wrong = record["parts"]["bisection"]["wrong with"]
    assert wrong["tiles of 32 × 32"] == []
    assert len(wrong["the same tiles, TMA off"]) == 1
    assert "before running gpu-race or gpu-record" in capsys.readouterr().out


def test_gluon_fails_the_check_only_where_it_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = tmp_path / "test_it.py"
    failing.write_text("def test_wrong(): assert 1 == 2\n", encoding="utf-8")
    selection, clock = Selection("gluon", (str(failing),), 60.0), InterpreterClock()
    part = check.gluon_part(selection, clock, Budget(100))
    assert not part.failed
    assert part.facts["exit"] == 1
    assert part.not_measured == ("the row sweep in Gluon is wrong: it stays off",)
    monkeypatch.setattr(gluon_choice, "PROVEN", {triton.__version__: "a record"})
    assert check.gluon_part(selection, clock, Budget(100)).failed
    monkeypatch.setattr(gluon_choice, "unavailable", lambda device: f"{device} is no Hopper")
    monkeypatch.setattr(clock, "device", "cuda")
    assert check.gluon_part(selection, clock, Budget(100)).absent == ("cuda is no Hopper",)


def test_failing_tests_fail_the_check(tmp_path: Path) -> None:
    failing = tmp_path / "test_it.py"
    failing.write_text("def test_right(): pass\ndef test_wrong(): assert 1 == 2\n", encoding="utf-8")
    part = check.tests_part(Selection("a", (str(failing),), 60.0), Budget(100))
    assert part.failed
    assert part.facts["counts"] == {"failed": 1, "passed": 1}
    assert part.facts["failed"][0].split(" - ")[0].endswith("test_it.py::test_wrong")
    assert check.tests_part(Selection("a", (str(failing), "-k", "no_such_test"), 60.0), Budget(100)).failed
    slow = tmp_path / "test_slow.py"
    slow.write_text("import time\ndef test_slow(): time.sleep(60)\n", encoding="utf-8")
    stopped = check.tests_part(Selection("a", (str(slow),), 2.0), Budget(100))
    assert stopped.failed
    assert stopped.not_measured == ("stopped after 2 s",)
