"""The three roles over real processes, with the one-machine engines in them: the same results as one process gives,
and what is killed is started again with the right weights.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch
from cluster_case import PROMPTS, SAMPLING, TAP, Cluster, start_train, start_weight_sync
from paper_workload import WORK

from rhythm.cluster.config import ClusterConfig
from rhythm.cluster.errors import LostError, RemoteError, TrainLostError
from rhythm.cluster.plan.dimensions import KNOWN
from rhythm.cluster.plan.memory import GIB
from rhythm.cluster.plan.timeline import peak, replay
from rhythm.cluster.roles import Role
from rhythm.engines.interfaces import NonFiniteError, Rollout, SamplingConfig
from rhythm.engines.local.attn import ObserveAttn
from rhythm.tiny import model as tiny_model
from rhythm.tiny.model import TinyModelConfig, build_model, build_tokenizer
from rhythm.trainer.checkpoint import RunState, find_damage, save_checkpoint

if TYPE_CHECKING:  # they import Ray, whose environment has to be prepared first
    from rhythm.cluster.rpc import Worker

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    tokenizer = build_tokenizer()
    tiny = TinyModelConfig(layers=6, hidden_size=32, mlp_size=48, query_heads=2, key_heads=1, head_size=16)
    tiny_model.save_checkpoint(build_model(tiny, tokenizer), tokenizer, directory)
    return directory


@pytest.fixture(scope="module")
def running(checkpoint: Path) -> Iterator[Cluster]:
    from rhythm.cluster.engines import ClusterAttn, ClusterInfer
    from rhythm.cluster.session import Session
    from rhythm.cluster.specs import AttnSpec, InferSpec
    from rhythm.cluster.utilization import Rates

    config = ClusterConfig.model_validate(
        {
            "gpus": 0,
            "max_length": 1024,
            "object_store_mib": 80,
            "infer": {"engine": "transformers", "replicas": 2},
            "train": {"engine": "torch"},
            "attn": {"replicas": 2},
            "deadlines": {"generate": 600, "start": 900, "log_probs": 600, "step": 600, "push": 600},
            "max_restarts": 4,
        }
    )
    tokenizer = build_tokenizer()
    with Session(config, separate_attn=True) as session:
        session.logs = checkpoint / "logs"
        rates = Rates({Role.TRAIN: 1, Role.INFER: 2, Role.ATTN: 2})
        train = start_train(session, rates, checkpoint)
        end_ids, pad_id = (tokenizer.eos_token_id,), tokenizer.pad_token_id
        infer = ClusterInfer(
            session, InferSpec(None, checkpoint, 1024, end_ids, pad_id, "float32"), rates, takes_turns=False
        )
        attn = ClusterAttn(session, AttnSpec(checkpoint, TAP, 4, "float32"), rates)
        weight_sync = start_weight_sync(train, infer, attn, rates)
        cluster = Cluster(session, rates, train, infer, attn, weight_sync, checkpoint, end_ids, pad_id)
        yield cluster
        mine = [worker.pid for role in (cluster.train.ranks, infer.workers, attn.workers) for worker in role]
    deadline = time.monotonic() + 120
    while any(psutil.pid_exists(pid) for pid in mine if pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not [p for p in psutil.Process().children(recursive=True) if "ray" in " ".join(p.cmdline())]


@pytest.fixture
def cluster(running: Cluster) -> Cluster:
    """The cluster, reset: the trainer's weights in every replica, and no restarts counted."""
    running.rates.restarts.clear()
    running.push()
    running.rates.restarts.clear()
    return running


@pytest.fixture
def before_each_call(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Worker, str], None]], None]:
    """before_each_call(watch): watch(process, method) comes before every call to a process of the cluster."""
    from rhythm.cluster.rpc import Worker

    def begin(watch: Callable[[Worker, str], None]) -> None:
        for name in ("submit", "stream"):
            inner = getattr(Worker, name)

            def watched(worker: Worker, method: str, *arguments: Any, inner: Callable[..., Any] = inner) -> Any:
                watch(worker, method)
                return inner(worker, method, *arguments)

            monkeypatch.setattr(Worker, name, watched)

    return begin


def kill_before(victim: Worker, worker: Worker, method: str, number: int) -> Callable[[Worker, str], None]:
    """For before_each_call: `victim` is dead when `worker` is asked for `method` for the `number`th time."""
    asked: list[str] = []

    def watch(whose: Worker, what: str) -> None:
        if whose is worker and what == method:
            asked.append(what)
            if len(asked) == number:
                os.kill(victim.pid, signal.SIGKILL)
                assert not psutil.wait_procs([psutil.Process(victim.pid)], timeout=120)[1]

    return watch


def equal(a: Rollout, b: Rollout) -> bool:
    names = ("input_ids", "response_mask", "group", "finished", "prompt_lens")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names) and torch.allclose(
        a.logprobs, b.logprobs, atol=1e-6
    )


def test_replicas_share_the_prompts_in_order(cluster: Cluster) -> None:
    actual = cluster.infer.generate(PROMPTS, 3, SAMPLING, seed=7)
    assert actual.group.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [row[:n].tolist() for row, n in zip(actual.input_ids, actual.prompt_lens, strict=True)] == [
        prompt for prompt in PROMPTS for _ in range(3)
    ]
    alone = cluster.local_infer().generate(PROMPTS[:2], 3, SAMPLING, seed=7)
    width = alone.input_ids.shape[1]
    assert torch.equal(actual.input_ids[:6, :width], alone.input_ids)  # the first replica draws as a single engine
    assert torch.allclose(actual.logprobs[:6, :width], alone.logprobs, atol=1e-6)
    assert equal(actual, cluster.infer.generate(PROMPTS, 3, SAMPLING, seed=7))
    assert not torch.equal(actual.input_ids[:3], actual.input_ids[6:9])


def test_a_push_reaches_every_replica(cluster: Cluster) -> None:
    before = cluster.train.weights()
    rollout = cluster.infer.generate(PROMPTS, 4, SAMPLING, seed=1)
    metrics = cluster.train.step(cluster.batch(rollout))
    assert metrics.grad_norm > 0
    assert any(not torch.equal(before[name], now) for name, now in cluster.train.weights().items())
    stale = cluster.infer.generate(PROMPTS, 4, SAMPLING, seed=2)
    gap = (stale.logprobs - cluster.train.log_probs(stale)[0].logprobs)[stale.response_mask].abs()
    assert gap.mean() > 1e-3
    version = cluster.push()
    assert cluster.infer.version == cluster.attn.version == version
    fresh = cluster.infer.generate(PROMPTS, 4, SAMPLING, seed=2)
    gap_B = (fresh.logprobs - cluster.train.log_probs(fresh)[0].logprobs).nan_to_num().abs().amax(dim=1)
    assert gap_B.max() < 1e-4  # over the rows of all replicas
    with pytest.raises(RemoteError, match=f"version is {version - 1}: must not be lower than {version}"):
        cluster.weight_sync.sync(version - 1)
    assert cluster.push() == version + 1


def test_roles_on_the_same_gpus_take_turns(
    cluster: Cluster,
    before_each_call: Callable[[Callable[[Worker, str], None]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The calls of two steps, one with a pass of the trainer after the push, replayed on a GPU of 80 GiB."""
    calls: list[tuple[Role, str]] = []

    def watch(worker: Worker, method: str) -> None:
        if worker.role is not Role.ATTN and calls[-1:] != [(worker.role, method)]:
            calls.append((worker.role, method))

    before_each_call(watch)
    monkeypatch.setattr(cluster.infer, "_takes_turns", True)
    monkeypatch.setattr(cluster.train, "before_work", cluster.infer.leave_gpu)
    first = cluster.infer.generate(PROMPTS, 4, SAMPLING, seed=8)
    batch = cluster.batch(first)
    for _ in range(2):
        cluster.train.step(batch)
    cluster.push()
    second = cluster.infer.generate(PROMPTS, 4, SAMPLING, seed=8)
    assert not torch.equal(first.logprobs, second.logprobs)
    cluster.train.log_probs(second)
    assert equal(cluster.infer.generate(PROMPTS, 4, SAMPLING, seed=8), second)  # weights it had to be sent again

    named = [method for _, method in calls]
    push = ["open_sender", "init_transfer", "connect", "leave_gpu", "start_push", "begin_push", "stage", "receive",
            "transmit", "end_push", "finish_push"]  # fmt: skip
    turns = [name for name in named if name not in push]
    assert turns == ["wake", "generate", "sleep", "log_probs", "step", "wake", "generate", "sleep", "log_probs", "wake",
                     "generate"]  # fmt: skip
    for at, name in enumerate(named):
        if name == "wake" and at:
            assert named[at - 1] == "finish_push"
        if name == "start_push":
            assert named[at - 1] == "leave_gpu"
    config = ClusterConfig.model_validate(
        {"train": {"data": 8}, "infer": {"replicas": 8, "gpu_memory_utilization": 0.5}, "push_bucket_mib": 1024}
    )
    moments = list(replay(named, config, WORK, KNOWN["qwen3-4b"]))
    assert max(moment.total for moment in moments) == peak(config, WORK, KNOWN["qwen3-4b"]).total < 80 * GIB
    late = [name for name in named if name != "leave_gpu"]
    assert max(moment.total for moment in replay(late, config, WORK, KNOWN["qwen3-4b"])) > 80 * GIB


def test_a_replica_lost_while_it_goes_to_sleep_leaves_none_awake(
    cluster: Cluster,
    before_each_call: Callable[[Callable[[Worker, str], None]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The one started in its place has to be sent weights, which wakes the other."""
    honest = cluster.infer.generate(PROMPTS, 2, SAMPLING, seed=8)
    last: dict[Worker, str] = {}
    monkeypatch.setattr(cluster.infer, "_takes_turns", True)
    before_each_call(last.__setitem__)
    lost, kept = cluster.infer.workers[1], cluster.infer.workers[0]
    before_each_call(kill_before(lost, lost, "sleep", 1))
    cluster.infer.leave_gpu()
    assert cluster.rates.restarts[Role.INFER] == 1
    assert cluster.infer.workers[0] is kept
    assert [last[worker] for worker in cluster.infer.workers] == ["sleep", "sleep"]
    assert equal(cluster.infer.generate(PROMPTS, 2, SAMPLING, seed=8), honest)


def test_signals_and_shared_head_groups_are_those_of_one_engine(cluster: Cluster) -> None:
    rollout = cluster.infer.generate(PROMPTS, 4, SAMPLING, seed=3)
    alone = ObserveAttn(cluster.model(), TAP, micro_batch_size=4).signals(rollout)
    actual = cluster.attn.signals(rollout)
    for name in ("waad", "fai", "span"):
        assert torch.allclose(getattr(actual, name), getattr(alone, name), atol=1e-6, equal_nan=True), name
    assert torch.equal(actual.groups.local, alone.groups.local.expand_as(actual.groups.local))
    assert torch.equal(actual.groups.global_, alone.groups.global_.expand_as(actual.groups.global_))
    inline = cluster.train.log_probs(rollout, TAP)[1]
    assert torch.allclose(actual.waad, inline.waad, atol=1e-6, equal_nan=True)


def test_an_exception_there_comes_with_its_traceback(cluster: Cluster) -> None:
    with pytest.raises(RemoteError) as caught:
        cluster.infer.generate([[1], []], 2, SAMPLING, seed=0)
    message = str(caught.value)
    said = "ValueError: prompts: must contain at least one prompt, and none may be empty"
    log = cluster.session.logs / "actor_infer-1.log"
    assert message == f"actor_infer.generate: actor_infer[1] failed: {said}\n(the traceback is in {log})"
    written = log.read_text()
    assert written.startswith("--- process ")
    assert said in written
    assert 'infer.py", line ' in written
    cluster.infer.generate(PROMPTS, 2, SAMPLING, seed=0)  # and it still serves


def test_a_loss_that_is_not_finite_is_the_drivers_to_report(cluster: Cluster) -> None:
    batch = cluster.batch(cluster.infer.generate(PROMPTS, 4, SAMPLING, seed=4))
    poisoned = replace(batch, advantages=batch.advantages.masked_fill(batch.rollout.response_mask, torch.nan))
    with pytest.raises(NonFiniteError) as caught:
        cluster.train.step(poisoned)
    assert caught.value.batch is poisoned


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_replica_lost_mid_rollout_is_started_again_with_the_weights_of_the_version(
    how: signal.Signals,
    cluster: Cluster,
    cpu_seconds: Callable[[int], float],
    lost_midway: Callable[..., AbstractContextManager[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed, or stopped so that it misses its deadline, which is what the call takes undisturbed, several times."""
    left: list[int] = []
    monkeypatch.setattr(cluster.infer, "make_room", lambda: left.append(cluster.infer.workers.index(lost)))
    long = SamplingConfig(max_new_tokens=400)
    lost, kept = cluster.infer.workers[1], cluster.infer.workers[0]
    spent, started = cpu_seconds(lost.pid), time.monotonic()
    honest = cluster.infer.generate(PROMPTS, 8, long, seed=5)
    if how is signal.SIGSTOP:
        enough = 10 + 4 * (time.monotonic() - started)
        deadlines = cluster.session.config.deadlines.model_copy(update={"generate": enough})
        config = cluster.session.config.model_copy(update={"deadlines": deadlines})
        monkeypatch.setattr(cluster.session, "config", config)
    with lost_midway(lost.pid, how, cpu_seconds(lost.pid) - spent):
        actual = cluster.infer.generate(PROMPTS, 8, long, seed=5)
    assert cluster.rates.restarts[Role.INFER] == 1
    assert cluster.infer.workers[0] is kept
    assert cluster.infer.workers[1] is not lost
    assert left == [1]  # the trainer left the GPU before the replica was built again
    assert equal(actual, honest)


def test_a_replica_lost_in_the_middle_of_a_push_leaves_none_with_half_of_it(
    cluster: Cluster, before_each_call: Callable[[Callable[[Worker, str], None]], None]
) -> None:
    rollout = cluster.infer.generate(PROMPTS, 4, SAMPLING, seed=6)
    cluster.train.step(cluster.batch(rollout))
    receivers = [*cluster.infer.workers, *cluster.attn.workers]
    lost = cluster.attn.workers[0]
    before_each_call(kill_before(lost, lost, "receive", 3))
    version = cluster.push()
    assert cluster.rates.restarts == {Role.ATTN: 1}
    assert not {*receivers} & {*cluster.infer.workers, *cluster.attn.workers}
    assert cluster.infer.version == cluster.attn.version == version
    actual = cluster.attn.signals(rollout)
    alone = ObserveAttn(cluster.model(), TAP, micro_batch_size=4).signals(rollout)
    assert torch.allclose(actual.waad, alone.waad, atol=1e-6, equal_nan=True)
    fresh = cluster.infer.generate(PROMPTS, 4, SAMPLING, seed=6)
    gap = (fresh.logprobs - cluster.train.log_probs(fresh)[0].logprobs)[fresh.response_mask].abs()
    assert gap.max() < 1e-4


def test_rates_of_a_step(cluster: Cluster) -> None:
    cluster.rates.clear()
    cluster.rates.restarted(Role.ATTN)
    started = time.perf_counter()
    rollout = cluster.infer.generate(PROMPTS, 4, SAMPLING, seed=8)
    cluster.train.log_probs(rollout)
    cluster.attn.signals(rollout)
    taken = cluster.rates.pop_metrics(time.perf_counter() - started)
    for role in Role:
        assert taken[f"tokens_per_second_{role}"] > 0
        assert 0 < taken[f"idle_share_{role}"] < 1
    assert 0 < taken["attention_share"] < 1
    assert taken["restarts_attn"] == 1


def test_restarts_have_an_end(cluster: Cluster) -> None:
    cluster.rates.restarts[Role.INFER] = 4
    os.kill(cluster.infer.workers[0].pid, signal.SIGKILL)
    with pytest.raises(LostError, match=r"after cluster\.max_restarts = 4 restarts: actor_infer\[0\] died"):
        cluster.infer.generate(PROMPTS, 2, SAMPLING, seed=0)


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk needs root")
def test_no_room_for_a_checkpoint(cluster: Cluster, small_disk: Path) -> None:
    """A disk that is full: the checkpoint before stays, and with room the next one is whole."""
    checkpoints = small_disk / "checkpoints"
    save_checkpoint(checkpoints, RunState(step=2), cluster.train.save, keep=2)
    before = cluster.train.weights()
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 100_000))
    cluster.train.step(cluster.batch(cluster.infer.generate(PROMPTS, 4, SAMPLING, seed=7)))
    with pytest.raises(OSError, match="No space left") as caught:
        save_checkpoint(checkpoints, RunState(step=4), cluster.train.save, keep=2)
    assert caught.value.errno == errno.ENOSPC
    assert str(caught.value.filename).startswith(str(checkpoints))
    assert [path.name for path in checkpoints.iterdir()] == ["step_000002"]
    ballast.unlink()
    stepped = cluster.train.weights()
    saved = save_checkpoint(checkpoints, RunState(step=4), cluster.train.save, keep=2)
    for path, weights in ((checkpoints / "step_000002", before), (saved, stepped)):
        assert find_damage(path) is None
        cluster.train.load(path)
        assert all(torch.equal(weights[name], now) for name, now in cluster.train.weights().items())
    assert any(not torch.equal(before[name], now) for name, now in stepped.items())


def test_a_trainer_lost_in_a_push_is_an_error_of_its_own_and_another_takes_its_place(
    cluster: Cluster, before_each_call: Callable[[Callable[[Worker, str], None]], None]
) -> None:
    """The replicas raise, since the bucket that they are to receive is gone with it."""
    (lost,) = cluster.train.ranks
    before_each_call(kill_before(lost, cluster.infer.workers[0], "receive", 2))
    with pytest.raises(TrainLostError, match=r"push: actor_train\[0\] died"):
        cluster.push()
    cluster.train = start_train(cluster.session, cluster.rates, cluster.checkpoint)
    cluster.weight_sync = start_weight_sync(cluster.train, cluster.infer, cluster.attn, cluster.rates)
    cluster.push()
    assert cluster.train.ranks[0].pid != lost.pid
    rollout = cluster.infer.generate(PROMPTS, 2, SAMPLING, seed=9)
    gap = (rollout.logprobs - cluster.train.log_probs(rollout)[0].logprobs)[rollout.response_mask].abs()
    assert gap.max() < 1e-4
