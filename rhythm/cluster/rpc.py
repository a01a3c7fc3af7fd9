"""Remote calls to the cluster's processes, with deadlines; an exception there is raised here with its traceback."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError, TaskUnschedulableError

from rhythm.cluster.errors import RemoteError
from rhythm.cluster.roles import Role
from rhythm.cluster.specs import Part, Reply
from rhythm.engines.interfaces import EngineLostError

GRACE_SECONDS = 10.0
"""Seconds to wait, after an exception in one of several processes that work together, for the death of another,
which may be its cause."""

_COLOR_CODES = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(eq=False)
class Worker:
    """A process of the cluster. name: in messages; node, pid: set once it has started; log: file of its output, None
    for Ray's own.
    """

    name: str
    role: Role
    actor: Any
    pid: int | None = None
    node: str = ""
    log: Path | None = None

    def submit(self, method: str, *arguments: Any) -> Any:
        """Start a method; returns the reference to wait for with `collect`."""
        return self.actor.call.remote(method, *arguments)

    def stream(self, method: str, *arguments: Any) -> Any:
        """Start a method that answers in parts; returns what `collect` takes in place of a reference."""
        return self.actor.stream.options(num_returns="streaming").remote(method, *arguments)

    def kill(self) -> None:
        """Kill the process, whatever it is doing."""
        ray.kill(self.actor, no_restart=True)
        if self.pid is not None and self.node == socket.gethostname():  # Ray can't end a stopped process
            try:
                os.kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                return


@dataclass
class Outcome:
    """The outcome of one call per worker. lost: workers that died, missed the deadline or lost their engine →
    reason.
    """

    replies: dict[Worker, Reply] = field(default_factory=dict)
    lost: dict[Worker, str] = field(default_factory=dict)


def collect(
    pending: Mapping[Worker, Any],
    seconds: float,
    task: str,
    *,
    together: bool = False,
    each: Callable[[Worker, Any], None] | None = None,
) -> Outcome:
    """Wait for all calls. A worker that misses the deadline is killed.

    `together`: the workers depend on each other, so after one is lost the others are not waited for. `each`: called
    with the values of a streamed answer's parts.

    Raises RemoteError for an exception in a worker; with `together` only if none was lost, because a lost worker causes
    exceptions in the others.
    """
    outcome, errors = Outcome(), list[tuple[Worker, str]]()
    waiting = {reference: worker for worker, reference in pending.items()}
    end = time.monotonic() + seconds
    while waiting and not (together and outcome.lost):
        left = end - time.monotonic()
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=max(0.0, left))
        if not ready:
            break
        worker = waiting.pop(ready[0])
        try:
            answer = ray.get(next(ready[0]) if isinstance(ready[0], ray.ObjectRefGenerator) else ready[0])
        except (RayActorError, TaskUnschedulableError) as error:
            outcome.lost[worker] = f"died: {_short(error)}"
        except RayTaskError as error:
            if isinstance(error.cause, EngineLostError):
                outcome.lost[worker] = f"lost its engine: {error.cause}"
                continue
            errors.append((worker, _told(worker, error)))
            if together:
                end = min(end, time.monotonic() + GRACE_SECONDS)
        else:
            if isinstance(answer, Part):
                waiting[ready[0]] = worker
                assert each is not None
                each(worker, answer.value)
            else:
                outcome.replies[worker] = answer
    if not together or not (errors or outcome.lost):
        for worker in waiting.values():
            worker.kill()
            outcome.lost[worker] = f"did not answer within {seconds:g} s, and was killed"
    if errors and not (together and outcome.lost):
        raise RemoteError("\n".join(f"{task}: {worker.name} failed: {told}" for worker, told in errors))
    return outcome


def call(workers: Sequence[Worker], method: str, *arguments: Any, seconds: float, task: str, together: bool) -> Outcome:
    """Make the same call to all workers and wait for them."""
    return collect({w: w.submit(method, *arguments) for w in workers}, seconds, task, together=together)


def identify(workers: Sequence[Worker], seconds: float) -> Outcome:
    """Wait until the processes have started; sets each worker's node and pid."""
    end = time.monotonic() + seconds
    pending = {worker: worker.actor.identify.remote() for worker in workers}
    outcome = Outcome()
    for worker, reference in pending.items():
        try:
            worker.node, worker.pid = ray.get(reference, timeout=max(0.0, end - time.monotonic()))
        except RayActorError as error:
            outcome.lost[worker] = f"died: {_short(error)}"
        except GetTimeoutError:
            worker.kill()
            outcome.lost[worker] = f"did not start within {seconds:g} s, and was killed"
    return outcome


def _short(error: Exception) -> str:
    """The reason that Ray gives, without its general advice."""
    return " ".join(str(error).split()).partition(" Some common causes")[0]


def _told(worker: Worker, error: RayTaskError) -> str:
    """The exception's type and message, then its traceback or the log file that contains it."""
    cause = error.cause
    trace = _trace(error)
    what = trace.splitlines()[-1] if cause is None else f"{type(cause).__name__}: {cause}"
    return f"{what}\n{trace}" if worker.log is None else f"{what}\n(the traceback is in {worker.log})"


def _trace(error: RayTaskError) -> str:
    """The remote traceback without Ray's color codes and underlines."""
    plain = _COLOR_CODES.sub("", str(error)).splitlines()
    return "\n".join(line for line in plain if line.strip(" ^~"))
