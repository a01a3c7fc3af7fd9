"""Tasks from a file or a data set on the hub, which has a question and its right answer in each row."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rhythm.tasks.answers import Which
from rhythm.tasks.base import Reward
from rhythm.tasks.graders import GRADERS, Grader, GraderName
from rhythm.tasks.prompts import Messages, PromptConfig
from rhythm.tasks.rows import column, is_file, read_rows

log = logging.getLogger(__name__)


class JsonlConfig(PromptConfig, frozen=True):
    """Which rows there are, which of their columns count, and how answers are graded."""

    path: str = Field(description="a .jsonl or .parquet file, a directory or a name on the hub (through datasets)")
    subset: str | None = Field(default=None, description="configuration of a data set on the hub; null for its default")
    split: str = Field(default="train", description="split of the training rows, of a data set on the hub")
    test_path: str | None = Field(default=None, description="file of the held-out rows; null: they come from path")
    test_split: str | None = Field(default=None, description="split of the held-out rows; null: see held_out")
    held_out: float | None = Field(
        default=None, gt=0, le=1, description="share of the rows held out, where there is no test split or file"
    )
    prompt: str = Field(
        default="prompt", description="column of the question: a text, or chat messages; a.b: entry b of a"
    )
    answer: str = Field(default="answer", description="column of the right answer")
    answer_after: str | None = Field(
        default=None, description="the right answer is what follows the last of these in its column; null: all of it"
    )
    solution: str | None = Field(default=None, description="column of worked solutions, for the warm start alone")
    id: str | None = Field(default=None, description="column that names a row; null: rows have no names")
    grader: GraderName = Field(default="math", description="how an answer is compared with the right one")
    answer_block: Which = Field(
        default="first", description="which answer of a response counts; after the first, models invent new problems"
    )
    unusable: Literal["refuse", "drop"] = Field(
        default="refuse", description="rows whose answer the grader can't read or whose id was there before"
    )
    seed: int = Field(default=0, ge=0, description="seed of which rows are held out")

    @model_validator(mode="after")
    def _one_test_set(self) -> Self:
        given = [name for name in ("test_path", "test_split", "held_out") if getattr(self, name) is not None]
        if len(given) != 1:
            what = " and ".join(f"{name} is {getattr(self, name)!r}" for name in given) or "there is no test set"
            raise ValueError(f"{what}: give exactly one of test_path, test_split and held_out")
        if self.test_split is not None and is_file(self.path):
            raise ValueError(
                f"test_split is {self.test_split!r}: the file {self.path} has no splits; give test_path or held_out"
            )
        return self


@dataclass(frozen=True)
class Problem:
    """One row: the question, a text or chat messages; the right answer; the worked solution where there is one."""

    question: str | Messages
    answer: str
    solution: str | None = None


class Jsonl:
    """The task (see `rhythm.tasks.base.Task`)."""

    config_class: ClassVar[type[JsonlConfig]] = JsonlConfig

    def __init__(self, config: JsonlConfig) -> None:
        """Reads all rows. Raises ValueError naming file, row and column where they can't be used, or where there are
        none; ModuleNotFoundError naming the extra that is missing.
        """
        self.config = config
        self._grader: Grader = GRADERS[config.grader]()
        rows = self._read(config.path, config.split)
        if config.held_out is not None:
            order = _shuffled(random.Random(config.seed), rows)
            count = math.ceil(config.held_out * len(order))
            test, train = order[:count], order[count:]
        else:
            train, test = rows, self._read(config.test_path or config.path, config.test_split or config.split)
            asked = {_key(problem) for problem in test}
            train = [problem for problem in train if _key(problem) not in asked]
            if len(train) < len(rows):
                log.warning("%d training rows stand in the test set too: left out", len(rows) - len(train))
        self.train: Sequence[Problem] = train
        self.test: Sequence[Problem] = test

    @classmethod
    def for_rewards(cls, config: JsonlConfig) -> Jsonl:
        """The task without rows: all that a reward needs."""
        task = cls.__new__(cls)
        task.config, task._grader = config, GRADERS[config.grader]()
        task.train = task.test = ()
        return task

    def prompt(self, instance: Problem) -> str:
        """What the model reads."""
        return self.config.ask(instance.question)

    def solution(self, instance: Problem) -> str:
        """The worked solution of the row, if it has one, and the answer in a block."""
        block = (
            f"<answer>{instance.answer}</answer>" if self.config.grader == "exact" else f"\\boxed{{{instance.answer}}}"
        )
        return block if instance.solution is None else f"{instance.solution.strip()}\n{block}"

    def reward(self, instance: Problem, response: str) -> Reward:
        """1 for the right answer, else 0."""
        return self._grader.grade(instance.answer, response, self.config.answer_block)

    def _read(self, path: str, split: str) -> list[Problem]:
        config = self.config
        problems: dict[object, Problem] = {}
        repeated = unreadable = rows = 0
        for rows, (where, row) in enumerate(read_rows(path, config.subset, split), 1):  # noqa: B007
            problem = _problem(config, where, row)
            key = _key(problem) if config.id is None else str(_value(row, config.id, "id", where))
            if key in problems:
                if config.id is not None and config.unusable == "refuse":
                    raise ValueError(f"{where}: {config.id} is {key!r}, which an earlier row has: ids must differ")
                repeated += 1
                continue
            try:
                self._grader.check(problem.answer)
            except ValueError as error:
                if config.unusable == "refuse":
                    raise ValueError(
                        f"{where}: {config.answer} is {problem.answer[:80]!r}: for grader {config.grader} it {error}"
                    ) from error
                unreadable += 1
                continue
            problems[key] = problem
        if not problems:
            raise ValueError(f"path is {path}: {f'none of {rows} rows can be used' if rows else 'has no rows'}")
        if repeated or unreadable:
            log.warning(
                "%s: of %d rows, %d repeat an earlier one and %d have an answer that grader %s can't read: left out",
                path, rows, repeated, unreadable, config.grader,
            )  # fmt: skip
        return list(problems.values())


def _problem(config: JsonlConfig, where: str, row: Mapping[str, Any]) -> Problem:
    question = _value(row, config.prompt, "prompt", where)
    if isinstance(question, list):
        question = tuple(_messages(question, config.prompt, where))
    elif not isinstance(question, str) or not question.strip():
        raise ValueError(f"{where}: {config.prompt} is {str(question)[:80]!r}: must be a text, or chat messages")
    answer = _value(row, config.answer, "answer", where)
    if isinstance(answer, list):
        answer = ", ".join(map(str, answer))
    answer = "" if answer is None else str(answer)
    solution = None if config.solution is None else str(_value(row, config.solution, "solution", where))
    if config.answer_after is not None:
        before, separator, after = answer.rpartition(config.answer_after)
        if not separator:
            raise ValueError(f"{where}: {config.answer} is {answer[-80:]!r}: must contain {config.answer_after!r}")
        solution, answer = before if config.solution == config.answer else solution, after
    return Problem(question, answer.strip(), solution)


def _value(row: Mapping[str, Any], name: str, key: str, where: str) -> Any:
    try:
        return column(row, name)
    except KeyError:
        raise ValueError(f"{where}: has no column {name} ({key}); its columns are {', '.join(map(str, row))}") from None


def _messages(given: list[Any], name: str, where: str) -> Iterator[dict[str, str]]:
    for message in given or [None]:
        if not (
            isinstance(message, Mapping)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        ):
            raise ValueError(f"{where}: {name} is {str(given)[:80]!r}: each message must have a role and a content")
        yield {"role": message["role"], "content": message["content"]}


def _key(problem: Problem) -> object:
    """Equal for equal questions."""
    question = problem.question
    return question if isinstance(question, str) else tuple((m["role"], m["content"]) for m in question)


def _shuffled(rng: random.Random, items: list[Problem]) -> list[Problem]:
    # Only Random.random() is promised to give the same numbers in every version of Python.
    return [items[index] for _, index in sorted((rng.random(), index) for index in range(len(items)))]
