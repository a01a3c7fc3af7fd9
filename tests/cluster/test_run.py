"""Whole runs by `rhythm-train`: vLLM, Megatron-core on two ranks and Ray, uninterrupted and with processes killed.

What is killed must leave no trace: the same metrics and, bit for bit, the same weights as the uninterrupted run's.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.whole_runs import metrics, rows, weights_digest

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1800)]

CONFIG = Path(__file__).parents[2] / "configs" / "countdown_cluster_cpu.yaml"
TRAIN, INFER = "ray::TrainHost", "ray::InferHost"


def listening(processes: list[psutil.Process]) -> set[str]:
    """Addresses that these processes accept connections on."""
    addresses = set()
    for process in processes:
        try:
            connections = process.net_connections("tcp")
        except psutil.Error:  # ended meanwhile
            continue
        addresses |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    return addresses


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def start(folder: Path, launch: Callable[..., Any]) -> Callable[..., tuple[Any, Path]]:
    """start(name, *arguments, env={}): the shipped run, and its directory."""

    def begin(name: str, *arguments: str, **named: Any) -> tuple[Any, Path]:
        (folder / "countdown_cluster_cpu.yaml").write_text(CONFIG.read_text())
        where = [f"runs_dir={folder / 'runs'}", f"warm_start.cache_dir={folder / 'cache'}"]
        launched = launch(folder / "countdown_cluster_cpu.yaml", f"name={name}", *where, *arguments, **named)
        return launched, folder / "runs" / name

    return begin


@pytest.fixture(scope="module")
def jumping_clock(folder: Path) -> dict[str, str]:
    """Variables with which a process and its children see a wall clock that steps by two days again and again."""
    library = folder / "jumping_clock.so"
    source = Path(__file__).with_name("jumping_clock.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source], check=True, timeout=300)
    env = {"LD_PRELOAD": str(library)}
    clock = subprocess.run([sys.executable, "-c", "import time; print(time.time())"], env=env, capture_output=True,
                           text=True, timeout=300, check=True)  # fmt: skip
    assert abs(float(clock.stdout) - time.time()) > 80_000  # noqa: TID251
    return env


@pytest.fixture(scope="module")
def whole(start: Callable[..., tuple[Any, Path]]) -> Path:
    """The run, uninterrupted. On the way: where its processes listen, that Ray starts no further ones, and that none of
    them stays.
    """
    launched, run = start("whole")
    launched.wait_for(lambda: len(rows(run)) >= 2)
    assert len(launched.processes(TRAIN)) == 2
    assert len(launched.processes(INFER)) == 1
    addresses = listening(launched.processes())
    assert addresses
    assert all(ip.startswith("127.") or ip in ("::1", "::ffff:127.0.0.1") for ip in addresses), addresses
    said = launched.finish()
    for line in ("starting actor_train: 2 of 2 processes", "starting actor_infer: 1 of 1 processes;"):
        assert line in said
    ray_logs = re.search(r"its own logs in (\S+)", said)
    assert ray_logs
    assert len({path.stem.rpartition("_")[2] for path in Path(ray_logs[1]).glob("python-core-worker-*.log")}) == 3
    assert launched.nothing_left()
    return run


def test_the_whole_loop(whole: Path) -> None:
    steps = rows(whole)
    assert [row["step"] for row in steps] == list(range(7))
    assert {path.name for path in (whole / "checkpoints").iterdir()} == {"step_000003", "step_000006"}
    assert weights_digest(whole, 3) != weights_digest(whole, 6)
    assert any(row["grad_norm"] > 0 for row in steps[1:])
    for row in steps[1:]:
        # vLLM's and Megatron's log-probs of the same tokens, after as many pushes as there were steps.
        assert 0 <= row["parity_mean"] <= row["parity_max"] < 1e-3
        assert row["tokens_per_second_train"] > 0
        assert row["tokens_per_second_infer"] > 0
        assert 0 < row["idle_share_train"] < 1
        assert 0 < row["idle_share_infer"] < 1
        assert 0 < row["attention_share"] < 0.5
        assert row["seconds_push"] > 0
        assert (row["restarts_train"], row["restarts_infer"], row["rewards_late"]) == (0, 0, 0)
        assert row["gamma_mean"] > 1
    assert (whole / "report.html").is_file()
    logs = {path.name: path.read_text() for path in (whole / "logs").iterdir()}
    assert set(logs) == {"actor_train-0.log", "actor_train-1.log", "actor_infer-0.log"}
    assert all(text.startswith("--- process ") for text in logs.values())
    assert "vllm" in logs["actor_infer-0.log"]


def test_dynamic_sampling_and_importance_correction(start: Callable[..., tuple[Any, Path]]) -> None:
    """Masked where the ratio is above 1, which rounding makes about half of the tokens. The trainer is the one that
    starts soonest; what is drawn and what is corrected is decided before it.
    """
    correction = ("correction.mode=token_mask", "correction.high=1.0")
    trainer = ("cluster.train.engine=torch", "cluster.train.tensor=1")
    launched, run = start("corrected", "steps=2", "batch.extra_rounds=2", *correction, *trainer)
    launched.finish()
    steps = rows(run)[1:]
    assert len(steps) == 2
    for row in steps:
        again = row["drawn_groups"] - 8
        assert (row["extra_rounds"] > 0) == (again > 0)
        assert row["zero_variance_share"] <= row["drawn_zero_variance_share"]
        assert 0.2 < row["corrected_share"] < 0.8
        assert 1 < row["rollout_ratio_max"] < 1.001
        assert row["parity_max"] < 1e-3
    assert any(row["zero_variance_share"] < row["drawn_zero_variance_share"] for row in steps)
    assert any(row["grad_norm"] > 0 for row in steps)
    assert launched.nothing_left()


def test_a_killed_rank_sends_the_run_back_to_its_checkpoint_and_a_killed_driver_leaves_nothing_and_resumes(
    whole: Path, start: Callable[..., tuple[Any, Path]], jumping_clock: dict[str, str]
) -> None:
    """The checkpoint has been removed when the rank is killed: the way back is to the start. What is resumed sees a
    wall clock that jumps.
    """
    launched, run = start("killed")
    launched.wait_for(lambda: (run / "checkpoints" / "step_000003").is_dir())
    shutil.rmtree(run / "checkpoints")
    launched.processes(TRAIN)[1].send_signal(signal.SIGKILL)
    launched.wait_for(lambda: len(rows(run)) >= 5 and (run / "checkpoints" / "step_000003").is_dir())
    launched.process.send_signal(signal.SIGKILL)
    launched.process.wait()
    killed = launched
    assert "actor_train[" in killed.output
    assert "going back to step 0: restart 1 of at most 3" in killed.output
    assert not (run / "checkpoints" / "step_000006").exists()
    done = len(rows(run))
    assert done >= 5
    assert metrics(run) == metrics(whole)[:done]
    launched, run = start("killed", "--resume", env=jumping_clock)
    assert "continuing after step 3" in launched.finish()
    assert killed.nothing_left(seconds=180)  # two idle agents of Ray's look for its control process for a minute
    assert metrics(run) == metrics(whole)
    assert not any(row["restarts_train"] or row["restarts_infer"] for row in rows(run)[4:])
    assert weights_digest(run, 6) == weights_digest(whole, 6)
    assert launched.nothing_left()


def test_a_resumed_run_outlives_the_checkpoint_it_began_from(
    whole: Path, folder: Path, start: Callable[..., tuple[Any, Path]]
) -> None:
    run = folder / "again" / "whole"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "step_000006")
    sizes = ("checkpoint.every_steps=1", "checkpoint.keep=1")
    launched, _ = start("whole", f"runs_dir={run.parent}", *sizes, "--resume")
    launched.wait_for(lambda: (run / "checkpoints" / "step_000004").is_dir())
    launched.processes(INFER)[0].send_signal(signal.SIGKILL)
    launched.wait_for(lambda: len(rows(run)) >= 6)
    assert not (run / "checkpoints" / "step_000003").exists()
    assert rows(run)[-1]["restarts_infer"] == 1
    launched.processes(TRAIN)[1].send_signal(signal.SIGKILL)
    output = launched.finish()
    assert "continuing after step 3" in output
    assert re.search("going back to step [45]: restart 1 of at most 3", output)
    assert rows(run)[-1]["restarts_train"] == 1
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000006"]
    assert metrics(run) == metrics(whole)
    assert weights_digest(run, 6) == weights_digest(whole, 6)
    assert launched.nothing_left()


def test_engines_that_disagree_stop_the_run_with_both_numbers(start: Callable[..., tuple[Any, Path]]) -> None:
    # Of engines that start soon: one keeps keys and values as it generates, the other doesn't.
    engines = ("cluster.infer.engine=transformers", "cluster.train.engine=torch", "cluster.train.tensor=1")
    launched, run = start("disagreeing", "cluster.parity.threshold=1e-12", "evaluation.instances=1", *engines)
    output = launched.finish(code=5)
    assert "log-probs of actor_infer and actor_train differ by" in output
    assert "by actor_infer" in output
    assert "by actor_train" in output
    assert len(rows(run)) == 1
    assert launched.nothing_left()


def test_ctrl_c_with_a_third_role_saves_and_leaves(whole: Path, start: Callable[..., tuple[Any, Path]]) -> None:
    launched, run = start("separate", "signals.source=separate")
    launched.wait_for(lambda: len(rows(run)) >= 3)
    launched.process.send_signal(signal.SIGINT)
    launched.finish(code=130)
    steps = rows(run)
    assert (run / "checkpoints" / f"step_{steps[-1]['step']:06.0f}").is_dir()
    assert launched.nothing_left()
    # Same seed, same rollouts: actor_attn's model gives the numbers that Megatron's two ranks give.
    for row, inline in zip(steps[1:], rows(whole)[1:], strict=False):
        for name in ("reward", "gamma_mean", "gamma_share", "waad_mean", "fai_mean"):
            assert row[name] == pytest.approx(inline[name], rel=1e-5), name
        assert row["tokens_per_second_attn"] > 0
        assert row["attention_share"] > 0
