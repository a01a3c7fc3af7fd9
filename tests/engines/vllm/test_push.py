"""Weights from a trainer in another process, by every kind of transfer, and parity afterwards."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rhythm.engines.interfaces import Rollout
from rhythm.engines.parity import compare, must_agree
from rhythm.engines.vllm.infer import VllmInfer

SEGMENTS = Path("/dev/shm")
TRAINER = Path(__file__).with_name("trainer_process.py")
ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@contextmanager
def trainer(kind: str, checkpoint: Path, directory: Path) -> Iterator[Connection]:
    with Listener(str(directory / "socket"), "AF_UNIX") as listener:
        process = subprocess.Popen([sys.executable, TRAINER, listener.address, kind, checkpoint])
        try:
            with listener.accept() as connection:
                yield connection
            assert process.wait(120) == 0
        finally:
            process.kill()
            process.wait()


def call(connection: Connection, method: str, alongside: Callable[[], None] = lambda: None) -> Any:
    """What the trainer returns; it and `alongside` run at the same time."""
    connection.send(method)
    alongside()
    return connection.recv()


@pytest.mark.parametrize(
    "kind", ["shared_memory", pytest.param("nccl", marks=ON_A_GPU), pytest.param("ipc", marks=ON_A_GPU)]
)
def test_every_kind_of_push_brings_every_weight(
    kind: Any,
    start: Callable[..., VllmInfer],
    make_checkpoint: Callable[..., Path],
    load: Callable[[Path], Any],
    make_rollout: Callable[..., Rollout],
    logprobs: Callable[..., Tensor],
    tmp_path: Path,
) -> None:
    if kind == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL joins no two processes on one GPU")
    engine, rollout, changed = start(make_checkpoint(), enforce_eager=True), make_rollout(), make_checkpoint(seed=1)
    expected = logprobs(load(changed), rollout)
    assert compare(engine.score(rollout), expected, rollout.response_mask).mean > 0.1
    segments = set(SEGMENTS.iterdir())
    received = 0
    with trainer(kind, changed, tmp_path) as connection:
        info = call(connection, "init_info")
        call(connection, "connect", alongside=lambda: engine.init_transfer(kind, info))
        engine.start_push()
        while (bucket := call(connection, "stage")) is not None:
            call(connection, "transmit", alongside=lambda bucket=bucket: engine.receive(bucket))
            received += 1
        with pytest.raises(RuntimeError, match="is receiving: this needs it serving"):
            engine.score(rollout)
        engine.finish_push(version=7)
        call(connection, "close")
    assert received > 10
    assert engine.version == 7
    must_agree(compare(engine.score(rollout), expected, rollout.response_mask), threshold=1e-4)
    assert set(SEGMENTS.iterdir()) <= segments
