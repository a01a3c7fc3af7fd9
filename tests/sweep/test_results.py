"""A sweep's plan, what is left of it, its CSV files, and the report made of them."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from rhythm.cli.config_file import load_config
from rhythm.cli.report import main as report_main
from rhythm.cli.sweep import main
from rhythm.sweep.config import PlannedRun, SweepConfig, plan
from rhythm.sweep.report import summarize
from rhythm.sweep.results import CurveRow, Results, RunRow, measure, read_results, write_results
from rhythm.sweep.run import left

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "configs/sweeps").glob("*.yaml"))
METHODS = {"grpo": {"credit.strategy": "none"}, "coupled": {"credit.strategy": "coupled", "credit.top_fraction": 0.2}}


def planned(tmp_path: Path, **keys: object) -> list[PlannedRun]:
    sweep = SweepConfig(**{"name": "s", "methods": METHODS, "seeds": (3, 4), "runs_dir": tmp_path} | keys)  # type: ignore[arg-type]
    return plan(sweep, lambda overrides: load_config(ROOT / "configs/countdown_tiny.yaml", overrides))


def run_row(run: PlannedRun, final: float) -> RunRow:
    return RunRow(run.method, run.seed, 0.1, final, final, 240, 1000, 60.0, 0.2, "abc", run.settings)


def test_a_seeds_methods_must_begin_with_the_same_weights(tmp_path: Path) -> None:
    runs = planned(tmp_path)
    rows = [run_row(run, 0.3) for run in runs]
    other_seed = replace(rows[2], start=0.2), replace(rows[3], start=0.2)
    assert left(runs, Results((*rows[:2], *other_seed)), tmp_path) == []
    apart = Results((rows[0], replace(rows[1], start=0.1005), *other_seed))
    with pytest.raises(ValueError, match=r"different accuracies: 10\.00% \(grpo-3\); 10\.05% \(coupled-3\)"):
        left(runs, apart, tmp_path)


def test_methods_of_other_warm_starts_may_begin_apart(tmp_path: Path) -> None:
    runs = planned(tmp_path, methods={"grpo": {}, "longer": {"warm_start.steps": 900}}, seeds=(3,))
    grpo, longer = (run_row(run, 0.3) for run in runs)
    assert left(runs, Results((grpo, replace(longer, start=0.3))), tmp_path) == []


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_shipped_sweep_can_be_planned(path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([str(path), "--dry-run", f"runs_dir={tmp_path}", f"out={tmp_path}"]) == 0
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    runs = len(values["methods"]) * len(values.get("seeds", range(5)))
    assert f"{runs} of {runs} runs left" in capsys.readouterr().out


def test_the_countdown_methods_have_equal_mass_but_for_the_papers_own() -> None:
    methods = yaml.safe_load((ROOT / "configs/sweeps/countdown.yaml").read_text(encoding="utf-8"))["methods"]
    matched = {name for name, keys in methods.items() if keys.get("credit.mass") == "matched"}
    assert methods.keys() - matched == {"coupled_as_is", "random_as_is"}


def test_runs_come_seed_by_seed_and_share_all_but_the_method(tmp_path: Path) -> None:
    runs = planned(tmp_path)
    assert [(run.method, run.seed) for run in runs] == [("grpo", 3), ("coupled", 3), ("grpo", 4), ("coupled", 4)]
    assert [run.name for run in runs] == ["grpo-3", "coupled-3", "grpo-4", "coupled-4"]
    assert all(run.config.seed == run.config.warm_start.seed == run.seed for run in runs)
    assert runs[1].config.credit.top_fraction == 0.2
    same = runs[1].config.model_copy(update={"credit": runs[0].config.credit, "name": "grpo-3"})
    assert same == runs[0].config
    assert runs[1].config.run_dir == tmp_path / "s" / "coupled-3"


def test_settings_tell_what_a_run_learns_and_not_where(tmp_path: Path) -> None:
    first, second = planned(tmp_path)[1], planned(tmp_path / "elsewhere", name="other", seeds=(7, 8))[1]
    assert first.settings == second.settings
    assert planned(tmp_path, overrides={"optimizer.lr": 2e-4})[1].settings != first.settings


def test_what_is_done_is_not_run_again(tmp_path: Path) -> None:
    runs = planned(tmp_path)
    results = Results((run_row(runs[0], 0.3), run_row(runs[3], 0.4)))
    assert [run.name for run in left(runs, results, tmp_path)] == ["coupled-3", "grpo-4"]
    changed = planned(tmp_path, overrides={"optimizer.lr": 2e-4})
    with pytest.raises(ValueError, match="grpo, seed 3 was run with other settings"):
        left(changed, results, tmp_path)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"methods": {"a": {"credit.stratgy": "none"}}}, "credit.stratgy: unknown key; did you mean credit.strategy?"),
        ({"methods": {"a": {"seed": 3}}}, "a sets seed, which the sweep itself sets"),
        ({"methods": {"a/b": {}}}, "a method is named by letters"),
        ({"methods": {}}, "methods is empty"),
        ({"methods": {"a": {}}, "seeds": [1, 1]}, "seeds must be different"),
        ({"methods": {"a": {}}, "base": "nowhere.yaml"}, "cannot read"),
        ({"methods": {"a": {}}, "metods": {}}, "metods: unknown key; did you mean methods?"),
        ({"methods": {"a": {}}, "jobs": 0}, "jobs is 0"),
    ],
)
def test_bad_sweeps_are_refused_before_anything_starts(
    keys: dict[str, object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"base": str(ROOT / "configs/countdown_tiny.yaml")} | keys), encoding="utf-8")
    assert main([str(path), f"runs_dir={tmp_path / 'runs'}", f"out={tmp_path / 'out'}"]) == 2
    assert said in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_finished_run_is_measured_by_hand(tmp_path: Path) -> None:
    run = planned(tmp_path, overrides={"steps": 4, "evaluation.every_steps": 1})[1]
    run.config.run_dir.mkdir(parents=True)
    records = [
        {"step": 0, "accuracy": 0.1, "seconds_total": 5.0},
        {"step": 1, "accuracy": 0.5, "reward": 0.2, "entropy": 1.0, "response_length": 10.0, "response_tokens": 100,
         "bonus_mass": 0.1, "seconds_total": 1.0},
        {"step": 2, "reward": 0.4, "entropy": 0.8, "response_length": 12.0, "response_tokens": 120,
         "bonus_mass": 0.2, "seconds_total": 1.0},
        {"step": 3, "accuracy": 0.3, "reward": 0.6, "entropy": 0.6, "response_length": 14.0, "response_tokens": 140,
         "bonus_mass": 0.3, "seconds_total": 1.0},
        {"step": 4, "accuracy": 0.4, "reward": 0.8, "entropy": 0.4, "response_length": 16.0, "response_tokens": 160,
         "bonus_mass": 0.2, "seconds_total": 2.0},
    ]  # fmt: skip
    metrics = run.config.run_dir / "metrics.jsonl"
    metrics.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    row, curve = measure(run, "abc")
    assert (row.start, row.best, row.final) == (0.1, 0.5, pytest.approx((0.5 + 0.3 + 0.4) / 3))
    assert (row.steps, row.tokens, row.seconds, row.bonus_mass) == (4, 520, 10.0, pytest.approx(0.2))
    assert [(point.step, point.accuracy) for point in curve] == [(0, 0.1), (1, 0.5), (3, 0.3), (4, 0.4)]
    assert curve[2].reward == pytest.approx(0.5)  # steps 2 and 3
    assert curve[2].response_length == pytest.approx(13.0)
    del records[1]["accuracy"]  # two evaluations after the start, which doesn't count as a third
    metrics.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    assert measure(run, "abc")[0].final == pytest.approx((0.3 + 0.4) / 2)
    metrics.write_text("".join(f"{json.dumps(record)}\n" for record in records[:4]), encoding="utf-8")
    with pytest.raises(ValueError, match="ends at step 3 of 4"):
        measure(run, "abc")


def test_results_read_back_as_written_and_damage_is_told(tmp_path: Path) -> None:
    runs = planned(tmp_path)
    curve = [CurveRow("grpo", 3, 0, 0.1, float("nan"), 1.5, 12.0), CurveRow("grpo", 3, 20, 0.25, -0.2, 1.25, 13.0)]
    write_results(Results().with_run(run_row(runs[0], 0.25), curve), tmp_path / "out")
    again = read_results(tmp_path / "out")
    assert again.runs == (run_row(runs[0], 0.25),)
    assert repr(again.curves) == repr(tuple(curve))
    path = tmp_path / "out" / "runs.csv"
    path.write_text(path.read_text(encoding="utf-8").replace("0.25", "a lot"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"runs\.csv, line 2: best is 'a lot', must be float"):
        read_results(tmp_path / "out")
    path.write_text("method,seed\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has the columns"):
        read_results(tmp_path / "out")


def test_a_curve_without_its_run_is_run_again(tmp_path: Path) -> None:
    runs = planned(tmp_path)
    results = Results().with_run(run_row(runs[0], 0.25), [CurveRow("grpo", 3, 0, 0.1, 0.0, 0.0, 0.0)])
    write_results(Results(results.runs, (*results.curves, CurveRow("coupled", 3, 0, 0.1, 0.0, 0.0, 0.0))), tmp_path)
    assert read_results(tmp_path) == results


def test_the_report_of_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Results()
    for run, final in zip(planned(tmp_path), (0.30, 0.34, 0.40, 0.42), strict=True):
        curve = [
            CurveRow(run.method, run.seed, step, value, 0.1, 1.0, 10.0) for step, value in ((0, 0.1), (240, final))
        ]
        results = results.with_run(run_row(run, final), curve)
    write_results(results, tmp_path / "s")
    report = summarize(tmp_path / "s")
    (coupled,) = report.differences["final"]
    assert coupled.mean == pytest.approx(0.03)
    assert coupled.p == coupled.least_p == 0.5
    assert report.methods[0].area == pytest.approx((0.2 + 0.25) / 2)
    assert report.incomplete == ()
    assert report_main([str(tmp_path / "s")]) == 0
    written = capsys.readouterr().out.split()
    assert [Path(path).name for path in written] == [
        "report.html",
        "report.md",
        "differences.csv",
        "curves.png",
        "curves.pdf",
    ]
    text = (tmp_path / "s" / "report.md").read_text(encoding="utf-8")
    rows = list(csv.DictReader((tmp_path / "s" / "differences.csv").read_text(encoding="utf-8").splitlines()))
    final = next(row for row in rows if row["measure"] == "final")
    assert (final["method"], final["seeds"], final["mean"], final["least_p"]) == ("coupled", "3 4", "0.03", "0.5")
    assert float(final["t_low"]) == pytest.approx(-0.097, abs=1e-3)
    assert "| coupled | 2 | +3.0 | [−9.7, 15.7] | [2.0, 4.0] | ≤ 0.5 | 0.50 |" in text
    assert "| grpo | 2 | 10.0 | 35.0 |" in text
    write_results(Results(results.runs[:3], results.curves), tmp_path / "s")
    assert summarize(tmp_path / "s").incomplete == (("coupled", (4,)),)
    assert report_main([str(tmp_path / "s"), "at=best"]) == 2
    assert "has one setting" in capsys.readouterr().err
