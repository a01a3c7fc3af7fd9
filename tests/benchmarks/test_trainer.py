"""benchmarks.trainer: a small run of both trainers from end to end, and its arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import trainer
from benchmarks.trainer import GAMMA, IN_TRAINING, TRL, Row, main, run, table, targets
from benchmarks.trainer_workers import PARTS, Seconds


@pytest.mark.slow
def test_a_small_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trainer.json"
    arguments = ["--quick", "--trainers", TRL, GAMMA, "--steps", "2", "--warm-up", "1", "--threads", "1"]
    assert main([*arguments, "--json", str(path), "--records", str(tmp_path)]) == 0
    assert list(tmp_path.iterdir()) == [path], "quick mode leaves no record"
    record = json.loads(path.read_text())
    assert {"machine", "software", "commit", "config", "threads", "rows"} <= set(record)
    assert record["targets"] == {}
    for name, worked in {TRL: {"gamma"}, GAMMA: set()}.items():
        steps = record["seconds"][name]
        assert len(steps) == 2
        for step in steps:
            assert sum(step[part] for part in PARTS[:-2]) == pytest.approx(step["total"])
            assert {part for part in PARTS if step[part] == 0} == worked, "every part but TRL's γ takes time"
            assert step["generation"] + step["log_probs"] + step["training"] > step["total"] / 2
    assert f"| {GAMMA} |" in capfd.readouterr().out


def test_arithmetic() -> None:
    seconds = {
        TRL: [_step(4.0, cpu=3.0), _step(3.0, cpu=3.0), _step(8.0, cpu=3.0)],
        GAMMA: [_step(2.0, 0.02), _step(1.0, 0.05), _step(2.0, 0.1)],
    }
    trl, ours = table(seconds)
    assert (trl.faster, trl.faster_cpu, trl.gamma_share) == (1.0, 1.0, 0.0)
    assert (ours.steps, ours.seconds["total"], ours.seconds["gamma"]) == (3, 2.0, 0.05)
    assert (ours.faster, ours.faster_cpu, ours.gamma_share) == (3.0, 6.0, 0.05)
    assert list(targets([trl, ours]).values()) == [True, False]
    slow, light = Row(GAMMA, 3, {}, 1.99, 2.1, 0.03), Row(GAMMA, 3, {}, None, None, 0.031)
    assert list(targets([slow]).values()) == [False, True]
    assert list(targets([light]).values()) == [False], "without TRL there is nothing to compare with"
    in_training = Row(IN_TRAINING, 3, {}, 2.0, 2.1, 0.05)
    assert list(targets([slow, in_training]).values()) == [False, True, True], "the share is a target inline alone"
    assert targets([trl]) == {}


def test_a_trainer_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trainer.TRAINERS, GAMMA, ("no such worker", {}))
    quick = {**trainer.QUICK, "warm_start.cache_dir": str(tmp_path)}
    with pytest.raises(RuntimeError, match=f"the process of {GAMMA} ended with code 1"):
        run([GAMMA], 0, 1, 1, quick)


def _step(total: float, gamma: float = 0.0, cpu: float = 0.5) -> Seconds:
    return dict.fromkeys(PARTS, 0.0) | {"gamma": gamma, "total": total, "cpu": cpu}
