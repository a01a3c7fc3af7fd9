"""Reads problems from the rows of a JSONL file or from a list: prompts, with or without responses."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rhythm.tasks.answers import find_answer
from rhythm.tasks.graders import ExactGrader, Grader, NumericGrader

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
"""The instruction of the paper's prompt (appendix A.1)."""
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
LAST_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=\S)")


class RowError(ValueError):
    """A row can't be analyzed; the message names it."""

    def __init__(self, row: int, problem: str) -> None:
        super().__init__(f"row {row}: {problem}")
        self.row = row


@dataclass(frozen=True)
class Problem:
    """A problem. row: its row number, from 1; responses: the given ones, or empty; answer: as in the row, if any."""

    row: int
    prompt: str
    responses: tuple[str, ...] = ()
    answer: str | None = None

    def digest(self, sample: int) -> str:
        """Hash of the prompt and, if given, this response."""
        parts = [self.prompt, *self.responses[sample : sample + 1]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


Source = Path | Sequence[str | Mapping[str, Any]]


def read_problems(source: Source, on_error: Callable[[RowError], None] | None = None) -> Iterator[Problem]:
    """The problems of a JSONL file, read line by line, or of a list of prompts or rows.

    A row has `prompt`, which is used unchanged, or `question` (GSM8K), which is put into the paper's prompt; optionally
    `response` or `responses`; and optionally `answer`. Empty lines are skipped, but count as rows.

    Args:
        on_error: called with the error of an invalid row, which is then left out; None: the error is raised.

    Raises:
        RowError (a ValueError): an invalid row.
        ValueError: the file doesn't exist or is a directory.
        OSError: the file can't be read.
    """
    for row, item in _rows(source):
        try:
            parsed = problem(row, _parsed(row, item) if isinstance(source, Path) else item)
        except RowError as error:
            if on_error is None:
                raise
            on_error(error)
        else:
            yield parsed


def _rows(source: Source) -> Iterator[tuple[int, Any]]:
    """(row number from 1, line or item)."""
    if not isinstance(source, Path):
        for row, item in enumerate(source, start=1):
            yield row, {"prompt": item} if isinstance(item, str) else item
        return
    check_file(source)
    with source.open("rb") as lines:
        for row, line in enumerate(lines, start=1):
            if line.strip():
                yield row, line


def check_file(path: Path) -> None:
    """Raise ValueError unless there is a file or a pipe."""
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    if path.is_dir():
        raise ValueError(f"{path}: is a directory; it must be a file of JSON lines")


def problem(row: int, fields: Any) -> Problem:
    """The problem of a row. Raises RowError if it is invalid."""
    if not isinstance(fields, Mapping):
        raise RowError(row, f"is a {type(fields).__name__}; it must be an object with prompt or question")
    if "prompt" in fields and "question" in fields:
        raise RowError(row, "has both prompt and question; it must be one or the other")
    if "prompt" in fields:
        prompt = _text(row, "prompt", fields["prompt"])
    elif "question" in fields:
        prompt = paper_prompt(_text(row, "question", fields["question"]))
    else:
        keys = ", ".join(map(repr, fields)) or "nothing"
        raise RowError(row, f"has no text: neither prompt nor question, only {keys}")
    answer = fields.get("answer")
    if answer is not None and not isinstance(answer, str | int | float):
        raise RowError(row, f"answer is a {type(answer).__name__}; it must be text or a number")
    if isinstance(answer, str):
        _encodable(row, "answer", answer)
    return Problem(row, prompt, _responses(row, fields), None if answer is None else str(answer))


def paper_prompt(question: str) -> str:
    """The paper's prompt: the instruction, all sentences but the last as context, and the last as the question."""
    *context, last = LAST_SENTENCE.split(question.strip())
    lines = [f"System: {INSTRUCTION}", f"Context: {' '.join(context)}", f"Question: {last}"]
    return "\n".join(line for line in lines if line != "Context: ") + "\n"


def is_correct(answer: str | None, response: str) -> bool:
    """Whether the response's answer block, or without one its last number, is the row's answer (GSM8K: after its ####):
    the same number, or the same text.
    """
    if answer is None:
        return False
    right = find_answer(answer) or answer
    if find_answer(response) is None and (numbers := NUMBER.findall(response)):
        response = f"#### {numbers[-1]}"
    grader: Grader = NumericGrader()
    try:
        grader.check(right)
    except ValueError:
        grader = ExactGrader()
    return grader.grade(right, response).correct


def _responses(row: int, fields: Mapping[str, Any]) -> tuple[str, ...]:
    if fields.get("response") is not None and fields.get("responses") is not None:
        raise RowError(row, "has both response and responses; it must be one or the other")
    if (one := fields.get("response")) is not None:
        return (_text(row, "response", one),)
    many = fields.get("responses")
    if many is None:
        return ()
    if not isinstance(many, list | tuple):
        raise RowError(row, f"responses is a {type(many).__name__}; it must be a list of texts")
    return tuple(_text(row, f"responses[{i}]", text) for i, text in enumerate(many))


def _text(row: int, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RowError(row, f"{name} is a {type(value).__name__}; it must be text")
    if not value.strip():
        raise RowError(row, f"{name} is empty; it must be text")
    _encodable(row, name, value)
    return value


def _encodable(row: int, name: str, text: str) -> None:
    """Raise RowError if the text can't be encoded: JSON can contain half of a surrogate pair, which UTF-8 can't."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise RowError(
            row, f"{name} has {half} as its character {error.start + 1}, half of a surrogate pair"
        ) from error


def _parsed(row: int, line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:  # not JSON, or not UTF-8
        raise RowError(row, f"is not JSON: {error}") from error
    except RecursionError as error:
        raise RowError(row, "is nested too deeply") from error
