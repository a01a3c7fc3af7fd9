"""benchmarks.run: quick mode from end to end, the correctness check, the record, and forbidden imports."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ROOT, given_lse, suite
from benchmarks.implementations import Outputs
from benchmarks.record import commit, machine, record_path
from benchmarks.registry import REGISTRY
from benchmarks.run import main
from benchmarks.shapes import Inputs
from benchmarks.suite import QUICK, Metric
from benchmarks.verify import WrongResultError


@pytest.fixture(autouse=True)
def _threads_as_before() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("benchmarks")
    assert main(["--device", "cpu", "--quick", "--json", str(folder / "q.json"), "--records", str(folder)]) == 0
    assert [path.name for path in folder.iterdir()] == ["q.json"], "quick mode leaves no record"
    parsed: dict[str, Any] = json.loads((folder / "q.json").read_text())
    return parsed


def test_record_says_where_its_numbers_come_from(record: dict[str, Any]) -> None:
    assert set(record) == {
        "date", "machine", "software", "commit", "threads", "settings", "correctness", "parts",
    }  # fmt: skip
    assert record["machine"] == machine()
    assert record["software"]["torch"] == torch.__version__
    assert set(record["commit"]) == {"hash", "dirty"}
    assert record["threads"] == 1
    assert record["settings"]["shape"] == {
        "tokens": 192, "prompt": 0, "query_heads": 4, "key_heads": 1, "head_size": 32,
    }  # fmt: skip


def test_record_holds_every_op_in_every_type(record: dict[str, Any]) -> None:
    for dtype in ("float32", "bfloat16"):
        measurements = record["parts"][f"race_{dtype}"]["measurements"]
        assert [m["op"] for m in measurements] == list(REGISTRY)
        for m in measurements:
            assert m["dtype"] == dtype
            assert m["shape"]["tokens"] == 192
            assert m["threads"] == 1
            assert m["rounds"] == 2
            assert 0 < m["seconds_min"] <= m["seconds_median"] <= m["seconds_max"] < 60
            assert m["flops"] > 0
            assert m["bytes"] > 0
            assert m["counted"].startswith("FLOPs: ")
            assert m["gflops_per_second"] == pytest.approx(m["flops"] / m["seconds_median"] / 1e9)


def test_record_holds_the_parts(record: dict[str, Any]) -> None:
    parts = record["parts"]
    assert [(m["op"], m["shape"]["tokens"]) for m in parts["bands"]["measurements"]] == [
        ("statistics", 128), ("bands", 128), ("statistics", 256), ("bands", 256),
    ]  # fmt: skip
    assert [(m["op"], m["dtype"]) for m in parts["windows"]["measurements"]] == [
        (op, dtype) for dtype in ("float32", "bfloat16") for op in ("statistics_windowed", "statistics")
    ]  # fmt: skip
    windowed, full, *_ = parts["windows"]["measurements"]
    assert full["flops"] / windowed["flops"] == pytest.approx((300 * 301 / 2) / (40 * 300 - 40 * 39 / 2))
    asked = ["", " and max_logit", " and top1", " and entropy", " and first_mass", " and prompt_mass"]
    assert [m["op"] for m in parts["also"]["measurements"]] == 2 * [
        f"statistics{more}" for more in (*asked, " and all of these")
    ]
    assert [m["name"] for m in parts["also"]["metrics"]][:1] == ["statistics and max_logit, float32: more time"]
    assert [m["op"] for m in parts["columns"]["measurements"]] == 2 * [
        "columns_sum", "columns_max", "columns_sum_weighted", "columns_max_weighted",
    ]  # fmt: skip
    assert [m["op"] for m in parts["several_bands"]["measurements"]] == 2 * ["bands_one_by_one", "bands_at_once"]
    at_once = parts["several_bands"]["measurements"][1]
    assert at_once["flops"] == 2 * 32 * 4 * sum(min(t + 1, 101) for t in range(192))  # horizons reach 100 tokens
    assert [m["name"] for m in parts["several_bands"]["metrics"]] == [
        f"bands_at_once, {dtype}: times as fast as one by one" for dtype in ("float32", "bfloat16")
    ]
    assert [m["threads"] for m in parts["threads"]["measurements"]] == [1, 2]
    assert all(metric["unit"] == "MB" and metric["value"] > 0 for metric in parts["memory"]["metrics"])
    metrics = [metric for part in parts.values() for metric in part["metrics"]]
    assert all(metric["met"] is None for metric in metrics), "targets are set for the full size"
    assert any("best blocked torch" in metric["name"] for metric in metrics)


def test_record_holds_what_the_check_saw(record: dict[str, Any]) -> None:
    assert [(checked["shape"]["tokens"], checked["dtype"]) for checked in record["correctness"]] == [
        (111, "float32"), (111, "bfloat16"), (192, "float32"), (192, "bfloat16"),
    ]  # fmt: skip
    for checked in record["correctness"]:
        assert {"statistics span", "bands fai", "with_output out", "blocked_64 waad"} <= set(checked["results"])


def test_a_wrong_op_stops_the_run_without_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = REGISTRY["statistics"]

    def make(inputs: Inputs) -> Callable[[], Outputs]:
        run = right.make(inputs)
        return lambda: run() | {"waad": run()["waad"] + 1e-3}

    monkeypatch.setitem(REGISTRY, "statistics", replace(right, make=make))
    assert main(["--quick", "--ops", "statistics", "sdpa", "--json", str(tmp_path / "q.json")]) == 1
    captured = capsys.readouterr()
    assert "no number is reported" in captured.err
    assert "statistics: waad has error" in captured.err
    assert "ms" not in captured.out
    assert not (tmp_path / "q.json").exists()


def test_a_wrong_answer_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    right = REGISTRY["statistics"]

    def make(inputs: Inputs) -> Callable[[], Outputs]:
        run = right.make(inputs)
        return lambda: {name: value * 1.001 if name == "entropy" else value for name, value in run().items()}

    with pytest.raises(WrongResultError, match="statistics: entropy has error"):
        suite.also_part(replace(right, make=make), QUICK, "cpu")


@pytest.mark.parametrize(
    ("op", "part", "message"),
    [
        ("column_scores", given_lse.columns_part, "columns_sum: scores has error"),
        ("attention_bands", given_lse.several_bands_part, "bands_at_once: (waad|fai) has error"),
    ],
)
def test_a_wrong_op_with_a_given_lse_stops_the_run(
    op: str, part: Callable[..., Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(given_lse, op)

    def wrong(*operands: Any, backend: str, **options: Any) -> Any:
        result, factor = right(*operands, backend=backend, **options), 1.0 if backend == "reference" else 1.02
        return tuple(factor * x for x in result) if isinstance(result, tuple) else factor * result

    monkeypatch.setattr(given_lse, op, wrong)
    with pytest.raises(WrongResultError, match=message):
        part(QUICK, "cpu")


def test_only_the_ops_asked_for(tmp_path: Path) -> None:
    assert main(["--quick", "--ops", "sdpa", "bands", "--json", str(tmp_path / "q.json")]) == 0
    parts = json.loads((tmp_path / "q.json").read_text())["parts"]
    assert list(parts) == ["race_float32", "race_bfloat16"]
    assert [m["op"] for m in parts["race_float32"]["measurements"]] == ["sdpa", "bands"]


def test_an_unknown_op_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--ops", "flash"]) == 2
    assert "'flash'" in capsys.readouterr().err


def test_a_full_run_leaves_a_record_with_its_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The full path at quick sizes: the settings are replaced, the rest is as without --quick."""
    monkeypatch.setattr("benchmarks.run.Settings", lambda: replace(QUICK, with_targets=True))
    assert main(["--records", str(tmp_path)]) == 0
    path = record_path("cpu", machine(), tmp_path)
    metrics = {
        metric["name"]: metric for part in json.loads(path.read_text())["parts"].values() for metric in part["metrics"]
    }
    assert metrics["statistics against eager: times as fast"]["at_least"] in (16.0, 25.0)
    with_target = [metric for metric in metrics.values() if metric["met"] is not None]
    assert all(
        metric["met"] == (metric["value"] >= metric["at_least"])
        if metric["at_least"] is not None
        else metric["met"] == (metric["value"] <= metric["at_most"])
        for metric in with_target
    )
    memory = [metric for name, metric in metrics.items() if "memory" in name]
    assert all(metric["met"] is True and metric["at_most"] == 200.0 for metric in memory)


def test_targets_are_met_or_not() -> None:
    assert Metric("", 16.0, "×", at_least=16.0).met is True
    assert Metric("", 15.9, "×", at_least=16.0).met is False
    assert Metric("", 1.1, "×", at_most=1.1).met is True
    assert Metric("", 1.2, "×", at_most=1.1).met is False
    assert Metric("", 1.2, "×").met is None


def test_targets_depend_on_the_dtype() -> None:
    settings = replace(QUICK, with_targets=True)
    targets = {
        dtype: [
            (metric.at_least, metric.at_most)
            for metric in suite.comparison_part(list(REGISTRY.values()), settings, "cpu", dtype).metrics
        ]
        for dtype in suite.DTYPES
    }
    assert targets[torch.float32] == [(16.0, None), (2.3, None), (None, 1.1), (None, None)]
    assert targets[torch.bfloat16] == [(25.0, None), (3.5, None), (None, 1.1), (None, None)]


def test_record_path_is_a_plain_name() -> None:
    where = {"cpu": "AMD EPYC(TM) 9B14", "cores": 2, "isa": "avx512_bf16"}
    path = record_path("cpu", where, Path("records"))
    assert path == Path("records/amd-epyc-tm-9b14-2-cores-avx512_bf16/attention_cpu.json")


def test_commit_is_that_of_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr("benchmarks.record.ROOT", tmp_path)
    git("init")
    assert commit() == {"hash": None, "dirty": False}
    (tmp_path / "file").write_text("1")
    git("add", ".")
    git("commit", "-m", "one")
    first = commit()
    assert first["dirty"] is False
    assert isinstance(first["hash"], str)
    assert len(first["hash"]) == 40
    (tmp_path / "benchmarks" / "records").mkdir(parents=True)
    (tmp_path / "benchmarks" / "records" / "new.json").write_text("{}")
    assert commit()["dirty"] is False, "a record is no change of what was measured"
    (tmp_path / "file").write_text("2")
    assert commit() == {"hash": first["hash"], "dirty": True}


def test_neither_transformers_nor_kernels_is_imported() -> None:
    """With the repository's root on sys.path, as `python -m benchmarks.run` has it."""
    program = "import benchmarks.run, sys; print([m for m in ('transformers', 'kernels') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
