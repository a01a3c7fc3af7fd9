"""Computes a task's rewards in processes of their own, with a deadline for each reward and a limit of their memory.

with rhythm.tasks.isolated("countdown", {"numbers": 3}, seconds=5, workers=2) as task:
    instance = task.train[0]
    task.reward(instance, task.solution(instance))          # Reward(score=1.0, correct=True, …)
    task.rewards([instance, instance], ["1", "<answer>2</answer>"])
"""

from __future__ import annotations

import math
import queue
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, ClassVar, Self

from pydantic import BaseModel, Field

from rhythm.tasks.base import Reward, Task, load_task
from rhythm.tasks.reward_process import RewardProcess
from rhythm.tasks.scoring import Fault, reward_or_zero, score_response

START_SECONDS = 300.0
_LARGEST_PART = 32  # responses that a process is sent at a time


class RewardConfig(BaseModel, extra="forbid", frozen=True):
    """The processes in which rewards are computed, and their deadline."""

    seconds: float = Field(
        default=10, gt=0, allow_inf_nan=False, description="deadline for scoring one response; its score is 0 after it"
    )
    workers: int = Field(default=2, ge=1, description="processes that score responses")
    start_seconds: float = Field(
        default=START_SECONDS, gt=0, allow_inf_nan=False, description="deadline for starting such a process"
    )
    memory_gib: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="memory that such a process, and each that it starts, may allocate, in GiB (Linux); a response on "
        "which it needs more scores 0; null: as much as there is",
    )


def isolated(
    name: str,
    options: Mapping[str, object] | None = None,
    *,
    seconds: float = 10.0,
    workers: int = 1,
    start_seconds: float = START_SECONDS,
    memory_gib: float | None = None,
) -> IsolatedTask:
    """The task `name` with `options`, as load_task gives it, its rewards computed in `workers` processes: to be used in
    a with statement, which starts and ends them.

    Args:
        seconds: deadline of one reward; past it the score is 0 and the Reward's fault "late".
        start_seconds: deadline for a process to start.
        memory_gib: memory that a process may allocate, on Linux; where it needs more, the score is 0 and the Reward's
            fault "memory". None: no limit.

    Raises ValueError for an unknown task, options it doesn't allow, a deadline or limit that isn't positive,
    workers < 1.
    """
    config = RewardConfig(seconds=seconds, workers=workers, start_seconds=start_seconds, memory_gib=memory_gib)
    return IsolatedTask(load_task(name, options), name, options or {}, **config.model_dump())


class IsolatedTask:
    """A task whose rewards are computed by copies of it in child processes.

    A reward that raises, misses its deadline, runs out of memory or isn't a valid Reward becomes a score of 0 with its
    `fault` set. After a missed deadline, or out of memory, the child is killed and a new one started. On Linux the
    children end with this process, even if this one is killed.
    """

    config_class: ClassVar[type[BaseModel]] = BaseModel  # unused: this task wraps one that is already built

    def __init__(
        self,
        task: Task[Any],
        name: str,
        options: Mapping[str, object],
        *,
        seconds: float,
        start_seconds: float,
        workers: int = 1,
        memory_gib: float | None = None,
    ) -> None:
        """
        Args:
            task: gives instances, prompts and solutions in this process.
            name, options: the same task, as the children load it to compute rewards.
            seconds: deadline of one reward.
            start_seconds: deadline for a child to start.
            workers: children, which score different responses at the same time.
            memory_gib: memory that a child may allocate; None: no limit.
        """
        self._task = task
        self._processes = [
            RewardProcess(name, options, seconds=seconds, start_seconds=start_seconds, memory_gib=memory_gib)
            for _ in range(workers)
        ]
        self._idle: queue.SimpleQueue[RewardProcess] = queue.SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="rewards")

    def __enter__(self) -> Self:
        for process in self._processes:
            process.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.close()
        self._threads.shutdown(cancel_futures=True)

    @property
    def pids(self) -> list[int | None]:
        """Process ids of the children; None for one that is not running."""
        return [process.pid for process in self._processes]

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
        """The reward of `response`. Raises RewardWorkerError where a child can't be started."""
        return self.rewards([instance], [response])[0]

    def rewards(self, instances: Sequence[Any], responses: Sequence[str]) -> list[Reward]:
        """The reward of each response to the instance at its place, computed by all children together.

        Raises ValueError for lists of different lengths, RewardWorkerError where a child can't be started.
        """
        return self.start_rewards(instances, responses)()

    def start_rewards(self, instances: Sequence[Any], responses: Sequence[str]) -> Callable[[], list[Reward]]:
        """Begin `rewards`; what this returns waits for the result."""
        pairs = list(zip(instances, responses, strict=True))
        size = min(_LARGEST_PART, max(1, math.ceil(len(pairs) / (4 * len(self._processes)))))
        parts = [self._threads.submit(self._ask, pairs[at : at + size]) for at in range(0, len(pairs), size)]
        return lambda: self._settled(pairs, parts)

    def _ask(self, pairs: Sequence[tuple[Any, str]]) -> list[Reward | Fault]:
        process = self._idle.get()
        try:
            return process.rewards(pairs)
        finally:
            self._idle.put(process)

    def _settled(self, pairs: Sequence[tuple[Any, str]], parts: Sequence[Future[list[Reward | Fault]]]) -> list[Reward]:
        answers = [answer for part in parts for answer in part.result()]
        return [
            answer if isinstance(answer, Reward) else reward_or_zero(answer, self._task.prompt(instance), response)
            for (instance, response), answer in zip(pairs, answers, strict=True)
        ]


def start_rewards(task: Task[Any], instances: Sequence[Any], responses: Sequence[str]) -> Callable[[], list[Reward]]:
    """Begin to score responses, each to the instance at its place; what this returns waits for the rewards. Those of a
    task that is not isolated are computed when they are waited for.
    """
    if isinstance(task, IsolatedTask):
        return task.start_rewards(instances, responses)
    return lambda: [
        score_response(task, instance, task.prompt(instance), response)
        for instance, response in zip(instances, responses, strict=True)
    ]
