"""A run that is killed and resumed ends like an uninterrupted one; what is killed are real processes."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rhythm.cli.train import main

TIMINGS = ("seconds_", "tokens_per_second", "attention_share")


def start(config: Path, *arguments: str) -> subprocess.Popen[str]:
    """rhythm-train on one thread: two runs of a test compare bit for bit."""
    return subprocess.Popen(
        [sys.executable, "-m", "rhythm.cli.train", str(config), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(config: Path, *arguments: str) -> str:
    """What `start` does to its end, in this process, which has loaded everything; returns its output."""
    root, threads = logging.getLogger(), torch.get_num_threads()
    handlers, level = root.handlers[:], root.level
    torch.set_num_threads(1)
    try:
        with redirect_stdout(io.StringIO()) as said, redirect_stderr(said):
            code = main([str(config), *arguments])
    finally:
        torch.set_num_threads(threads)
        root.handlers[:] = handlers
        root.setLevel(level)
    assert code == 0, said.getvalue()
    return said.getvalue()


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 400
    while not happened():
        assert process.poll() is None, f"ended early: {process.communicate()[0]}"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def metrics(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMINGS)} for row in rows]


def weights_digest(run: Path, step: int) -> str:
    digest = hashlib.sha256()
    for path in sorted((run / "checkpoints" / f"step_{step:06d}").rglob("*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def whole_run(small_config_file: Path) -> Path:
    """The same run, never interrupted."""
    finish(small_config_file, "name=whole")
    return small_config_file.parent / "runs" / "whole"


def lines_written(run: Path, count: int) -> Callable[[], bool]:
    path = run / "metrics.jsonl"
    return lambda: path.is_file() and path.read_text().count("\n") >= count


MOMENTS = {
    "after the first evaluation": lambda run: lines_written(run, 1),
    "between checkpoints": lambda run: lines_written(run, 4),
    "while a checkpoint is written": lambda run: lambda: any((run / "checkpoints").glob(".writing-step_000004")),
    "in a late step": lambda run: lines_written(run, 6),
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_again_and_again_and_resumed_equals_uninterrupted(small_config_file: Path, whole_run: Path) -> None:
    run = whole_run.parent / "killed"
    resume: list[str] = []
    for moment, happens in MOMENTS.items():
        process = start(small_config_file, "name=killed", *resume)
        wait_for(happens(run), process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, moment
        assert not (run / "checkpoints" / "step_000006").exists(), moment
        resume = ["--resume"]

    process = start(small_config_file, "name=killed", *resume)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert metrics(run) == metrics(whole_run)
    assert weights_digest(run, 6) == weights_digest(whole_run, 6)
    assert not list((run / "checkpoints").glob(".writing-*"))
    for samples in sorted((whole_run / "samples").iterdir()):
        assert (run / "samples" / samples.name).read_bytes() == samples.read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_signal_saves_and_leaves(small_config_file: Path, whole_run: Path) -> None:
    run = whole_run.parent / "signals"
    resume: list[str] = []
    for number, code, rows in ((signal.SIGTERM, 143, 2), (signal.SIGINT, 130, 4)):
        process = start(small_config_file, "name=signals", *resume)
        wait_for(lines_written(run, rows), process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=400)
        assert process.returncode == code
        assert f"stopped by {number.name} after step" in output
        assert "--resume" in output
        resume = ["--resume"]
    finish(small_config_file, "name=signals", *resume)
    assert metrics(run) == metrics(whole_run)
    assert weights_digest(run, 6) == weights_digest(whole_run, 6)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_damaged_checkpoint_is_reported_and_passed_over(small_config_file: Path, whole_run: Path) -> None:
    finish(small_config_file, "name=damaged", "steps=4")
    run = whole_run.parent / "damaged"
    newest = next((run / "checkpoints" / "step_000004").rglob("*.safetensors"))
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)
    output = finish(small_config_file, "name=damaged", "--resume")
    assert "step_000004 is damaged" in output
    assert newest.name in output
    assert "continuing after step 2" in output
    assert weights_digest(run, 6) == weights_digest(whole_run, 6)
    assert metrics(run)[-1] == metrics(whole_run)[-1]


def test_an_existing_run_is_not_overwritten(
    small_config_file: Path, whole_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (whole_run / "metrics.jsonl").read_bytes()
    words = [str(small_config_file), "name=whole"]
    assert main(words) == 2
    assert "holds a run: continue it with --resume" in capsys.readouterr().err
    assert main([*words, "optimizer.lr=0.5", "--resume"]) == 2
    assert "optimizer.lr was 0.001, is 0.5" in capsys.readouterr().err
    assert (whole_run / "metrics.jsonl").read_bytes() == before


def test_what_a_run_leaves(whole_run: Path) -> None:
    assert {"config.yaml", "metrics.jsonl", "samples", "checkpoints", "report.html"} <= {
        path.name for path in whole_run.iterdir()
    }
    rows = metrics(whole_run)
    assert [row["step"] for row in rows] == list(range(7))
    assert [row["step"] for row in rows if "accuracy" in row] == [0, 2, 4, 6]
    assert {path.name for path in (whole_run / "checkpoints").iterdir()} == {"step_000004", "step_000006"}
    assert all(
        row["grad_norm"] > 0 for row in rows[1:]
    )  # there was something to learn, so that equal weights mean much
    assert weights_digest(whole_run, 4) != weights_digest(whole_run, 6)
    keys = {"reward", "loss", "clip_share", "entropy", "response_length", "gamma_mean", "gamma_share", "grad_norm"}
    assert keys <= rows[1].keys()
    assert rows[1]["logprob_gap"] < 1e-4  # generation and training agree on the sampled tokens
    timed = json.loads((whole_run / "metrics.jsonl").read_text().splitlines()[1])
    assert all(timed[f"seconds_{phase}"] > 0 for phase in ("rollout", "attention", "training", "total"))
    sample = json.loads((whole_run / "samples" / "step_000006.jsonl").read_text().splitlines()[0])
    assert len(sample["tokens"]) == len(sample["waad"]) == len(sample["fai"]) == len(sample["gamma"])
