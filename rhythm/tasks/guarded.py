"""A task whose rewards are computed in a process of their own, which is killed when one takes too long."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, ClassVar, Self

from pydantic import BaseModel

from rhythm.tasks.base import Reward, Task, load_task

log = logging.getLogger(__name__)

_SPAWN = multiprocessing.get_context("spawn")
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class GuardedTask:
    """The task `name` with `options`, judged by a copy of it in a child process.

    A reward that raises or misses its deadline is a score of 0 with its `fault` named; after a missed deadline
    the child is killed and a new one started. The child ends with this process, even where this one is killed.
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
        """The judgement of `response`. Raises RuntimeError where the child can't be started."""
        connection = self._connection()
        try:
            connection.send((instance, response))
            answered = connection.poll(self._seconds)
            answer: Reward | str | None = connection.recv() if answered else None
        except (EOFError, BrokenPipeError, ConnectionResetError):  # the judge took its process down with it
            answer = "its process ended"
            self._kill()
        if isinstance(answer, Reward):
            return answer
        if answer is not None:
            log.warning("a reward raised; its response: %.200r\n%s", response, answer)
            return Reward(0.0, correct=False, format_ok=False, fault="raised")
        log.warning("a reward took longer than %g s: given up; its response: %.200r", self._seconds, response)
        self._kill()
        return Reward(0.0, correct=False, format_ok=False, fault="late")

    def _start(self) -> None:
        """Start a child; that it is ready is waited for when the first reward is asked."""
        ours, theirs = _SPAWN.Pipe()
        process = _SPAWN.Process(target=_judge, args=(theirs, self._name, self._options), daemon=True)
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
                raise RuntimeError(f"the judge of task {self._name} did not come up in {self._start_seconds:g} s")
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


def _judge(connection: Connection, name: str, options: dict[str, object]) -> None:
    """The child: None once it is ready, then for each (instance, response) a Reward, or the traceback."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is the parent's to handle
    task = load_task(name, options)
    connection.send(None)
    while True:
        try:
            instance, response = connection.recv()
        except EOFError:
            return
        try:
            reward: Reward | str = task.reward(instance, response)
        except BaseException:  # also SystemExit and the like: whatever a judge does, the run goes on
            reward = traceback.format_exc()
        connection.send(reward)
