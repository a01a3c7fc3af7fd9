"""The plan's numbers beside the tensors that Megatron allocates, and the counter of these."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from benchmarks import ROOT
from benchmarks.live_memory import LiveMemory, storage_bytes

pytest.importorskip("megatron.core", reason="needs Megatron-core: make cluster-install")


def test_the_plan_is_what_megatron_allocates() -> None:
    """In a process of its own, because Megatron on a CPU patches torch."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "--models", "tiny", "--tokens", "512"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| tiny")]
    parts = [line.split(" | ")[1] for line in lines]
    assert len(parts) == 22  # with and without recomputation
    assert {"kept by all layers", "backward pass of the head", "optimizer's step, peak"} < set(parts)


@pytest.mark.parametrize(("factor", "code"), [(0.7, 1), (0.84, 1), (0.9, 0), (1.1, 0), (1.16, 1), (1.3, 1)])
def test_a_number_that_is_off_fails(factor: float, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.memory import Row, verdict

    assert verdict([Row("weights", 1000, 1000), Row("kept by all layers", 1000, int(1000 * factor))]) == code
    assert ("kept by all layers" in capsys.readouterr().err) == bool(code)


def test_storages_count_once_and_until_they_are_freed() -> None:
    with LiveMemory() as memory:
        x = torch.zeros(100)
        view = x[10:].view(9, 10)
        x.add_(1)
        assert memory.live == 400
        y = view * 2
        assert memory.live == 760
        del x
        assert memory.live == 760  # the view keeps it
        del view
        assert memory.live == 360
        with memory.paused():
            z = torch.zeros(1000)
        assert memory.live == 360
        memory.follow([z, {"again": z}])
        assert memory.live == 4360
        del y, z
    assert (memory.live, memory.peak) == (0, 4360)
    assert storage_bytes([(w := torch.zeros(7)), w[2:]]) == 28
