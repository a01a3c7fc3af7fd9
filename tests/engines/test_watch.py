"""DeviceWatch: blocks add up, and on a GPU nothing waits for them before they are read."""

from __future__ import annotations

import time

import pytest
import torch

from rhythm.engines.watch import DeviceWatch


@pytest.mark.timing
def test_blocks_on_the_cpu_add_up() -> None:
    watch = DeviceWatch(torch.device("cpu"))
    for _ in range(3):
        with watch:
            time.sleep(0.02)
        time.sleep(0.1)
    assert 0.06 <= watch.seconds < 0.3


def test_on_a_gpu_nothing_waits_until_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[str] = []

    class Event:
        """Stands in for CUDA's: the n-th one recorded happens n milliseconds after the first."""

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            did.append("record")
            self.at = float(did.count("record"))

        def synchronize(self) -> None:
            did.append("wait")

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = DeviceWatch(torch.device("cuda"))
    for _ in range(3):
        with watch:
            pass
    assert did == ["record"] * 6
    assert watch.seconds == pytest.approx(3 * 0.001)
    assert did[6:] == ["wait"] * 3
