"""Several runs side by side: methods read off configurations, gains paired by seed, files and refusals."""

from __future__ import annotations

import csv
import math
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rhythm.cli.config_file import load_config
from rhythm.cli.report import main
from rhythm.reports.comparison import value_of
from rhythm.reports.comparison_page import compare
from rhythm.reports.methods import load_runs

WriteRun = Callable[..., Path]


@pytest.fixture
def six(tmp_path: Path, write_run: WriteRun) -> list[Path]:
    """GRPO and coupled, three seeds each; last accuracies 0.50 0.52 0.60 and 0.53 0.57 0.67."""
    finals = {"none": (0.50, 0.52, 0.60), "coupled": (0.53, 0.57, 0.67)}
    return [
        write_run(tmp_path, f"{name}-{seed}", [0.2, 0.7, final], seed=seed, strategy=name,
                  further={"aime/avg@16": final / 2, "aime/pass@1": final / 2, "aime/pass@16": 0.9})
        for name, values in finals.items()
        for seed, final in enumerate(values)
    ]  # fmt: skip


def test_gains_are_paired_by_seed_by_hand(six: list[Path]) -> None:
    (section,) = compare(six).sections
    (block,) = section.blocks
    assert block.columns == ("countdown", "aime", "Avg.")
    grpo, coupled = block.rows
    assert (grpo.method, coupled.method) == ("GRPO", "+ coupled rhythm credit")
    assert grpo.seeds == coupled.seeds == (0, 1, 2)
    assert grpo.cells[0].value == pytest.approx(0.54)
    assert math.isnan(grpo.cells[0].gain)
    # Differences 0.03, 0.05, 0.07: mean 0.05, s = 0.02, t(0.975, 2) = 4.302653, so ± 4.302653 · 0.02 / √3 = 0.049683
    cell = coupled.cells[0]
    assert (cell.gain, cell.pairs) == (pytest.approx(0.05), 3)
    assert (cell.gain_low, cell.gain_high) == pytest.approx((0.05 - 0.049683, 0.05 + 0.049683), abs=1e-5)
    # 0.53, 0.57, 0.67: s = 0.072111, ± 0.179134
    assert (cell.low, cell.high) == pytest.approx((0.59 - 0.179134, 0.59 + 0.179134), abs=1e-5)
    assert coupled.cells[1].gain == pytest.approx(0.025)
    assert coupled.cells[2].value == pytest.approx((0.59 + 0.295) / 2)
    assert block.best == (1, 1, 1)


def test_where_a_value_is_taken(tmp_path: Path, write_run: WriteRun) -> None:
    (run,) = load_runs([write_run(tmp_path, "a", [0.2, 0.6, 0.4])], {})
    assert value_of(run, "accuracy", "final", 0.5) == 0.4
    assert value_of(run, "accuracy", "best", 0.5) == 0.6
    assert value_of(run, "accuracy", "peak", 0.5) == pytest.approx(0.4)  # 0.2 → ½·0.6 + ½·0.2, and 0.4 is no new peak
    assert math.isnan(value_of(run, "other/pass@1", "final", 0.5))


def test_only_seeds_of_both_are_paired(tmp_path: Path, write_run: WriteRun) -> None:
    runs = [write_run(tmp_path, f"n{s}", [v], seed=s, strategy="none") for s, v in ((0, 0.1), (1, 0.3))]
    runs += [write_run(tmp_path, f"r{s}", [v], seed=s, strategy="random") for s, v in ((1, 0.35), (2, 0.9))]
    cell = compare(runs).sections[0].blocks[0].rows[1].cells[0]
    assert (cell.pairs, cell.gain) == (1, pytest.approx(0.05))
    assert math.isnan(cell.gain_low)
    assert cell.value == pytest.approx(0.625)


def test_ablations_go_by_selection_and_fraction(tmp_path: Path, write_run: WriteRun) -> None:
    runs = [
        write_run(tmp_path, "grpo", [0.3], strategy="none"),
        write_run(tmp_path, "c", [0.4], strategy="coupled"),
        write_run(tmp_path, "b", [0.2], strategy="coupled", select="bottom"),
        write_run(tmp_path, "f", [0.35], strategy="coupled", top_fraction=0.2),
        write_run(tmp_path, "g", [0.38], strategy="global_anchor", select="bottom"),
    ]
    methods, ablations = compare(runs).sections
    assert [row.method for row in methods.blocks[0].rows] == ["GRPO", "+ coupled rhythm credit"]
    found = {row.method: row.cells[0].gain for row in ablations.blocks[0].rows}
    assert found == pytest.approx(
        {"GRPO": math.nan, "Global (Bottom-40%)": 0.08, "Coupled (Top-20%)": 0.05, "Coupled (Top-40%)": 0.1,
         "Coupled (Bottom-40%)": -0.1}, nan_ok=True,
    )  # fmt: skip


def test_blocks_are_what_differs_beside_the_credit(tmp_path: Path, write_run: WriteRun) -> None:
    runs = [
        write_run(
            tmp_path, f"{s}-{lr}", [0.3 + (s == "coupled") * lr * 1e4], strategy=s, config={"optimizer": {"lr": lr}}
        )
        for s in ("none", "coupled")
        for lr in (1e-6, 1e-5)
    ]
    found = compare(runs).sections[0].blocks
    assert [block.title for block in found] == ["optimizer.lr=1e-05", "optimizer.lr=1e-06"]
    assert [block.rows[1].cells[0].gain for block in found] == pytest.approx([0.1, 0.01])


def test_another_credit_key_makes_another_method_and_grpo_has_none(tmp_path: Path, write_run: WriteRun) -> None:
    runs = [
        write_run(tmp_path, "a", [0.3], strategy="none", gamma_amp=2.0),
        write_run(tmp_path, "b", [0.3], strategy="none", seed=1),
        write_run(tmp_path, "c", [0.4], strategy="coupled", gamma_amp=1.5),
        write_run(tmp_path, "d", [0.5], strategy="coupled", gamma_amp=2.0),
    ]
    rows = compare(runs).sections[0].blocks[0].rows
    assert [(row.method, len(row.seeds)) for row in rows] == [
        ("GRPO", 2),
        ("+ coupled rhythm credit, gamma_amp=1.5", 1),
        ("+ coupled rhythm credit, gamma_amp=2.0", 1),
    ]


def test_the_commands_make_the_recorded_configurations(six: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([*map(str, six), f"out={out}"]) == 0
    commands = [line for line in (out / "commands.sh").read_text().splitlines() if not line.startswith("#")]
    assert len(commands) == 6
    for line in commands:
        program, config, *overrides = shlex.split(line)
        assert (program, config) == ("rhythm-train", "config.yaml")
        made = load_config(out / config, overrides)
        assert made.model_dump(mode="json") == yaml.safe_load((tmp_path / made.name / "config.yaml").read_text())
    assert len(set(commands)) == 6


def test_all_files_are_written_and_say_the_same(
    six: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*map(str, six), f"out={out}", "--dry-run"]) == 0
    assert "coupled-1: + coupled rhythm credit, seed 1" in capsys.readouterr().out
    assert not out.exists()
    assert main([*map(str, six), f"out={out}"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == str(out / "report.html")
    assert sorted(map(Path, printed)) == sorted(out.iterdir())
    assert (out / "curves_methods.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "curves_methods.pdf").read_bytes().startswith(b"%PDF")
    text = (out / "report.md").read_text()
    assert "| GRPO | 3 | 54.0 [40.9, 67.1] | 27.0 [20.4, 33.6] |" in text
    assert "**59.0** [41.1, 76.9] +5.0 [0.0, 10.0]" in text
    rows = list(csv.DictReader((out / "table_methods.csv").read_text().splitlines()))
    assert [(row["method"], row["task"], row["gain"], row["pairs"]) for row in rows][3] == (
        "'+ coupled rhythm credit", "countdown", "0.05", "3",
    )  # fmt: skip
    per_run = list(csv.DictReader((out / "runs.csv").read_text().splitlines()))
    assert [(row["seed"], row["final"], row["best"]) for row in per_run if row["task"] == "countdown"][:2] == [
        ("0", "0.5", "0.7"),
        ("1", "0.52", "0.7"),
    ]
    curves = list(csv.DictReader((out / "curves.csv").read_text().splitlines()))
    assert [row["running_peak"] for row in curves if row["run"] == "none-0"][:3] == ["0.2", "0.35", "0.395"]


def test_labels_and_baseline_can_be_given(six: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = "labels={coupled-0: ours, coupled-1: ours, coupled-2: ours}"
    assert main([*map(str, six), f"out={tmp_path / 'out'}", labels, "baseline=ours"]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Gains are over ours" in text
    assert "| GRPO | 3 | 54.0 [40.9, 67.1] −5.0 [−10.0, −0.0] |" in text
    assert "| ours | 3 |" in text
    rows = list(csv.DictReader((tmp_path / "out" / "table_methods.csv").read_text().splitlines()))
    assert {row["gain"] for row in rows if (row["method"], row["task"]) == ("GRPO", "countdown")} == {"-0.05"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["labels={x: y}"], "labels.x names none of the runs"),
        (["baseline=other"], "baseline is 'other': must be one of the methods GRPO, + coupled rhythm credit"),
        (["at=last"], "at is 'last'"),
        (["peak_alpha=0"], "peak_alpha is 0"),
        (["outt=x"], "did you mean out?"),
    ],
)
def test_bad_settings_are_named(
    words: list[str], said: str, six: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*map(str, six), *words]) == 2
    assert said in capsys.readouterr().err


def test_runs_that_cant_be_compared_are_named(
    six: list[Path], tmp_path: Path, write_run: WriteRun, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert main([str(six[0]), str(tmp_path / "empty")]) == 2
    assert f"{tmp_path / 'empty'}, which has no metrics.jsonl" in capsys.readouterr().err
    again = write_run(tmp_path, "again", [0.3], strategy="none")
    assert main([str(six[0]), str(again)]) == 2
    assert f"{six[0]} and {again} are both GRPO, seed 0" in capsys.readouterr().err
    (again / "config.yaml").write_text("a: [\n")
    assert main([str(six[0]), str(again)]) == 2
    assert f"{again / 'config.yaml'} is not YAML" in capsys.readouterr().err
    assert main([str(six[0]), "at=best"]) == 2
    assert "a single run has a page without settings" in capsys.readouterr().err
    assert main([]) == 2
    assert "no run given" in capsys.readouterr().err
    blank = tmp_path / "blank"
    blank.mkdir()
    (blank / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    assert main([str(blank), str(other)]) == 2
    assert "none of them holds an evaluation" in capsys.readouterr().err
