"""Keeps responses on disk, one line each in responses/<task>.jsonl, appended batch by batch."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from rhythm.evaluation.scores import ScoredResponse
from rhythm.system.writing import naming, replace_file

log = logging.getLogger(__name__)


class ResponseRow(BaseModel, extra="forbid", frozen=True):
    """One response and its reward."""

    problem: int = Field(ge=0, description="index among the test instances")
    sample: int = Field(ge=0)
    seed: int
    prompt: str
    response: str
    tokens: int = Field(ge=0, description="of the response, its end token included")
    finished: bool
    score: float
    correct: bool
    format_ok: bool
    fault: str | None = None

    @property
    def scored(self) -> ScoredResponse:
        """The part of the row that scores are computed from."""
        return ScoredResponse(self.problem, self.correct, self.format_ok, self.finished, self.tokens, self.fault)


def read_rows(path: Path) -> dict[tuple[int, int], ResponseRow]:
    """Reads the rows, by (problem, sample); empty if there is no file.

    A last line that a killed process left incomplete is ignored. Raises ValueError naming the first other line that is
    not a row.
    """
    rows: dict[tuple[int, int], ResponseRow] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.is_file() else [], start=1):
        try:
            row = ResponseRow.model_validate_json(line)
        except ValidationError as error:
            raise ValueError(
                f"{path}, line {number}, is not a response: delete the file to generate it again"
            ) from error
        rows[row.problem, row.sample] = row
    return rows


def keep_rows(path: Path, keep: Sequence[ResponseRow]) -> None:
    """Replace the file atomically by these rows, so that later rows are appended after complete lines."""
    replace_file(path, "".join(map(_line, keep)))


def append_rows(path: Path, rows: Sequence[ResponseRow]) -> None:
    """Append a batch; it is on disk when this returns. Raises OSError naming the file."""
    with naming(path), path.open("ab") as file:
        file.write("".join(map(_line, rows)).encode())
        file.flush()
        os.fsync(file.fileno())


def _line(row: ResponseRow) -> str:
    return json.dumps(row.model_dump(), ensure_ascii=False) + "\n"
