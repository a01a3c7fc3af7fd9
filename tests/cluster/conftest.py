"""Shared by the tests with real processes."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.whole_runs import Launched
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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 8 MiB. Needs root."""
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", path], check=True, timeout=120)
    yield path
    subprocess.run(["umount", "--lazy", path], check=True, timeout=120)


@pytest.fixture(scope="module")
def launch(request: pytest.FixtureRequest) -> Callable[..., Launched]:
    """launch(config, "key=value", …): what is still running at the end of the module is killed."""

    def start(config: Path, *arguments: str, **named: Any) -> Launched:
        launched = Launched(config, *arguments, **named)
        request.addfinalizer(launched.stop)
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
