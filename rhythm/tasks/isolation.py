"""A task whose rewards are computed in a process of their own, which is killed when one takes too long."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, ClassVar, Self

from pydantic import BaseModel

from rhythm.tasks.base import Reward, Task, load_task
from rhythm.tasks.judging import Fault, JudgeError, ask, settled

_SPAWN = multiprocessing.get_context("spawn")
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_SAFE_PATH = "PYTHONSAFEPATH"


class IsolatedTask:
    """The task `name` with `options`, judged by a copy of it in a child process.

    A reward that raises, misses its deadline or makes no judgement is a score of 0 with its `fault` named; after a
    missed deadline the child is killed and a new one started. The child ends with this process, even where this one
    is killed.
    """

    config_class: ClassVar[type[BaseModel]] = BaseModel  # of the task within: this one is made from another

    def __init__(
        self, task: Task[Any], name: str, options: Mapping[str, object], *, seconds: float, start_seconds: float
    ) -> None:
        """`task`: the same task, for everything but rewards; `seconds`: for one reward; `start_seconds`: for the
        child to come up.
        """
        self._task = task
        self._name, self._options = name, dict(options)
        self._seconds, self._start_seconds = seconds, start_seconds
        self._child: tuple[SpawnProcess, Connection] | None = None
        self._ready = False

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kill()

    @property
    def pid(self) -> int | None:
        """The judging process; None while there is none."""
        return None if self._child is None else self._child[0].pid

    @property
    def train(self) -> Sequence[Any]:
        """See rhythm.tasks.base.Task."""
        return self._task.train

    @property
    def test(self) -> Sequence[Any]:
        """See rhythm.tasks.base.Task."""
        return self._task.test

    def prompt(self, instance: Any) -> str:
        """See rhythm.tasks.base.Task."""
        return self._task.prompt(instance)

    def solution(self, instance: Any) -> str:
        """See rhythm.tasks.base.Task."""
        return self._task.solution(instance)

    def reward(self, instance: Any, response: str) -> Reward:
        """The judgement of `response`. Raises JudgeError where the child can't be started."""
        connection = self._connection()
        try:
            connection.send((instance, response))
            answered = connection.poll(self._seconds)
            answer: Reward | Fault | None = connection.recv() if answered else None
        except (EOFError, BrokenPipeError, ConnectionResetError):  # the judge took its process down with it
            answer = Fault("raised", "its process ended")
            self._kill()
        if answer is None:
            answer = Fault("late", f"given up after {self._seconds:g} s")
            self._kill()
        return settled(answer, self._task.prompt(instance), response)

    def _start(self) -> None:
        """Start a child; that it is ready is waited for when the first reward is asked."""
        ours, theirs = _SPAWN.Pipe()
        arguments = (theirs, self._name, self._options, os.environ.get(_SAFE_PATH))
        process = _SPAWN.Process(target=_judge, args=arguments, daemon=True)
        with _safe_path():
            process.start()
        theirs.close()
        self._child = (process, ours)
        self._ready = False

    def _connection(self) -> Connection:
        if self._child is None:
            self._start()
        assert self._child is not None
        _, connection = self._child
        if not self._ready:
            if not connection.poll(self._start_seconds) or connection.recv() is not None:
                self._kill()
                raise JudgeError(f"the judge of task {self._name} did not come up in {self._start_seconds:g} s")
            self._ready = True
        return connection

    def _kill(self) -> None:
        if self._child is None:
            return
        process, connection = self._child
        process.kill()
        process.join()
        connection.close()
        self._child = None


@contextmanager
def _safe_path() -> Iterator[None]:
    """Until the block is left, a Python that is started looks for no module in the working directory before this
    process's sys.path reaches it: it would take a pickle.py there for the standard library's.
    """
    before = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"
    try:
        yield
    finally:
        _restore_safe_path(before)


def _restore_safe_path(value: str | None) -> None:
    if value is None:
        os.environ.pop(_SAFE_PATH, None)
    else:
        os.environ[_SAFE_PATH] = value


def _judge(connection: Connection, name: str, options: dict[str, object], safe_path: str | None) -> None:
    """The child: None once it is ready, then for each (instance, response) a Reward or a Fault.

    `safe_path`: PYTHONSAFEPATH for what the judge itself may start.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is the parent's to handle
    _restore_safe_path(safe_path)
    task = load_task(name, options)
    connection.send(None)
    while True:
        try:
            instance, response = connection.recv()
        except EOFError:
            return
        try:
            answer = ask(task, instance, response)
        except BaseException:  # KeyboardInterrupt and the like: whatever a judge does, the run goes on
            answer = Fault("raised", traceback.format_exc())
        connection.send(answer)  # plain values only, so this can't fail for what the judge returned
