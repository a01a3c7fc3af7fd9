"""Sends weights from actor_train to all receivers, one bucket at a time; they don't pass through the driver."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rhythm.cluster.config import PushKind
from rhythm.cluster.engines import ClusterTrain, Replicas
from rhythm.cluster.rpc import Outcome, Worker, collect
from rhythm.cluster.utilization import Rates
from rhythm.engines.transfer import merged


@dataclass(frozen=True)
class WeightReceiver:
    """The replicas of a role that needs the trainer's weights, and how these are sent."""

    kind: PushKind
    replicas: Replicas[Any]


class ClusterWeightSync:
    """See rhythm.engines.interfaces.WeightSync: from actor_train to the receivers, also after replicas are restarted.

    When a replica is lost during a push, all receivers are restarted and the push is repeated, because the others then
    hold a mixture of old and new weights.
    """

    def __init__(
        self,
        train: ClusterTrain,
        receivers: Sequence[WeightReceiver],
        *,
        rates: Rates,
        gpus_of_replica: int,
        seconds: float,
    ) -> None:
        """`gpus_of_replica`: GPUs per replica of actor_infer; `seconds`: deadline of a push."""
        self._train = train
        self._receivers = list(receivers)
        self._gpus_of_replica = gpus_of_replica
        self._seconds = seconds
        self._rates = rates
        self._connected: list[WeightReceiver] = []
        for receiver in receivers:
            receiver.replicas.refill = partial(self._refill, receiver)
            receiver.replicas.make_room = train.leave_gpu

    def sync(self, version: int) -> None:
        """See rhythm.engines.interfaces.WeightSync. Raises LostError and TrainLostError if processes are lost, and
        RemoteError if `version` is lower than before.
        """
        self._until_done(self._receivers, version)

    def _refill(self, receiver: WeightReceiver) -> None:
        """Send the role's current version again, after a restart or a sleep; to all replicas, as NCCL requires."""
        self._disconnect([receiver])
        self._until_done([receiver], receiver.replicas.version)

    def _until_done(self, receivers: Sequence[WeightReceiver], version: int) -> None:
        while lost := self._attempt(receivers, version).lost:
            for receiver in receivers:
                receiver.replicas.replace("push", lost, everyone=True)
            self._disconnect(receivers)
        for receiver in receivers:
            receiver.replicas.version = version
            receiver.replicas.has_weights = True

    def _attempt(self, receivers: Sequence[WeightReceiver], version: int) -> Outcome:
        """One push, which ends when a process is lost."""
        end = time.monotonic() + self._seconds
        for receiver in receivers:
            if receiver not in self._connected:
                outcome = self._connect(receiver, end)
                if outcome.lost:
                    return outcome
                self._connected.append(receiver)
        kinds = {worker: receiver.kind for receiver in receivers for worker in receiver.replicas.workers}
        self._train.leave_gpu(_left(end))  # receivers on the same GPUs allocate their weights next
        outcome = self._all({worker: ("start_push",) for worker in kinds}, end)
        if outcome.lost:
            return outcome
        used = tuple(sorted(set(kinds.values())))
        self._train.ask("begin_push", seconds=_left(end))
        while (staged := self._train.ask("stage", used, seconds=_left(end)))[0] is not None:
            infos = {kind: merged([by_kind[kind] for by_kind in staged if kind in by_kind]) for kind in used}
            calls: dict[Worker, tuple[Any, ...]] = {w: ("receive", infos[kind]) for w, kind in kinds.items()}
            outcome = self._all({**calls, self._train.ranks[0]: ("transmit", used)}, end)
            if outcome.lost:
                return outcome
        self._train.ask("end_push", seconds=_left(end))
        return self._all({worker: ("finish_push", version) for worker in kinds}, end)

    def _disconnect(self, receivers: Sequence[WeightReceiver]) -> None:
        self._connected = [receiver for receiver in self._connected if receiver not in receivers]

    def _connect(self, receiver: WeightReceiver, end: float) -> Outcome:
        kind, workers = receiver.kind, receiver.replicas.workers
        # With ipc a worker can open only memory of its own GPU, so every rank must send.
        ranks = self._train.ranks if kind == "ipc" else self._train.ranks[:1]
        infos = self._train.ask(
            "open_sender", kind, len(workers), self._gpus_of_replica, seconds=_left(end), ranks=ranks
        )[0]
        calls: dict[Worker, tuple[Any, ...]] = {
            worker: ("init_transfer", kind, info) for worker, info in zip(workers, infos, strict=True)
        }
        return self._all({**calls, self._train.ranks[0]: ("connect", kind)}, end)

    def _all(self, calls: Mapping[Worker, tuple[Any, ...]], end: float) -> Outcome:
        pending = {worker: worker.submit(*call) for worker, call in calls.items()}
        outcome = collect(pending, _left(end), "push", together=True)
        for worker, reply in outcome.replies.items():
            self._rates.worked(worker.role, reply.seconds)
        lost_ranks = {worker: why for worker, why in outcome.lost.items() if worker in self._train.ranks}
        if lost_ranks:
            self._train.give_up("push", lost_ranks)
        return outcome


def _left(end: float) -> float:
    return max(0.0, end - time.monotonic())
