"""A process that computes a task's rewards: what starts it and asks it, and what runs in it.

It imports the task's module and what that imports, but not torch, which comes along only if the task asks for it.
"""

from __future__ import annotations

import json
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rhythm.system.parent import signal_at_parents_end
from rhythm.tasks.base import Reward, load_for_rewards
from rhythm.tasks.scoring import Fault, RewardWorkerError, call_reward

# `import rhythm` loads torch. Here the package's own code runs when the task asks for one of its names.
_START = """
import importlib.util, json, sys
path, fd = json.loads(sys.argv.pop())
sys.path[:] = path
spec = importlib.util.find_spec("rhythm")
package = sys.modules["rhythm"] = importlib.util.module_from_spec(spec)
def load(name):
    if name.startswith("__") and name != "__version__":
        raise AttributeError(name)
    spec.loader.exec_module(package)
    return getattr(package, name)
package.__getattr__ = load
from rhythm.tasks.reward_process import serve
serve(fd)
"""
_NO_MEMORY = Fault("memory", "MemoryError()")
_FIRST_TO_KILL = "1000"  # oom_score_adj: a reward that takes all memory ends this process, not the run


class RewardProcess:
    """A process with a task, killed when a reward takes too long or all its memory, and started again for the next one.

    Asked by one thread at a time; `close` may be called by another.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, object],
        *,
        seconds: float,
        start_seconds: float,
        memory_gib: float | None = None,
    ) -> None:
        """`seconds`: deadline of one reward; `start_seconds`: of the start; `memory_gib`: limit of its memory."""
        self._name, self._options = name, dict(options)
        self._seconds, self._start_seconds, self._memory_gib = seconds, start_seconds, memory_gib
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._ready = False
        self._closed = False
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """None while there is no process."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Without waiting for it; the first reward waits until it is ready. Raises RewardWorkerError once closed."""
        ours, theirs = socket.socketpair()
        with self._lock, theirs:
            if self._closed:
                ours.close()
                raise RewardWorkerError(f"the reward workers of task {self._name} are closed")
            # -P: it looks for no module in the working directory before sys.path is set to this process's.
            command = [sys.executable, "-P", "-c", _START, json.dumps([sys.path, theirs.fileno()])]
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
            )
        self._connection = Connection(ours.detach())
        self._ready = False
        self._connection.send((self._name, self._options, self._memory_gib))

    def rewards(self, pairs: Sequence[tuple[Any, str]]) -> list[Reward | Fault]:
        """Of each (instance, response). Raises RewardWorkerError where no process can be started."""
        answers: list[Reward | Fault] = []
        while len(answers) < len(pairs):
            connection = self._ready_connection()
            answered = select.poll()  # Connection.poll makes a selector each time, which costs more than an answer
            answered.register(connection, select.POLLIN)
            exhausted = False
            try:
                connection.send(pairs[len(answers) :])
                while not exhausted and len(answers) < len(pairs) and answered.poll(1000 * self._seconds):
                    answers.append(answer := connection.recv())
                    exhausted = isinstance(answer, Fault) and answer.kind == "memory"
            except (EOFError, BrokenPipeError, ConnectionResetError):  # the reward function ended its process
                answers.append(Fault("raised", "its process ended"))
                self._discard()
            else:
                if exhausted:  # what filled its memory may still be there
                    self._discard()
                elif len(answers) < len(pairs):
                    answers.append(Fault("late", f"given up after {self._seconds:g} s"))
                    self._discard()
        return answers

    def close(self) -> None:
        """Kill the process; a thread that waits for it is answered with faults or RewardWorkerError."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()
                self._process.wait()

    def _ready_connection(self) -> Connection:
        if self._connection is None:
            self.start()
        assert self._connection is not None
        if not self._ready:
            try:
                answered = self._connection.poll(self._start_seconds)
                fault: Fault | None = self._connection.recv() if answered else None
            except (EOFError, ConnectionResetError):
                answered, fault = True, Fault("raised", "its process ended")
            if fault is not None or not answered:
                self._discard()
                why = f"within {self._start_seconds:g} s" if fault is None else f": {fault.why}"
                raise RewardWorkerError(f"the reward worker of task {self._name} did not start {why}")
            self._ready = True
        return self._connection

    def _discard(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None


def serve(fd: int) -> None:
    """Runs in the process. Reads the task's name, its options and a limit of memory, then lists of (instance,
    response); sends None once it is ready, or a Fault, then a Reward or a Fault per response.
    """
    connection = Connection(fd)
    signal_at_parents_end(signal.SIGKILL)
    if sys.platform == "linux":
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_KILL, encoding="ascii")
    try:
        name, options, memory_gib = connection.recv()
        try:
            if memory_gib is not None:
                _limit_memory(int(memory_gib * 2**30))
            task = load_for_rewards(name, options)
        except BaseException:
            connection.send(Fault("raised", traceback.format_exc()))
            return
        connection.send(None)
        while True:
            for instance, response in connection.recv():
                try:
                    answer = call_reward(task, instance, response)
                except MemoryError:  # not even enough to say so
                    answer = _NO_MEMORY
                except BaseException:  # also KeyboardInterrupt and the like: no reward function may end the run
                    answer = Fault("raised", traceback.format_exc())
                if isinstance(answer, Fault) and answer.kind == "memory":
                    _limit_memory(None)  # for sending it; the process is killed next
                connection.send(answer)  # holds only plain values, so pickling can't fail
    except (EOFError, BrokenPipeError, ConnectionResetError):  # nobody asks any more
        return


def _limit_memory(size: int | None) -> None:
    """Let this process, and each that it starts, allocate `size` bytes, or what it might when it started for None; what
    needs more raises MemoryError.
    """
    if sys.platform == "linux":
        # Not RLIMIT_AS, which counts what libraries map and never touch.
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (most if size is None else size, most))
