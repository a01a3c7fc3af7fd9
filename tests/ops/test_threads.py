"""The CPU kernels if the system starts fewer threads than requested."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rhythm import attention_statistics
from rhythm.ops.backends import cpu

CODE = """
import resource, torch, rhythm

generator = torch.Generator().manual_seed(0)
q, k = torch.randn(3000, 4, 64, generator=generator), torch.randn(3000, 2, 64, generator=generator)
torch.set_num_threads(1)
expected = rhythm.attention_statistics(q, k, prompt_lens=[40], backend="cpu")
lines = dict(line.split(":") for line in open("/proc/self/status").read().splitlines())
size = int(lines["VmSize"].split()[0]) * 1024
torch.set_num_threads(64)
for room in ({rooms}):
    resource.setrlimit(resource.RLIMIT_AS, (size + room, resource.getrlimit(resource.RLIMIT_AS)[1]))
    actual = rhythm.attention_statistics(q, k, prompt_lens=[40], backend="cpu")
    for name in ("span", "waad", "fai", "lse"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True)
    print("equal")
"""


def run(rooms: str, stack: int, hard: int) -> subprocess.CompletedProcess[str]:
    """A process whose threads take `stack` bytes of address space each, and little more is left."""
    # The C library takes a new thread's stack size from this limit as a process starts.
    set_stack = f"resource.setrlimit(resource.RLIMIT_STACK, ({stack}, {hard}))"
    code = CODE.format(rooms=rooms)
    start = f"import os, resource, sys; {set_stack}; os.execv(sys.executable, [sys.executable, '-c', {code!r}])"
    return subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, check=False)


def test_threads_that_cannot_be_started_are_done_without() -> None:
    """With room for two more threads, then for none: the same bits, computed by the threads that started."""
    gib = 1 << 30
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    stack = gib if hard == resource.RLIM_INFINITY else hard
    done = run(f"{2 * stack + stack // 2}, {stack // 2}", stack, hard)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "equal\nequal\n"


@pytest.mark.parametrize(
    ("lens", "options", "expected"),
    [([30] * 64, {}, 1), ([2000], {}, 4), ([2000], {"sliding_window": 8}, 1), ([700], {}, 3), ([0, 0], {}, 1)],
)
def test_little_work_starts_no_thread(
    lens: list[int], options: dict[str, Any], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    own = cpu._C
    assert own is not None

    def spied(**arguments: Any) -> None:
        seen.append(arguments["threads"])
        own.attention_statistics(**arguments)

    monkeypatch.setattr(cpu, "_C", SimpleNamespace(attention_statistics=spied, to_the_end=own.to_the_end))
    cu_seqlens = torch.tensor([0, *lens]).cumsum(0).int()
    q, k = torch.randn(sum(lens), 4, 64), torch.randn(sum(lens), 2, 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        attention_statistics(q, k, cu_seqlens=cu_seqlens, backend="cpu", **options)
    finally:
        torch.set_num_threads(threads)
    assert seen == [expected]


IDLE = """
import time, torch, rhythm

def calls(threads):
    torch.set_num_threads(threads)
    before = time.process_time()
    for _ in range(5):
        rhythm.attention_statistics(q, k, prompt_lens=[40], backend="cpu")
    return time.process_time() - before

generator = torch.Generator().manual_seed(0)
q, k = torch.randn(3000, 4, 64, generator=generator), torch.randn(3000, 2, 64, generator=generator)
calls(1)
one, many = (min(calls(threads) for _ in range(3)) for threads in (1, 8))
torch.set_num_threads(2)
rhythm.attention_statistics(q, k, prompt_lens=[40], backend="cpu")
before = time.process_time()
time.sleep(0.5)
print(one, many, time.process_time() - before)
"""


@pytest.mark.timing
def test_threads_that_wait_use_no_cpu_time() -> None:
    """Eight threads for few cores spend what one does; nothing runs after a call, where two of libgomp's spin."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run([sys.executable, "-c", IDLE], capture_output=True, text=True, check=True, env=environment)
    one, many, idle = map(float, done.stdout.split())
    assert many < 1.5 * one
    assert idle < 0.002
