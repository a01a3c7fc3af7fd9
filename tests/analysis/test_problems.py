"""Rows of a file: accepted forms, and the messages of errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rhythm.analysis.problems import Problem, RowError, is_correct, paper_prompt, read_problems


def test_rows(tmp_path: Path) -> None:
    rows = [
        {"prompt": "1+1=", "response": "2"},
        {"prompt": "2+2=", "responses": ["4", "5"], "answer": 4},
        {"question": "Tom has 2 hens. He buys 3. How many now?", "answer": "2 + 3 = 5\n#### 5"},
    ]
    file = tmp_path / "problems.jsonl"
    file.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    first, second, third = read_problems(file)
    assert first == Problem(1, "1+1=", ("2",))
    assert second == Problem(3, "2+2=", ("4", "5"), "4")  # an empty line counts
    assert third.row == 5
    assert third.prompt.endswith("\nContext: Tom has 2 hens. He buys 3.\nQuestion: How many now?\n")
    assert third.answer == "2 + 3 = 5\n#### 5"
    assert third.responses == ()


@pytest.mark.parametrize(
    ("answer", "response", "correct"),
    [
        ("2 + 3 = 5\n#### 5", "so \\boxed{5}. Next: \\boxed{6}", True),
        ("5", "Final answer: Tom has 5 hens.", True),
        ("5", "He has 6 hens.\n#### 6, not 5", False),
        ("1080", "2 * 540 = 1,080. So she earns $1,080 a year.", True),  # no answer block: the last number
        ("1080", "1080 is what she earns in 1 year.", False),
        ("red", "<answer>red</answer>", True),
        ("red", "red", False),
        ("5", "", False),
        (None, "\\boxed{5}", False),
    ],
)
def test_correct_responses(answer: str | None, response: str, correct: bool) -> None:
    assert is_correct(answer, response) == correct


def test_prompts_in_a_list() -> None:
    assert list(read_problems(["a", {"prompt": "b"}])) == [Problem(1, "a"), Problem(2, "b")]


def test_the_papers_prompt() -> None:
    question = (
        "Siobhan has 2 fewer jewels than Aaron. Aaron has 5 more jewels than half of Raymond's jewels. If Raymond has "
        "40 jewels, how many jewels does Siobhan have?"
    )
    assert paper_prompt(question) == (
        "System: Please reason step by step, and put your final answer within \\boxed{}.\n"
        "Context: Siobhan has 2 fewer jewels than Aaron. Aaron has 5 more jewels than half of Raymond's jewels.\n"
        "Question: If Raymond has 40 jewels, how many jewels does Siobhan have?\n"
    )
    assert paper_prompt("How much is $3.50 * 2?").endswith("}.\nQuestion: How much is $3.50 * 2?\n")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "a"}, "row 1: has no text: neither prompt nor question, only 'text'"),
        ({}, "row 1: has no text: neither prompt nor question, only nothing"),
        ({"prompt": " "}, "row 1: prompt is empty; it must be text"),
        ({"prompt": None}, "row 1: prompt is a NoneType; it must be text"),
        ({"question": 3}, "row 1: question is a int; it must be text"),
        ({"prompt": "a", "question": "b"}, "row 1: has both prompt and question"),
        ({"prompt": "a", "response": ""}, "row 1: response is empty"),
        ({"prompt": "a", "response": "b", "responses": ["c"]}, "row 1: has both response and responses"),
        ({"prompt": "a", "responses": "bc"}, "row 1: responses is a str; it must be a list of texts"),
        ({"prompt": "a", "responses": ["b", 2]}, r"row 1: responses\[1\] is a int"),
        ({"prompt": "a", "answer": ["b"]}, "row 1: answer is a list"),
        (["a"], "row 1: is a list; it must be an object with prompt or question"),
    ],
)
def test_bad_rows(fields: Any, message: str) -> None:
    with pytest.raises(RowError, match=message):
        list(read_problems([fields]))


def test_bad_lines_name_their_row_and_may_be_left_out(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_bytes(b'{"prompt": "a"}\n{"prompt": \n\xff\xfe\n{"prompt": "b"}\n')
    problems = read_problems(file)
    assert next(problems).prompt == "a"
    with pytest.raises(RowError, match="row 2: is not JSON"):
        next(problems)
    errors: list[RowError] = []
    assert [problem.row for problem in read_problems(file, errors.append)] == [1, 4]
    assert [error.row for error in errors] == [2, 3]


HALF = "row 2: {} has \\ud800 as its character 2, half of a surrogate pair"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x\\ud800"}', HALF.format("prompt")),
        ('{"question": "x\\ud800"}', HALF.format("question")),
        ('{"prompt": "a", "response": "x\\ud800"}', HALF.format("response")),
        ('{"prompt": "a", "responses": ["x\\ud800"]}', HALF.format("responses[0]")),
        ('{"prompt": "a", "answer": "x\\ud800"}', HALF.format("answer")),
        ('{"prompt": ' + "[" * 50_000, "row 2: is nested too deeply"),
        ('{"prompt": "a", "answer": ' + "9" * 5000 + "}", "row 2: is not JSON"),
    ],
)
def test_odd_json_names_its_row_and_may_be_left_out(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text('{"prompt": "a \\ud83d\\ude00"}\n' + line + '\n{"prompt": "b"}\n', encoding="utf-8")
    with pytest.raises(RowError) as caught:
        list(read_problems(file))
    assert str(caught.value).startswith(message)
    errors: list[RowError] = []
    assert [problem.prompt for problem in read_problems(file, errors.append)] == ["a 😀", "b"]
    assert [error.row for error in errors] == [2]


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a directory; it must be a file of JSON lines"):
        list(read_problems(tmp_path))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.jsonl: no such file"):
        list(read_problems(tmp_path / "nothing.jsonl"))


def test_a_digest_is_of_prompt_and_response() -> None:
    one = Problem(1, "a", ("b", "c"))
    assert one.digest(0) != one.digest(1)
    assert one.digest(0) == Problem(7, "a", ("b",), "answer").digest(0)
    assert one.digest(0) != Problem(1, "x", ("b", "c")).digest(0)
