from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from pydantic import ValidationError

from rhythm.tasks import Reward, load_for_rewards, load_task
from rhythm.tasks.prompts import ChatPrompt

ROWS = [{"problem": f"What is {n} + 1?", "answer": str(n + 1), "name": f"p{n}"} for n in range(20)]


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return str(path)


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return str(path)


def options(path: str, **more: object) -> dict[str, object]:
    return {"path": path, "prompt": "problem", "answer": "answer", "grader": "math", "held_out": 0.1, **more}


@pytest.mark.parametrize("write", [write_lines, write_parquet])
def test_a_file_becomes_a_task(tmp_path: Path, write: Any) -> None:
    name = "rows.jsonl" if write is write_lines else "rows.parquet"
    task = load_task("jsonl", options(write(tmp_path / name, ROWS)))
    assert (len(task.train), len(task.test)) == (18, 2)
    questions = [problem.question for problem in (*task.train, *task.test)]
    assert sorted(questions) == sorted(row["problem"] for row in ROWS)
    problem = next(problem for problem in (*task.train, *task.test) if problem.question == "What is 6 + 1?")
    assert task.prompt(problem) == "What is 6 + 1?"
    assert task.solution(problem) == r"\boxed{7}"
    assert task.reward(problem, r"six and one, \boxed{7}") == Reward(1.0, True, True)
    assert task.reward(problem, r"\boxed{8}") == Reward(0.0, False, True)
    assert task.reward(problem, r"\boxed{7}. Next problem: 1 + 1? \boxed{2}") == Reward(1.0, True, True)
    assert pickle.loads(pickle.dumps(problem)) == problem


def test_which_rows_are_held_out_is_seeded(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    first, again, other = (load_task("jsonl", options(path, seed=seed, held_out=0.5)) for seed in (0, 0, 1))
    assert (first.train, first.test) == (again.train, again.test)
    assert first.test != other.test
    assert not {problem.question for problem in first.train} & {problem.question for problem in first.test}


def test_a_test_file_and_its_overlap(tmp_path: Path) -> None:
    path, test = write_lines(tmp_path / "a.jsonl", ROWS), write_lines(tmp_path / "b.jsonl", ROWS[3:5])
    task = load_task("jsonl", options(path, held_out=None, test_path=test))
    assert [problem.answer for problem in task.test] == ["4", "5"]
    assert len(task.train) == 18
    assert not {problem.question for problem in task.train} & {problem.question for problem in task.test}


def test_a_directory_goes_through_datasets_as_a_hub_name_does(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data" / "train-0.parquet", ROWS[:15])
    write_parquet(tmp_path / "data" / "test-0.parquet", ROWS[15:])
    task = load_task("jsonl", options(str(tmp_path), held_out=None, test_split="test"))
    assert (len(task.train), len(task.test)) == (15, 5)
    assert task.test[0].question == "What is 15 + 1?"
    with pytest.raises(ValueError, match=rf"^path is {tmp_path}, split validation: can't be read: ValueError: "):
        load_task("jsonl", options(str(tmp_path), split="validation"))
    with pytest.raises(ValueError, match=rf"^path is {tmp_path}, test_split dev: can't be read: ValueError: "):
        load_task("jsonl", options(str(tmp_path), held_out=None, test_split="dev"))


def test_an_empty_split_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "test.jsonl").touch()
    with pytest.raises(ValueError, match=rf"^path is {tmp_path}, split test: has no rows$"):
        load_task("jsonl", options(str(tmp_path), split="test"))
    with pytest.raises(ValueError, match=rf"^path is {tmp_path}, test_split test: has no rows$"):
        load_task("jsonl", options(str(tmp_path), held_out=None, test_split="test"))
    with pytest.raises(ValueError, match=rf"^test_split is '': must be the name of a split of {tmp_path}$"):
        load_task("jsonl", options(str(tmp_path), held_out=None, test_split=""))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.jsonl", None, r"test_path is .*none\.jsonl: No such file"),
        ("none.parquet", None, r"test_path is .*none\.parquet: can't be read as Parquet after row 0"),
        ("", None, r"test_path is '': must be a file of \.jsonl"),
        ("test.jsonl", "", r"test_path is .*test\.jsonl: has no rows$"),
        ("test.csv", "problem,answer", r"test_path is .*test\.csv: must be a file of \.jsonl"),
        ("test.jsonl", '{"problem": "a", "answer": ""}', r".*test\.jsonl, line 1: answer is '': for grader math"),
        ("test.jsonl", '{"problem": "a"}', r".*test\.jsonl, line 1: has no column answer \(answer\)"),
    ],
)
def test_a_test_file_that_cannot_be_used(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"^{message}"):
        load_task("jsonl", options(path, held_out=None, test_path=str(tmp_path / name) if name else ""))


def test_a_test_file_of_which_no_row_can_be_used(tmp_path: Path) -> None:
    path, test = write_lines(tmp_path / "a.jsonl", ROWS), write_lines(tmp_path / "b.jsonl", [{**ROWS[0], "answer": ""}])
    with pytest.raises(ValueError, match=r"^test_path is .*b\.jsonl: none of 1 rows can be used$"):
        load_task("jsonl", options(path, held_out=None, test_path=test, unusable="drop"))


def test_an_id_of_the_test_file_must_not_be_in_the_training_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    others = [{"problem": "What is 2 + 2?", "answer": "4", "name": "p7"}, {**ROWS[3], "name": "q"}]
    path, test = write_lines(tmp_path / "a.jsonl", ROWS), write_lines(tmp_path / "b.jsonl", others)
    both = options(path, held_out=None, test_path=test)
    with pytest.raises(
        ValueError, match=rf"^{path}, line 8: name is 'p7', which {test}, line 1 of the test set has too: ids must"
    ):
        load_task("jsonl", {**both, "id": "name"})
    dropped = load_task("jsonl", {**both, "id": "name", "unusable": "drop"})
    assert (len(dropped.train), len(dropped.test)) == (18, 2)
    assert not {"What is 7 + 1?", "What is 3 + 1?"} & {problem.question for problem in dropped.train}
    assert "2 training rows stand in the test set too: left out" in caplog.text
    assert len(load_task("jsonl", both).train) == 19  # without ids only the question counts


def test_columns_within_columns_worked_solutions_and_messages(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    rows = [{"prompt": chat, "extra": {"truth": "because\n#### 2"}, "worked": "one and one"}]
    path = write_parquet(tmp_path / "rows.parquet", rows)
    common = {"path": path, "answer": "extra.truth", "answer_after": "####", "held_out": 1.0, "grader": "numeric"}
    plain = load_task("jsonl", {**common, "solution": "worked"})
    assert plain.test[0].answer == "2"
    assert plain.prompt(plain.test[0]) == "Be brief.\n1 + 1?"
    assert plain.solution(plain.test[0]) == "one and one\n\\boxed{2}"
    task = load_task(
        "jsonl", {**common, "solution": "extra.truth", "system": "S", "template": "Q: {prompt}", "chat": True}
    )
    prompt = task.prompt(task.test[0])
    assert isinstance(prompt, ChatPrompt)
    assert prompt.messages == [{"role": "system", "content": "S"}, {"role": "user", "content": "Q: 1 + 1?"}]
    assert task.solution(task.test[0]) == "because\n\\boxed{2}"


def test_repeated_questions_count_once_and_ids_must_differ(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [*ROWS, ROWS[4]])
    assert len(load_task("jsonl", options(path, held_out=1.0)).test) == 20
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 21: name is 'p4', which an earlier row has"):
        load_task("jsonl", options(path, id="name"))
    assert len(load_task("jsonl", options(path, id="name", held_out=1.0, unusable="drop")).test) == 20
    again = write_lines(tmp_path / "again.jsonl", [*ROWS, *({**row, "name": f"{row['name']} again"} for row in ROWS)])
    task = load_task("jsonl", options(again, id="name", held_out=0.5))
    assert not {problem.question for problem in task.train} & {problem.question for problem in task.test}
    assert len(task.train) == len(task.test) == 10


def test_rows_that_cannot_be_used_are_left_out_when_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [*ROWS, {"problem": "Why?", "answer": ""}])
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 21: answer is '': for grader math it must be LaTeX"):
        load_task("jsonl", options(path))
    assert len(load_task("jsonl", options(path, held_out=1.0, unusable="drop")).test) == 20
    assert "of 21 rows, 0 repeat an earlier one and 1 have an answer that grader math can't read" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"problem": "a", "answer": "1"}\n{"answer": "1"}\n', r"line 2: has no column problem \(prompt\); .* answer$"),
        ('{"problem": "a"}\n', r"line 1: has no column answer \(answer\); its columns are problem"),
        ('{"problem": 3, "answer": "1"}\n', r"line 1: problem is '3': must be a text, or chat messages"),
        ('{"problem": " ", "answer": "1"}\n', r"line 1: problem is ' ': must be a text"),
        ('{"problem": [{"role": "user"}], "answer": "1"}\n', r"line 1: problem is .*: each message must have a role"),
        ('{"problem": [], "answer": "1"}\n', r"line 1: problem is '\[\]': each message must have a role"),
        ('{"problem": "a", "answer": "1"}\n{"prob\n', r"line 2: is not JSON"),
        ("[" * 100_000, r"line 1: is not JSON"),
        ("[1]\n", r"line 1: must be an object, got list"),
        ("\n\n", r"path is .*rows\.jsonl: has no rows"),
    ],
    ids=lambda value: value[:20],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_task("jsonl", options(str(tmp_path / "rows.jsonl")))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path is .*none\.jsonl: No such file"):
        load_task("jsonl", options(str(tmp_path / "none.jsonl")))
    with pytest.raises(ValueError, match=r"path is .*none\.parquet: can't be read as Parquet after row 0"):
        load_task("jsonl", options(str(tmp_path / "none.parquet")))
    (tmp_path / "latin.jsonl").write_bytes(b'{"problem": "\xe9"}')
    with pytest.raises(ValueError, match=r"latin\.jsonl: is not UTF-8: byte 0xe9"):
        load_task("jsonl", options(str(tmp_path / "latin.jsonl")))
    (tmp_path / "rows.csv").write_text("problem,answer\n")
    with pytest.raises(ValueError, match=r"rows\.csv: must be a file of \.jsonl"):
        load_task("jsonl", options(str(tmp_path / "rows.csv")))
    whole = Path(write_parquet(tmp_path / "rows.parquet", ROWS))
    whole.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"rows\.parquet: can't be read as Parquet"):
        load_task("jsonl", options(str(whole)))


def test_a_parquet_file_damaged_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=5, compression="zstd")
    data = bytearray(path.read_bytes())
    data[200:260] = bytes(60)
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"rows\.parquet: can't be read as Parquet"):
        load_task("jsonl", options(str(path)))


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    for more, message in (
        ({"held_out": None}, "there is no test set: give exactly one of test_path, test_split and held_out"),
        ({"test_path": path}, "test_path is .* and held_out is 0.1: give exactly one"),
        ({"held_out": None, "test_split": "test"}, r"rows\.jsonl has no splits; give test_path or held_out"),
        ({"template": "What?"}, "template is 'What\\?'|must contain {prompt}"),
        ({"grader": "maths"}, "grader"),
        ({"held_out": 1.5}, "held_out"),
        ({"colour": 1}, "colour"),
    ):
        with pytest.raises(ValidationError, match=message):
            load_task("jsonl", options(path, **more))


def test_rewards_alone_read_no_rows(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    problem = load_task("jsonl", options(path)).train[0]
    (tmp_path / "rows.jsonl").unlink()
    task = load_for_rewards("jsonl", options(path))
    assert task.reward(problem, f"\\boxed{{{problem.answer}}}") == Reward(1.0, True, True)
    assert (
        len(load_for_rewards("countdown", {"train_size": 3, "test_size": 2}).train) == 3
    )  # made whole, having no task


def test_a_chat_prompt_survives_the_way_to_another_process() -> None:
    prompt = ChatPrompt([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    again = pickle.loads(pickle.dumps(prompt))
    assert (again, again.messages) == ("a\nb", prompt.messages)


def test_the_documented_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "problems.jsonl", ROWS)
    names: dict[str, Any] = {}
    exec(page.partition("```python\n")[2].partition("```")[0], names)
    assert (len(names["task"].train), len(names["task"].test)) == (18, 2)
