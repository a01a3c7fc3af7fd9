"""Tests of the benchmark that need a GPU: implementations in CUDA graphs, and the three kinds of time."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from benchmarks.gpu import check, suite
from benchmarks.gpu.clock import CudaClock

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_our_implementations_replay_what_the_reference_computes() -> None:
    settings = replace(suite.FULL, checked_shapes=suite.FULL.checked_shapes[:1], checked_dtypes=(torch.bfloat16,))
    part = check.implementations_part(settings, CudaClock())
    assert part.facts["wrong"] == []
    assert {row["op"] for row in part.rows} == set(suite.OURS)


@pytest.mark.timing
def test_the_hosts_time_is_no_part_of_the_devices() -> None:
    """A call that keeps the host busy for 5 ms and the device hardly at all."""
    x, clock = torch.zeros(1, device="cuda"), CudaClock()

    def run() -> None:
        x.add_(1)
        time.sleep(0.005)
        x.add_(1)

    assert clock.host_seconds(run) >= 0.005
    assert clock.interleaved({"run": run}, 5)["run"].median < 0.001
    replayed, reasons = clock.interleaved_replays({"run": run}, 5)
    assert reasons == {}
    assert replayed["run"].median < 0.001
