"""Shared by the tests with real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import psutil
import pytest

from rhythm.cluster.config import ClusterConfig
from rhythm.cluster.environment import prepare_ray_environment

# Before anything imports Ray, which reads it once.
prepare_ray_environment(ClusterConfig())

SMALL_RUN = """
name: small
runs_dir: {directory}/runs
steps: 4
tensorboard: false
task:
  options: {{format: steps, numbers: 2, max_number: 9, max_target: 18, train_size: 60, test_size: 16}}
warm_start:
  cache_dir: {directory}/cache
  steps: 60
  batch_size: 16
  learning_rate: 0.01
  warmup_steps: 5
  model: {{layers: 6, hidden_size: 32, mlp_size: 48, query_heads: 4, key_heads: 2, head_size: 32}}
batch: {{prompts_per_batch: 4, responses_per_prompt: 4, mini_batch_size: 8, micro_batch_size: 4}}
sampling: {{max_new_tokens: 12}}
signals: {{horizon: [1, 6]}}
optimizer: {{lr: 1.0e-3, warmup_steps: 2}}
evaluation: {{every_steps: 2, samples: 2, temperature: 1.0}}
checkpoint: {{every_steps: 2, keep: 2}}
cluster:
  gpus: 0
  max_length: 64
  object_store_mib: 80
  push_bucket_mib: 1
  parity: {{threshold: 1.0e-3}}
"""


@pytest.fixture(scope="session")
def small_cluster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps on CPUs; engines and their numbers are the overrides' to choose."""
    directory = tmp_path_factory.mktemp("cluster")
    path = directory / "small.yaml"
    path.write_text(SMALL_RUN.format(directory=directory))
    return path


class Launched:
    """rhythm-train in a separate process, and the processes that it started."""

    def __init__(self, config: Path, *arguments: str, cwd: Path | None = None) -> None:
        self.log = config.parent / f"log-{time.monotonic_ns()}.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [Path(sys.executable).with_name("rhythm-train"), str(config), *arguments],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=cwd,
            )
        self._seen: dict[int, psutil.Process] = {}

    @property
    def output(self) -> str:
        return self.log.read_text()

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Its processes whose title begins so, the oldest first."""
        if self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self._seen[child.pid] = child
        alive = []
        for process in self._seen.values():
            try:
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    command = process.cmdline()
                    if not title or (command and command[0].startswith(title)):
                        alive.append(process)
            except psutil.NoSuchProcess:
                continue
        return sorted(alive, key=lambda process: process.create_time())

    def wait_for(self, happened: Callable[[], bool], seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert self.process.poll() is None, f"ended early: {self.output}"
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)
        self.processes()

    def finish(self, code: int = 0, seconds: float = 300) -> str:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        assert self.process.returncode == code, self.output
        return self.output

    def nothing_left(self, seconds: float = 20) -> bool:
        """Whether all its processes end within `seconds`."""
        deadline = time.monotonic() + seconds
        while self.processes():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True


@pytest.fixture(scope="module")
def launch(request: pytest.FixtureRequest) -> Callable[..., Launched]:
    """launch(config, "key=value", …): what is still running at the end of the module is killed."""

    def start(config: Path, *arguments: str, cwd: Path | None = None) -> Launched:
        launched = Launched(config, *arguments, cwd=cwd)

        def stop() -> None:
            children = launched.processes()
            launched.process.kill()
            launched.process.wait()
            for child in children:
                try:
                    child.kill()
                except psutil.NoSuchProcess:
                    continue

        request.addfinalizer(stop)
        return launched

    return start


def _cpu_seconds(pid: int) -> float:
    process = psutil.Process(pid)
    times = [member.cpu_times() for member in (process, *process.children(recursive=True))]
    return sum(member.user + member.system for member in times)


@pytest.fixture(scope="session")
def cpu_seconds() -> Callable[[int], float]:
    """cpu_seconds(pid): what a process and its children have used of the processor so far."""
    return _cpu_seconds


@pytest.fixture(scope="session")
def lost_midway() -> Callable[..., AbstractContextManager[None]]:
    """lost_midway(pid, how, work): meanwhile the signal `how` reaches the process once it has done a third of `work`,
    in seconds of the processor: in the middle of a call that needs so much, on a fast machine and on a busy one.
    """

    @contextmanager
    def meanwhile(pid: int, how: int, work: float) -> Iterator[None]:
        over, sent = threading.Event(), threading.Event()
        enough = _cpu_seconds(pid) + work / 3

        def watch() -> None:
            while not over.wait(0.01):
                if _cpu_seconds(pid) >= enough:
                    os.kill(pid, how)
                    sent.set()
                    return

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()
        assert sent.is_set(), f"process {pid} ended its call before it had done a third of its work"

    return meanwhile
