"""Directories of rhythm-eval in a comparison: method × task, from results.json alone."""

from __future__ import annotations

import csv
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from rhythm.cli.eval import _config, _parser
from rhythm.cli.report import main
from rhythm.evaluation.config import EvaluationConfig
from rhythm.evaluation.run import results_json
from rhythm.evaluation.scores import ScoredResponse, score
from rhythm.reports.comparison_page import compare
from rhythm.reports.evaluations import load_evaluation

WriteRun = Callable[..., Path]


def evaluation(directory: Path, model: Path, right: dict[str, Sequence[Sequence[int]]], **settings: object) -> Path:
    """`right`: of each task, which samples of each problem are right."""
    samples = len(next(iter(right.values()))[0])
    config = EvaluationConfig.model_validate({"model": model, "tasks": list(right), "samples": samples, **settings})
    scores = [
        score(
            task,
            [ScoredResponse(p, bool(c), True, True, 9) for p, row in enumerate(problems) for c in row],
            samples,
            (1, samples),
        )
        for task, problems in right.items()
    ]
    directory.mkdir(parents=True)
    (directory / "results.json").write_text(results_json(config, scores))
    return directory


def checkpoint(run: Path, step: int) -> Path:
    path = run / "checkpoints" / f"step_{step:06d}"
    path.mkdir(parents=True)
    return path


HALF = {"aime24": [(1, 0), (0, 0), (1, 1), (0, 1)], "math500": [(0, 0), (1, 0)]}  # 4 of 8, 1 of 4
MORE = {"aime24": [(1, 0), (1, 0), (1, 1), (1, 1)], "math500": [(0, 1), (1, 0)]}  # 6 of 8, 2 of 4


@pytest.fixture
def two(tmp_path: Path, write_run: WriteRun) -> list[Path]:
    """GRPO and coupled credit, one seed, evaluated on two tasks after step 10."""
    runs = [write_run(tmp_path, name, [0.1, 0.2], seed=3, strategy=name) for name in ("none", "coupled")]
    return [
        evaluation(tmp_path / f"eval-{run.name}", checkpoint(run, 10), right)
        for run, right in zip(runs, (HALF, MORE), strict=True)
    ]


def test_methods_by_tasks_by_hand(two: list[Path]) -> None:
    comparison = compare(two)
    assert [(column.task, column.metric) for column in comparison.columns] == [
        ("aime24", "avg@2"),
        ("math500", "avg@2"),
    ]
    (section,) = comparison.sections
    (block,) = section.blocks
    grpo, coupled = block.rows
    assert (block.title, grpo.method, coupled.method, grpo.seeds) == ("", "GRPO", "+ coupled rhythm credit", (3,))
    assert [cell.value for cell in grpo.cells] == pytest.approx([0.5, 0.25, 0.375])
    assert [cell.value for cell in coupled.cells] == pytest.approx([0.75, 0.5, 0.625])
    assert [cell.gain for cell in coupled.cells] == pytest.approx([0.25, 0.25, 0.25])
    assert block.best == (1, 1, 1)


def test_the_step_is_the_checkpoints(two: list[Path]) -> None:
    assert load_evaluation(two[0]).run.records[0]["step"] == 10


def test_a_model_of_no_run_goes_by_its_directorys_name(two: list[Path], tmp_path: Path) -> None:
    base = evaluation(tmp_path / "base", tmp_path / "Qwen3-4B-Base", HALF)
    rows = compare([*two, base]).sections[0].blocks[0].rows
    assert [row.method for row in rows] == ["GRPO", "+ coupled rhythm credit", "base"]
    assert rows[2].cells[0].value == 0.5


def test_evaluations_made_otherwise_are_not_compared(two: list[Path], tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "coupled", 20)
    greedy = {"aime24": [(1,), (1,)]}
    other = evaluation(tmp_path / "greedy", model, greedy, sampling={"temperature": 0})
    tables = compare([two[0], other]).sections[0].blocks
    assert len(tables) == 2
    assert "evaluated.sampling.temperature=0" in " ".join(table.title for table in tables)
    assert all(math.isnan(cell.gain) for table in tables for row in table.rows for cell in row.cells)


def test_what_a_run_evaluated_is_nothing_to_rhythm_eval(tmp_path: Path, write_run: WriteRun) -> None:
    """Its evaluations of checkpoints are compared, whatever the runs evaluated themselves: the runs are not."""
    grpo = write_run(tmp_path, "grpo", [0.3], strategy="none")
    coupled = write_run(tmp_path, "coupled", [0.4], strategy="coupled", config={"evaluation": {"temperature": 0.7}})
    evaluations = [
        evaluation(tmp_path / "eval-grpo", checkpoint(grpo, 10), HALF),
        evaluation(tmp_path / "eval-coupled", checkpoint(coupled, 10), MORE, sampling={"rows_at_once": 8}),
    ]
    (block,) = compare(evaluations).sections[0].blocks
    assert (block.title, block.rows[1].cells[0].gain) == ("", pytest.approx(0.25))
    together = compare([grpo, coupled, *evaluations]).sections[0].blocks
    assert sorted(len(block.rows) for block in together) == [1, 1, 2]


def test_with_a_run(two: list[Path], tmp_path: Path, write_run: WriteRun) -> None:
    run = write_run(tmp_path, "random", [0.3], seed=3, strategy="random", further={"aime24/avg@2": 0.6})
    columns = compare([two[0], run]).columns
    assert [(column.task, column.metric) for column in columns] == [
        ("countdown", "accuracy"), ("aime24", "avg@2"), ("math500", "avg@2")
    ]  # fmt: skip


def test_files_and_commands(two: list[Path], tmp_path: Path) -> None:
    assert main([*map(str, two), f"out={tmp_path / 'out'}"]) == 0
    with (tmp_path / "out" / "table_methods.csv").open() as file:
        values = {(row["method"], row["task"]): row["value"] for row in csv.DictReader(file)}
    assert values["GRPO", "aime24"] == "0.5"
    assert "0.75" in values.values()
    assert not (tmp_path / "out" / "config.yaml").exists()
    lines = [line for line in (tmp_path / "out" / "commands.sh").read_text().splitlines() if line[0] != "#"]
    for line, directory in zip(lines, two, strict=True):
        command, *words = shlex.split(line)
        assert command == "rhythm-eval"
        made = EvaluationConfig.model_validate(load_evaluation(directory).settings)
        assert _config(_parser().parse_intermixed_args(words)).evaluation == made


def test_an_evaluation_alone_has_its_page_already(two: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(two[0])]) == 2
    assert "holds an evaluation, whose page rhythm-eval wrote" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": {"model": "m"}, "tasks": [{"task": "a"}]}', "{"])
def test_damaged_results_are_named(text: str, two: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    (two[1] / "results.json").write_text(text)
    assert main(list(map(str, two))) == 2
    assert f"{two[1] / 'results.json'} is damaged or of another version" in capsys.readouterr().err
