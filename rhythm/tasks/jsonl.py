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
from rhythm.tasks.rows import Source, column, is_file, read_rows

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
        default="refuse", description="rows whose answer the grader can't read or whose id another has"
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


_Rows = dict[object, tuple[str, Problem]]
"""By id, or else by question: where the row stands, for people, and what it says."""


class Jsonl:
    """The task (see `rhythm.tasks.base.Task`)."""

    config_class: ClassVar[type[JsonlConfig]] = JsonlConfig

    def __init__(self, config: JsonlConfig) -> None:
        """Reads all rows. Raises ValueError naming file, row and column where they can't be used, or where there are
        none, or where an id is in both sets; ModuleNotFoundError naming the extra that is missing.
        """
        self.config = config
        self._grader: Grader = GRADERS[config.grader]()
        rows = self._read(Source(config.path, config.subset, config.split))
        if config.held_out is not None:
            order = _shuffled(random.Random(config.seed), [problem for _, problem in rows.values()])
            count = math.ceil(config.held_out * len(order))
            test, train = order[:count], order[count:]
        else:
            test_rows = self._read(_test_source(config))
            test, train = [problem for _, problem in test_rows.values()], self._without(test_rows, rows)
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

    def _without(self, test: _Rows, train: _Rows) -> list[Problem]:
        """The training rows whose question, and whose id if rows have ids, is not in the test set."""
        asked = {_key(problem) for _, problem in test.values()}
        left = []
        for key, (where, problem) in train.items():
            if self.config.id is not None and key in test and self.config.unusable == "refuse":
                raise ValueError(
                    f"{where}: {self.config.id} is {key!r}, which {test[key][0]} of the test set has too: ids must "
                    "differ (unusable=drop leaves this row out, id=null ignores the ids)"
                )
            if key not in test and _key(problem) not in asked:
                left.append(problem)
        if len(left) < len(train):
            log.warning("%d training rows stand in the test set too: left out", len(train) - len(left))
        return left

    def _read(self, source: Source) -> _Rows:
        config = self.config
        problems: _Rows = {}
        asked: set[object] = set()
        repeated = unreadable = rows = 0
        for rows, (where, row) in enumerate(read_rows(source), 1):  # noqa: B007
            problem = _problem(config, where, row)
            question = _key(problem)
            key = question if config.id is None else str(_value(row, config.id, "id", where))
            if config.id is not None and key in problems and config.unusable == "refuse":
                raise ValueError(f"{where}: {config.id} is {key!r}, which an earlier row has: ids must differ")
            if key in problems or question in asked:
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
            problems[key] = where, problem
            asked.add(question)
        if not problems:
            raise ValueError(f"{source}: {f'none of {rows} rows can be used' if rows else 'has no rows'}")
        if repeated or unreadable:
            log.warning(
                "%s: of %d rows, %d repeat an earlier one and %d have an answer that grader %s can't read: left out",
                source.path, rows, repeated, unreadable, config.grader,
            )  # fmt: skip
        return problems


def _test_source(config: JsonlConfig) -> Source:
    """The source of the held-out rows, where there is a test file or split."""
    if config.test_path is not None:
        return Source(config.test_path, config.subset, config.split, path_key="test_path")
    assert config.test_split is not None  # JsonlConfig sees to it
    return Source(config.path, config.subset, config.test_split, split_key="test_split")


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
