"""The GPU benchmark, run completely at tiny shapes in Triton's interpreter on the CPU."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import implementations as cpu_implementations
from benchmarks.gpu import implementations, suite
from benchmarks.gpu.clock import Budget, InterpreterClock
from benchmarks.gpu.run import run
from benchmarks.measure import Timing
from benchmarks.run import main
from benchmarks.shapes import Shape, make_inputs
from rhythm.ops import reference

pytestmark = pytest.mark.filterwarnings("ignore")  # numpy's and flex attention's, uncompiled

QUICK = replace(suite.INTERPRETED, shape=Shape(40, query_heads=2, key_heads=1, head_size=16), lengths=(), packed=(60,))


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("records")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.gpu.run.INTERPRETED", QUICK)
        assert main(["--device", "interpreter", "--records", str(folder)]) == 0
    parsed: dict[str, Any] = json.loads((folder / "interpreter" / "attention_interpreter.json").read_text())
    return parsed


@pytest.mark.slow
def test_the_record(record: dict[str, Any]) -> None:
    assert set(record) == {"date", "machine", "software", "commit", "correctness", "parts", "not_measured"}
    assert record["not_measured"] == []
    assert record["software"]["triton"]
    assert list(record["parts"]) == ["race", "actor_attn", "packed_60"]
    race = record["parts"]["race"]
    assert [row["op"] for row in race["rows"]] == ["sdpa_flash", "statistics", "with_output", "bands", "flex", "eager"]
    for row in race["rows"]:
        assert 0 < row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["tflops"] == pytest.approx(row["flops"] / row["seconds"] / 1e12)
    assert race["rows"][0]["to_best_forward"] == 1
    assert race["absent"][0] == "sdpa_cudnn: cuDNN takes tensors on a GPU"
    assert [metric["at_most"] for metric in race["metrics"]] == [0.5, 1.05, None, 0.05]
    names = [metric["name"] for metric in record["parts"]["actor_attn"]["metrics"]]
    assert names[1] == "actor_attn of 80 tokens in memory (1: yes)"
    assert record["parts"]["actor_attn"]["metrics"][1]["met"]
    assert "tokens" in record["parts"]["packed_60"]["absent"][-1]


def test_what_the_budget_has_no_room_for_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.run.INTERPRETED", QUICK)
    monkeypatch.setattr("benchmarks.gpu.run.check", lambda settings, clock: [])
    ticks = iter([0.0, 50.0, 60.0, 61.0, 62.0, 63.0, 64.0, 65.0])
    short = Budget(62.0, now=lambda: next(ticks))
    console = Console(quiet=True)
    assert run("interpreter", tmp_path, console, console, short) == 0
    (path,) = tmp_path.rglob("*.json")
    assert json.loads(path.read_text())["not_measured"] == ["race: budget", "actor_attn: budget", "packed_60: budget"]


def test_a_wrong_result_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(inputs: Any) -> Any:
        right = cpu_implementations.eager(inputs)
        return lambda: {name: x * 1.01 for name, x in right().items()}

    broken = (implementations.Implementation("statistics", wrong, lambda shape: 1),)
    monkeypatch.setattr("benchmarks.gpu.run.INTERPRETED", replace(QUICK, implementations=broken))
    console = Console(record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    assert run("interpreter", tmp_path, console, console, Budget(60)) == 1
    assert "The correctness check failed" in console.export_text()
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cuda"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_flex_attention_gives_column_sums() -> None:
    shape = Shape(75, prompt=9, query_heads=4, key_heads=2, head_size=16)
    inputs = make_inputs(shape, torch.float32)
    results = implementations.flex(compiled=False)(inputs)()
    _, _, fai, lse, _ = reference.attention_statistics(
        inputs.q, inputs.k, bounds=[0, 75], prompt_lens=[9], scale=inputs.scale
    )
    torch.testing.assert_close(results["fai"], fai, rtol=1e-4, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(results["lse"], lse, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_lengths_spread_and_add_up() -> None:
    for tokens, mean in ((120, 30), (16384, 1024), (65536, 1024)):
        lengths = suite.lengths_of(tokens, mean)
        assert sum(lengths) == tokens
        assert min(lengths) >= 8
    assert max(lengths) > 3 * sorted(lengths)[len(lengths) // 2]
    assert 0.6 * mean < tokens / len(lengths) < 1.7 * mean


def test_ratios_are_to_the_best_forward() -> None:
    timings = {"a": Timing((4.0, 2.0)), "statistics": Timing((1.0, 1.0)), "bands": Timing((0.1, 0.2))}
    metrics = suite._metrics(timings, "a", QUICK.shape)
    assert [metric.value for metric in metrics] == [pytest.approx(0.375), pytest.approx(0.0625)]
    assert [metric.met for metric in metrics] == [True, None]
    assert suite._metrics(timings, None, QUICK.shape) == []


def test_the_race_takes_turns() -> None:
    order: list[str] = []
    timings = InterpreterClock().interleaved({name: (lambda name=name: order.append(name)) for name in "ab"}, rounds=2)
    assert order == [*"aabb", *"abab"]
    assert all(math.isfinite(timing.median) for timing in timings.values())
