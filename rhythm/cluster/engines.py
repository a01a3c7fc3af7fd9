"""Implements Train, Infer and Attn over groups of processes; lost replicas are restarted with current weights."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from rhythm.cluster.errors import LostError, TrainLostError
from rhythm.cluster.roles import Role
from rhythm.cluster.rpc import Worker, call, collect
from rhythm.cluster.session import Session
from rhythm.cluster.specs import AttnSpec, InferSpec, NotFinite, Reply, TrainSpec
from rhythm.cluster.utilization import Rates
from rhythm.credit.heads import HeadGroups, shared_heads
from rhythm.credit.signals import RhythmSignals
from rhythm.engines.batches import concatenate, take_rows
from rhythm.engines.interfaces import (
    LogProbs,
    NonFiniteError,
    Rollout,
    SamplingConfig,
    ShapeAdvantages,
    StepMetrics,
    TappedStep,
    TrainBatch,
)
from rhythm.seeds import derive_seed
from rhythm.tap.signals_config import SignalsConfig

log = logging.getLogger(__name__)

Spec = TypeVar("Spec")


class ClusterTrain:
    """actor_train: every rank is called with the same arguments; rank 0 returns the result.

    before_work: called before what takes GPU memory for more than weights; set where actor_infer has the same GPUs.

    Every method raises TrainLostError when a rank is lost; the other ranks are killed then.
    """

    def __init__(self, session: Session, spec: TrainSpec, rates: Rates) -> None:
        self._session = session
        self._deadlines = session.config.deadlines
        self._rates = rates
        self.statistics_seconds = 0.0
        self.before_work: Callable[[], None] = _nothing
        try:
            self.ranks = session.start(Role.TRAIN)
        except LostError as error:
            raise TrainLostError("starting actor_train", error.lost) from error
        (address, port), *_ = self.ask("free_endpoint", seconds=self._deadlines.start, ranks=self.ranks[:1])
        self._each(
            [("build", spec, rank, address, port) for rank in range(len(self.ranks))],
            seconds=self._deadlines.start,
            task="building actor_train",
        )

    def log_probs(
        self, rollout: Rollout, tap: SignalsConfig | None = None, groups: HeadGroups | None = None
    ) -> tuple[LogProbs, RhythmSignals | None]:
        """See rhythm.engines.interfaces.Train."""
        self.before_work()
        (log_probs, signals, seconds), *_ = self.ask(
            "log_probs", rollout, tap, groups, seconds=self._deadlines.log_probs, tokens=int(rollout.lens.sum())
        )
        self._rates.statistics += seconds
        self.statistics_seconds = seconds
        return log_probs, signals

    def reference_log_probs(self, rollout: Rollout) -> Tensor:
        """See rhythm.engines.interfaces.Train."""
        self.before_work()
        tokens = int(rollout.lens.sum())
        logprobs: Tensor = self.ask("reference_log_probs", rollout, seconds=self._deadlines.log_probs, tokens=tokens)[0]
        return logprobs

    def step(self, batch: TrainBatch) -> StepMetrics:
        """See rhythm.engines.interfaces.Train."""
        self.before_work()
        tokens = int(batch.rollout.lens.sum())
        metrics: StepMetrics | NotFinite = self.ask("step", batch, seconds=self._deadlines.step, tokens=tokens)[0]
        if isinstance(metrics, NotFinite):
            raise NonFiniteError(metrics.what, metrics.value, batch)
        return metrics

    def tapped_step(self, batch: TrainBatch, tap: SignalsConfig | None, shape: ShapeAdvantages) -> TappedStep:
        """See rhythm.engines.interfaces.TappedTrain. `shape` is pickled and called in actor_train's processes."""
        self.before_work()
        tokens = int(batch.rollout.lens.sum())
        reply = self.ask("tapped_step", batch, tap, shape, seconds=self._deadlines.step, tokens=tokens)[0]
        if isinstance(reply, NotFinite):
            raise NonFiniteError(reply.what, reply.value, batch)
        taken: TappedStep
        taken, self.statistics_seconds = reply
        self._rates.statistics += self.statistics_seconds
        return taken

    def weights(self) -> dict[str, Tensor]:
        """See rhythm.engines.interfaces.Train. Copies all weights to the driver, which a weight sync doesn't do."""
        weights: dict[str, Tensor] = self.ask("weights", seconds=self._deadlines.push)[0]
        return weights

    def weights_stream(self) -> Iterator[tuple[str, Tensor]]:
        """See rhythm.engines.interfaces.Train. Copies all weights to the driver, like `weights`."""
        return iter(self.weights().items())

    def save(self, directory: Path) -> None:
        """See rhythm.engines.interfaces.Train."""
        self.before_work()
        self.ask("save", directory.resolve(), seconds=self._deadlines.checkpoint)

    def load(self, directory: Path) -> None:
        """See rhythm.engines.interfaces.Train."""
        self.before_work()
        self.ask("load", directory.resolve(), seconds=self._deadlines.checkpoint)

    def leave_gpu(self, seconds: float | None = None) -> None:
        """See rhythm.engines.interfaces.LeavesGpu, of every rank; whether they offload is cluster.train.offload."""
        self.ask("leave_gpu", seconds=self._deadlines.push if seconds is None else seconds)

    def ask(
        self, method: str, *arguments: Any, seconds: float, tokens: int = 0, ranks: Sequence[Worker] | None = None
    ) -> list[Any]:
        """Call a method on all ranks, or on `ranks`; returns their results in order."""
        workers = self.ranks if ranks is None else ranks
        return self._each(
            [(method, *self._session.shared(arguments))] * len(workers),
            seconds=seconds,
            task=f"actor_train.{method}",
            tokens=tokens,
            workers=workers,
        )

    def _each(
        self,
        calls: Sequence[tuple[Any, ...]],
        *,
        seconds: float,
        task: str,
        tokens: int = 0,
        workers: Sequence[Worker] | None = None,
    ) -> list[Any]:
        workers = self.ranks if workers is None else workers
        started = time.perf_counter()
        pending = {worker: worker.submit(*arguments) for worker, arguments in zip(workers, calls, strict=True)}
        outcome = collect(pending, seconds, task, together=True)
        if outcome.lost:
            self.give_up(task, outcome.lost)
        for reply in outcome.replies.values():
            self._rates.worked(Role.TRAIN, reply.seconds)
        if tokens:
            self._rates.processed(Role.TRAIN, tokens, time.perf_counter() - started)
        return [outcome.replies[worker].value for worker in workers]

    def give_up(self, task: str, lost: Mapping[Worker, str]) -> None:
        """Kill the remaining ranks and raise TrainLostError."""
        self._session.stop(self.ranks)
        raise TrainLostError(task, {worker.name: why for worker, why in lost.items()})


class Replicas(Generic[Spec]):
    """Processes of a role that can be lost and restarted independently of each other.

    refill: sends the trainer's weights to the role's replicas again, after a restart or after they were dropped;
    make_room: called before replicas start again, which needs the memory that the trainer has cached; both are set by
    the weight sync. has_weights: whether the replicas have the weights of `version`.
    """

    def __init__(self, session: Session, role: Role, spec: Spec, rates: Rates) -> None:
        self._session = session
        self._role = role
        self._spec = spec
        self._rates = rates
        self.workers: list[Worker] = session.start(role)
        self.version = 0
        self.has_weights = True
        self.refill: Callable[[], None] = _nothing
        self.make_room: Callable[[], None] = _nothing
        self._build(range(len(self.workers)))

    def call_each(
        self,
        calls: Mapping[int, tuple[Any, ...]],
        *,
        seconds: float,
        each: Callable[[int, Any], None] | None = None,
        restart: bool = True,
    ) -> dict[int, Any]:
        """Make these calls, by replica index; a lost replica is restarted and its call repeated. `each`: called with
        index and value of each part of an answer that comes in parts.

        Raises LostError once replicas of the role were restarted more than cluster.max_restarts times; without
        `restart` TrainLostError for the first one.
        """
        results: dict[int, Any] = {}
        begin = Worker.submit if each is None else Worker.stream

        def take(worker: Worker, part: Any) -> None:
            if each is not None:
                each(self.workers.index(worker), part)

        while left := {index: calls[index] for index in calls if index not in results}:
            task = f"{self._role.actor}.{next(iter(left.values()))[0]}"
            pending = {self.workers[index]: begin(self.workers[index], *call) for index, call in left.items()}
            outcome = collect(pending, seconds, task, each=take)
            for index in left:
                reply: Reply | None = outcome.replies.get(self.workers[index])
                if reply is not None:
                    results[index] = reply.value
                    self._rates.worked(self.workers[index].role, reply.seconds)
            if outcome.lost and not restart:
                raise TrainLostError(f"{task} ahead", {worker.name: why for worker, why in outcome.lost.items()})
            if outcome.lost:
                self.replace(task, outcome.lost)
                self.refill()
        return results

    def replace(self, task: str, lost: Mapping[Worker, str], *, everyone: bool = False) -> None:
        """Restart the lost replicas, or all of them with `everyone`, with the weights the run started from.

        Raises LostError once replicas of the role were restarted more than cluster.max_restarts times.
        """
        allowed = self._session.config.max_restarts
        for worker in (worker for worker in self.workers if worker in lost):
            log.warning("%s: %s %s; restarting it", task, worker.name, lost[worker])
            if self._rates.restarted(worker.role) > allowed:
                raise LostError(f"{task}, after cluster.max_restarts = {allowed} restarts", {worker.name: lost[worker]})
        indices = [index for index, worker in enumerate(self.workers) if everyone or worker in lost]
        self._session.stop([self.workers[index] for index in indices])
        self.make_room()
        for index, worker in zip(indices, self._session.start(self._role, indices), strict=True):
            self.workers[index] = worker
        self._build(indices)

    def stop(self) -> None:
        """Kill all replicas."""
        self._session.stop(self.workers)

    def _build(self, indices: Sequence[int]) -> None:
        workers = [self.workers[index] for index in indices]
        task = f"building {self._role.actor}"
        outcome = call(
            workers, "build", self._spec, seconds=self._session.config.deadlines.start, task=task, together=False
        )
        if outcome.lost:
            raise LostError(task, {worker.name: why for worker, why in outcome.lost.items()})


class ClusterInfer(Replicas[InferSpec]):
    """actor_infer: replicas that split a batch's prompts, in order.

    Where it takes turns with the trainer on the same GPUs, it sleeps, without weights or KV cache, from the trainer's
    first call to the next push. The push brings the weights, the next `generate` the KV cache.
    """

    def __init__(self, session: Session, spec: InferSpec, rates: Rates, *, takes_turns: bool) -> None:
        """`takes_turns`: with the trainer, whose `before_work` must be `leave_gpu`."""
        super().__init__(session, Role.INFER, spec, rates)
        self._takes_turns = takes_turns
        self.leave_gpu()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingConfig,
        seed: int,
        done: Callable[[Rollout], None] | None = None,
        *,
        restart: bool = True,
    ) -> Rollout:
        """See rhythm.engines.interfaces.Infer. The rollout also depends on the number of replicas. `done` is called
        with a prompt's responses when all of them are there. `restart`: see `call_each`.
        """
        self._take_gpu()
        started = time.perf_counter()
        parts = [list(part) for part in torch.arange(len(prompts)).tensor_split(len(self.workers)) if len(part)]
        calls = {
            index: ("generate", [list(prompts[int(i)]) for i in part], n, sampling, part_seed(seed, index))
            for index, part in enumerate(parts)
        }
        answered: set[int] = set()
        taken: list[Rollout] = []

        def take(index: int, part: Rollout) -> None:
            group_B = part.group + int(parts[index][0])
            # After a restart, a replica answers all its prompts again: what was there already stays.
            new_B = torch.tensor([group not in answered for group in group_B.tolist()])
            if new_B.any():
                taken.append(take_rows(replace(part, group=group_B), new_B.nonzero()[:, 0]))
                answered.update(group_B.tolist())
                if done is not None:
                    done(taken[-1])

        self.call_each(calls, seconds=self._session.config.deadlines.generate, each=take, restart=restart)
        rollout = concatenate(taken, self._spec.pad_id)
        rollout = take_rows(rollout, rollout.group.argsort(stable=True))
        self._rates.processed(Role.INFER, int(rollout.response_mask.sum()), time.perf_counter() - started)
        return rollout

    def leave_gpu(self) -> None:
        """Free the GPUs for the trainer, where they are shared; the weights are dropped with the KV cache."""
        while self._takes_turns and self.has_weights:
            self.has_weights = False
            self._each_replica("sleep")  # one that is lost meanwhile has all of them refilled, so that they sleep again

    def _take_gpu(self) -> None:
        if not self._takes_turns:
            return
        if not self.has_weights:
            self.refill()
        self._each_replica("wake")

    def _each_replica(self, method: str) -> None:
        calls = {index: (method,) for index in range(len(self.workers))}
        self.call_each(calls, seconds=self._session.config.deadlines.push)


class ClusterInferAhead:
    """actor_infer while actor_train works: see rhythm.trainer.ahead.InferAhead. Raises TrainLostError where a replica
    is lost: the trainer's weights are not those that it would need again.
    """

    def __init__(self, infer: ClusterInfer) -> None:
        self._infer = infer

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingConfig,
        seed: int,
        done: Callable[[Rollout], None] | None = None,
    ) -> Rollout:
        """See ClusterInfer.generate."""
        return self._infer.generate(prompts, n, sampling, seed, done, restart=False)

    def abandon(self) -> None:
        """Kill the replicas, on whose answers `generate` may be waiting."""
        self._infer.stop()


class ClusterAttn(Replicas[AttnSpec]):
    """actor_attn: replicas that split a batch's responses."""

    def __init__(self, session: Session, spec: AttnSpec, rates: Rates) -> None:
        super().__init__(session, Role.ATTN, spec, rates)

    def signals(self, rollout: Rollout, groups: HeadGroups | None = None) -> RhythmSignals:
        """See rhythm.engines.interfaces.Attn. Head groups shared by the batch are chosen over all its responses."""
        started = time.perf_counter()
        signals = self._signals(rollout, groups)
        tap = self._spec.tap
        if groups is None and tap.grouping != "sequence":
            # With groups, spans are those of some responses alone.
            chosen = self._signals(rollout, shared_heads(signals.span, tap.quantile))
            signals = replace(chosen, span=signals.span)
        seconds = time.perf_counter() - started
        self._rates.processed(Role.ATTN, int(rollout.lens.sum()), seconds)
        self._rates.statistics += seconds
        return signals

    def _signals(self, rollout: Rollout, groups: HeadGroups | None) -> RhythmSignals:
        rows = torch.arange(len(rollout.prompt_lens)).tensor_split(len(self.workers))
        calls = {index: ("signals", take_rows(rollout, part), groups) for index, part in enumerate(rows) if len(part)}
        parts = self.call_each(calls, seconds=self._session.config.deadlines.log_probs)
        return RhythmSignals.cat([parts[index] for index in calls])


def part_seed(seed: int, part: int) -> int:
    """The seed of a replica's part of a rollout. The first part has the rollout's own seed, so that a single replica
    draws the same responses as a local engine.
    """
    return derive_seed(seed, "replica", part) if part else seed


def _nothing() -> None:
    """The default hook: before there is a weight sync, a replica keeps the weights it was built with."""
