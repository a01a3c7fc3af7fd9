"""A complete rehearsal of gpu-record at the smallest shapes: kernels in the interpreter, times made up.

What is asserted is what a GPU's run depends on: that metrics come from replays, that nothing that fails or has no room
costs more than itself, and that whatever was found is on disk before the next part begins.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import implementations as ops
from benchmarks.gpu import implementations, run, suite
from benchmarks.gpu.clock import Budget, Clock, MadeUpClock
from benchmarks.gpu.implementations import Implementation
from benchmarks.gpu.report import GpuPart, Plain, Planned, Report
from benchmarks.implementations import Maker
from benchmarks.shapes import Inputs, Shape

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # numpy's and flex attention's, uncompiled
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is chosen where there is no GPU"),
]
MADE_UP = MadeUpClock.made_up
SHAPE = Shape(40, query_heads=2, key_heads=1, head_size=16)


def raising(error: Exception, *, at_once: bool) -> Maker:
    def make(inputs: Inputs) -> Callable[[], Any]:
        if at_once:
            raise error

        def call() -> Any:
            raise error

        return call

    return make


def lying(inputs: Inputs) -> Callable[[], Any]:
    right = ops.eager(inputs)
    return lambda: {name: x * 1.5 for name, x in right().items()}


def counted(shape: Shape) -> int:
    return shape.tokens


RIVALS = (
    Implementation("builds_not", raising(RuntimeError("no such layout\nand more"), at_once=True), counted),
    Implementation("compiles_not", raising(ValueError("inductor gave up"), at_once=False), counted, plain=True),
    Implementation("lies", lying, counted),
    Implementation("no_room", raising(torch.OutOfMemoryError("17 GB"), at_once=False), counted, late=True),
    Implementation("lies_late", lying, counted, late=True),
    Implementation("eager_late", ops.eager, counted, late=True),
    Implementation("short", ops.eager, counted, late=True, max_tokens=8),
)


@pytest.fixture(scope="module")
def tiny(smallest: suite.GpuSettings) -> suite.GpuSettings:
    return replace(smallest, implementations=(*smallest.implementations, *RIVALS))


def names(part: dict[str, Any], key: str = "op") -> list[str]:
    return [row[key] for row in part["rows"]]


@pytest.fixture(scope="module")
def record(
    tmp_path_factory: pytest.TempPathFactory, tiny: suite.GpuSettings, rehearse: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "INTERPRETED", tiny)
        return rehearse("record", tmp_path_factory.mktemp("records"))


def test_the_record_has_its_parts_in_order(record: dict[str, Any]) -> None:
    assert list(record["parts"]) == ["race", "actor_attn", "packed_30", "race_24", "rivals_40"]
    assert record["machine"] == {"name": "rehearsal"}


def test_ratios_are_those_of_the_replays(record: dict[str, Any]) -> None:
    best = MADE_UP("sdpa_flash")
    metrics = record["parts"]["race"]["metrics"]
    assert [metric["name"].split(" ")[0] for metric in metrics] == ["statistics", "with_output", "bands", "bands"]
    values = [MADE_UP(name) / best for name in ("statistics", "with_output", "bands", "bands")]
    assert [metric["value"] for metric in metrics] == pytest.approx(values)
    assert [metric["name"].rpartition(", both ")[2] for metric in metrics] == [
        "replayed", "replayed", "eager", "replayed",
    ]  # fmt: skip
    assert [metric["at_most"] for metric in metrics] == [0.5, 1.05, None, 0.05]
    assert [metric["met"] for metric in metrics] == [values[0] <= 0.5, values[1] <= 1.05, None, False]


def test_rows_hold_all_three_times(record: dict[str, Any]) -> None:
    for row in record["parts"]["race"]["rows"]:
        # Two rounds, the second 1 % slower; eager takes half as much again.
        assert row["by"] == "replayed"
        assert row["seconds"] == pytest.approx(1.005 * MADE_UP(row["op"]))
        assert row["eager_seconds"] == pytest.approx(1.5 * row["seconds"])
        assert row["host_seconds"] == 2e-4
        assert row["to_best_forward"] == pytest.approx(MADE_UP(row["op"]) / MADE_UP("sdpa_flash"))


def test_rivals_that_fail_cost_their_own_rows(record: dict[str, Any]) -> None:
    assert names(record["parts"]["race"]) == ["sdpa_flash", "statistics", "with_output", "bands"]
    assert names(record["parts"]["rivals_40"]) == ["sdpa_flash", "statistics", "eager_late"]
    missing = record["not_measured"]
    assert "race, builds_not: RuntimeError: no such layout" in missing
    assert "race, compiles_not: ValueError: inductor gave up" in missing
    assert any(reason.startswith("race, lies: span has error 5.0e-01, allowed is ") or
               (reason.startswith("race, lies: ") and "has error" in reason) for reason in missing)  # fmt: skip
    assert "rivals_40, no_room: OutOfMemoryError: 17 GB" in missing
    assert any(reason.startswith("rivals_40, lies_late: ") and "has error 5.0e-01" in reason for reason in missing)
    assert "short: only to T = 8" in record["parts"]["rivals_40"]["absent"]


def test_the_table_names_them_too(tiny: suite.GpuSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def part() -> GpuPart:
        return suite.late_part(tiny, MadeUpClock(), SHAPE, Budget(1000))

    report = Report(MadeUpClock(), "x.json", tmp_path, Plain(), Plain())
    report.run([Planned("rivals_40", 1.0, part)], Budget(1000))
    printed = capsys.readouterr().out
    assert "not measured: no_room: OutOfMemoryError: 17 GB" in printed
    header, *rows = printed[printed.index("op ") :].splitlines()[:4]
    assert header.split()[:3] == ["op", "T", "ms"]
    assert {"by", "eager", "host"} <= set(header.split())
    assert [row.split()[0] for row in rows] == ["sdpa_flash", "statistics", "eager_late"]
    assert rows[1].split()[2] == f"{1005 * MADE_UP('statistics'):.3f}"


def test_an_implementation_that_cannot_be_captured_is_timed_eagerly(
    tiny: suite.GpuSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def captured(self: Clock, call: Callable[[], Any]) -> Callable[[], Any]:
        if "lse" not in call():
            return call
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(MadeUpClock, "captured", captured)
    settings = replace(
        tiny, implementations=tuple(one for one in tiny.implementations if one.name in ("sdpa_flash", "eager_late"))
    )
    part = suite.late_part(settings, MadeUpClock(), SHAPE, Budget(1000))
    forward, eager = part.rows
    assert (forward["by"], eager["by"]) == ("replayed", "eager")
    assert eager["seconds"] == pytest.approx(1.5 * 1.005 * MADE_UP("eager_late"))
    assert part.not_measured == (
        "eager_late: not captured in a graph, RuntimeError: operation not permitted when stream is capturing",
    )
    # Over the best forward's eager calls, which are not its replays.
    assert eager["to_best_forward"] == pytest.approx(MADE_UP("eager_late") / MADE_UP("sdpa_flash"))


def test_an_op_of_ours_that_fails_is_an_error_with_a_record(
    smallest: suite.GpuSettings,
    rehearse: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = next(one for one in smallest.implementations if one.name == "statistics")

    def make(inputs: Inputs) -> Callable[[], Any]:
        if inputs.shape == SHAPE:
            raise RuntimeError("misaligned address")
        return real.make(inputs)

    broken = tuple(replace(one, make=make) if one is real else one for one in smallest.implementations)
    monkeypatch.setattr(run, "INTERPRETED", replace(smallest, implementations=broken, lengths=(), packed=()))
    record = rehearse("record", tmp_path, code=1)
    assert "race, statistics: RuntimeError: misaligned address" in record["not_measured"]
    assert names(record["parts"]["race"]) == ["sdpa_flash", "with_output", "bands"]


def test_the_record_is_written_after_every_part(tmp_path: Path) -> None:
    """Three parts; the second raises, the third exceeds the budget. Records what is on disk when each begins."""
    seen: list[tuple[list[str], list[str]]] = []

    def on_disk() -> None:
        stored = json.loads((tmp_path / "rehearsal" / "x.json").read_text())
        seen.append((list(stored["parts"]), stored["not_measured"]))

    def second() -> GpuPart:
        on_disk()
        raise RuntimeError("an illegal memory access was encountered")

    def third() -> GpuPart:
        on_disk()
        return GpuPart("third")

    report = Report(MadeUpClock(), "x.json", tmp_path, Plain(), Plain())
    times = iter([0.0, 1.0, 2.0, 3.0, 95.0])
    budget = Budget(100.0, now=lambda: next(times))
    report.run(
        [Planned("first", 5, lambda: GpuPart("first")), Planned("second", 5, second), Planned("third", 5, third),
         Planned("fourth", 10, third)], budget,
    )  # fmt: skip
    on_disk()
    lost = "second: RuntimeError: an illegal memory access was encountered"
    assert seen == [(["first"], []), (["first"], [lost]), (["first", "third"], [lost, "fourth: budget"])]
    assert report.end() == 1


@pytest.mark.parametrize(
    ("command", "first", "count"), [("check", "card", 6), ("race", "tiles_row", 11), ("record", "race", 5)]
)
def test_no_room_is_named(
    command: str,
    first: str,
    count: int,
    tiny: suite.GpuSettings,
    rehearse: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "INTERPRETED", tiny)
    record = rehearse(command, tmp_path, budget=0.5)
    assert record["parts"] == {}
    assert record["not_measured"][0] == f"{first}: budget"
    assert len(record["not_measured"]) == count


def test_implementations_of_a_gpu() -> None:
    """The implementations timed on a GPU, which can't run here: rhythm's ops first, those that compile at the end."""
    by_name = {one.name: one for one in implementations.GPU}
    assert not any(by_name[name].late for name in suite.OURS)
    assert all(one.late for one in implementations.GPU if not one.plain and one.name not in suite.OURS)
    assert by_name["flex"].max_tokens <= 16384
    plain = [one.name for one in implementations.GPU if one.plain]
    assert {"sdpa_cudnn", "sdpa_cudnn_expanded", "sdpa_flash", "sdpa_flash_expanded"} <= set(plain)
    planned = [one.name for one in suite.parts(suite.FULL, MadeUpClock(), {}, Budget(1))]
    assert planned[:7] == [
        "race", "actor_attn", "packed_16384", "packed_65536", "race_16384", "race_32768", "race_131072",
    ]  # fmt: skip
    assert planned[-2:] == ["rivals_8192", "rivals_4096"]
