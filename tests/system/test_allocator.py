"""Freed memory stays with the process: it is not handed out anew page by page."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rhythm.trainer import setup
from rhythm.trainer.config import TrainConfig

FAULTS = """
import resource, sys, torch
from rhythm.system.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    print(keep_freed_memory())
for _ in range(20):  # the heap grows at first, as alignment leaves gaps
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def said(how: str, **environment: str) -> list[str]:
    """What a process says that allocates 64 MiB ten times: whether memory is kept, and its page faults."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", FAULTS, how]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env={**clean, **environment})
    return run.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_memory_is_kept() -> None:
    (plain,) = said("leave")
    kept, faults = said("keep")
    assert kept == "True"
    assert int(faults) * 4 < int(plain)


def test_what_the_user_set_stays() -> None:
    assert said("keep", MALLOC_TRIM_THRESHOLD_="1000000")[0] == "False"


@pytest.mark.parametrize(("device", "calls"), [("cpu", 1), ("cuda", 0)])
def test_the_engines_of_a_run_ask_for_it_on_a_cpu(device: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[None] = []
    monkeypatch.setattr(setup, "keep_freed_memory", lambda: asked.append(None))
    monkeypatch.setattr(setup, "load_model", lambda *_: SimpleNamespace(device=torch.device(device)))
    for engine in ("GenerateInfer", "TorchTrain"):
        monkeypatch.setattr(setup, engine, lambda *_, **options: None)
    vocabulary = setup.Vocabulary(None, (0,), 0)
    with setup.open_engines(TrainConfig(), None, vocabulary) as build:  # type: ignore[arg-type]
        build(Path("checkpoint"), 0)
    assert len(asked) == calls
