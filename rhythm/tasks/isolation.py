"""Computes a task's rewards in a child process, which is killed when a reward takes too long."""

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
from rhythm.tasks.scoring import Fault, RewardWorkerError, call_reward, reward_or_zero

_SPAWN = multiprocessing.get_context("spawn")
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_SAFE_PATH = "PYTHONSAFEPATH"


class IsolatedTask:
    """A task whose rewards are computed by a copy of it in a child process.

    A reward that raises, misses its deadline or isn't a valid Reward becomes a score of 0 with its `fault` set. After a
    missed deadline the child is killed and a new one started. On Linux the child ends with this process, even if this
    one is killed.
    """

    config_class: ClassVar[type[BaseModel]] = BaseModel  # unused: this task wraps one that is already built

    def __init__(
        self, task: Task[Any], name: str, options: Mapping[str, object], *, seconds: float, start_seconds: float
    ) -> None:
        """
        Args:
            task: gives instances, prompts and solutions in this process.
            name, options: the same task, as the child loads it to compute rewards.
            seconds: deadline of one reward.
            start_seconds: deadline for the child to start.
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
        """Process id of the child; None while there is none."""
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
        """The reward of `response`. Raises RewardWorkerError where the child can't be started."""
        connection = self._connection()
        try:
            connection.send((instance, response))
            answered = connection.poll(self._seconds)
            answer: Reward | Fault | None = connection.recv() if answered else None
        except (EOFError, BrokenPipeError, ConnectionResetError):  # the reward function ended its process
            answer = Fault("raised", "its process ended")
            self._kill()
        if answer is None:
            answer = Fault("late", f"given up after {self._seconds:g} s")
            self._kill()
        return reward_or_zero(answer, self._task.prompt(instance), response)

    def _start(self) -> None:
        """Start a child without waiting for it; the first reward waits until it is ready."""
        ours, theirs = _SPAWN.Pipe()
        arguments = (theirs, self._name, self._options, os.environ.get(_SAFE_PATH))
        process = _SPAWN.Process(target=_serve_rewards, args=arguments, daemon=True)
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
                raise RewardWorkerError(
                    f"the reward worker of task {self._name} did not start within {self._start_seconds:g} s"
                )
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
    """Set PYTHONSAFEPATH until the block is left, so that a Python started in it does not import modules from the
    working directory first: a pickle.py there would shadow the standard library's.
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


def _serve_rewards(connection: Connection, name: str, options: dict[str, object], safe_path: str | None) -> None:
    """Main function of the child: sends None once it is ready, then a Reward or a Fault per (instance, response).

    `safe_path`: the value of PYTHONSAFEPATH for processes that the reward function starts.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    _restore_safe_path(safe_path)
    task = load_task(name, options)
    connection.send(None)
    while True:
        try:
            instance, response = connection.recv()
        except EOFError:
            return
        try:
            answer = call_reward(task, instance, response)
        except BaseException:  # also KeyboardInterrupt and the like: no reward function may end the run
            answer = Fault("raised", traceback.format_exc())
        connection.send(answer)  # holds only plain values, so pickling can't fail
