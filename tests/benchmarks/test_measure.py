"""Times and memory: rounds are interleaved, ratios are those of a round, memory is that of the call."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

import pytest
import torch

from benchmarks.implementations import Outputs
from benchmarks.measure import PEAK_RESET, TimedCall, Timing, interleaved, peak_extra_bytes, ratio
from benchmarks.shapes import Shape


def test_rounds_are_interleaved_on_the_threads_asked_for() -> None:
    calls: list[tuple[str, int]] = []

    def noting(name: str) -> Callable[[], Outputs]:
        def run() -> Outputs:
            calls.append((name, torch.get_num_threads()))
            return {}

        return run

    before = torch.get_num_threads()
    timings = interleaved({"a": TimedCall(noting("a"), 1), "b": TimedCall(noting("b"), 2)}, rounds=3, least_seconds=0.0)
    warm_up = 2 * [("a", 1)] + 2 * [("b", 2)]
    assert calls == warm_up + 3 * [("a", 1), ("b", 2)]
    assert torch.get_num_threads() == before
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 3, "b": 3}


@pytest.mark.timing
def test_short_calls_are_repeated_and_the_time_is_that_of_one() -> None:
    calls = 0

    def run() -> Outputs:
        nonlocal calls
        calls += 1
        time.sleep(0.002)
        return {}

    timing = interleaved({"a": TimedCall(run, 1)}, rounds=1, least_seconds=0.02)["a"]
    assert 2 + 2 <= calls <= 2 + 10
    assert 0.002 <= timing.median < 0.02


def test_ratio_is_the_median_over_the_rounds() -> None:
    """Round by round 2, 1, 4: the median is 2, although the medians 6 and 4 give 1.5."""
    assert ratio(Timing((2.0, 6.0, 16.0)), Timing((1.0, 6.0, 4.0))) == 2.0
    assert Timing((3.0, 1.0, 2.0)).median == 2.0


@pytest.mark.skipif(not PEAK_RESET.exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("op", ["statistics", "bands"])
def test_peak_memory_is_that_of_the_call(op: str) -> None:
    """T=4096, fp32: packed keys 4096·2·128·4 bytes and four [8, 4096] fp32 results, not a map of 134 MB per head."""
    needed = 4096 * 2 * 128 * 4 + 4 * 8 * 4096 * 4
    measured = peak_extra_bytes(Shape(4096), torch.float32, op, threads=1)
    assert 0.8 * needed < measured < needed + 16e6


@pytest.mark.skipif(not PEAK_RESET.exists(), reason="the peak is read from Linux's /proc")
def test_peak_memory_of_the_eager_map_is_seen() -> None:
    """T=512: a map of 8 heads is 8·512·512·4 bytes, and more than one is alive at a time."""
    assert peak_extra_bytes(Shape(512), torch.float32, "eager", threads=1) > 8 * 512 * 512 * 4


def test_a_failing_process_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        peak_extra_bytes(Shape(64), torch.float32, "no_such_op", threads=1)
    assert "no_such_op" in capfd.readouterr().err
