"""Weights from actor_train to everything that reads them, a bucket at a time; the driver sees only where they lie."""

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
class Reader:
    """A role that takes the trainer's weights, and the way they take to it."""

    kind: PushKind
    replicas: Replicas[Any]


class Pusher:
    """Pushes every step's weights into the readers, and into those that were started again.

    A push whose reader is lost half-way begins anew, with all readers of it started again: the others hold a
    mixture of old and new.
    """

    def __init__(
        self, train: ClusterTrain, readers: Sequence[Reader], *, rates: Rates, gpus_of_replica: int, seconds: float
    ) -> None:
        """`gpus_of_replica`: of actor_infer; `seconds`: that a push may take."""
        self._train = train
        self._readers = list(readers)
        self._gpus_of_replica = gpus_of_replica
        self._seconds = seconds
        self._rates = rates
        self._connected: list[Reader] = []
        for reader in readers:
            reader.replicas.refill = partial(self._refill, reader)

    def push(self, version: int) -> None:
        """To all readers. Raises LostError and TrainLostError as the roles do."""
        self._until_done(self._readers, version)

    def _refill(self, reader: Reader) -> None:
        """The weights of the version that the role has; all of its replicas take part, as some ways demand."""
        self._disconnect([reader])
        self._until_done([reader], reader.replicas.version)

    def _until_done(self, readers: Sequence[Reader], version: int) -> None:
        while lost := self._attempt(readers, version).lost:
            for reader in readers:
                reader.replicas.replace("push", lost, everyone=True)
            self._disconnect(readers)
        for reader in readers:
            reader.replicas.version = version

    def _attempt(self, readers: Sequence[Reader], version: int) -> Outcome:
        """One push, left at the first loss."""
        end = time.monotonic() + self._seconds
        for reader in readers:
            if reader not in self._connected:
                outcome = self._connect(reader, end)
                if outcome.lost:
                    return outcome
                self._connected.append(reader)
        kinds = {worker: reader.kind for reader in readers for worker in reader.replicas.workers}
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
        return self._all({worker: ("finish_push", version) for worker in kinds}, end)

    def _disconnect(self, readers: Sequence[Reader]) -> None:
        self._connected = [reader for reader in self._connected if reader not in readers]

    def _connect(self, reader: Reader, end: float) -> Outcome:
        kind, workers = reader.kind, reader.replicas.workers
        # A worker can open GPU memory only of its own GPU: with ipc every rank sends.
        ranks = self._train.ranks if kind == "ipc" else self._train.ranks[:1]
        infos = self._train.ask(
            "open_sender", kind, len(workers), self._gpus_of_replica, seconds=_left(end), ranks=ranks
        )[0]
        calls: dict[Worker, tuple[Any, ...]] = {
            worker: ("init_transfer", kind, info) for worker, info in zip(workers, infos, strict=True)
        }
        return self._all({**calls, self._train.ranks[0]: ("connect", kind)}, end)

    def _all(self, calls: Mapping[Worker, tuple[Any, ...]], end: float) -> Outcome:
        pending = {worker: worker.submit(*each) for worker, each in calls.items()}
        outcome = collect(pending, _left(end), "push")
        for worker, reply in outcome.replies.items():
            self._rates.worked(worker.role, reply.seconds)
        gone = {worker: why for worker, why in outcome.lost.items() if worker in self._train.ranks}
        if gone:
            self._train.give_up("push", gone)
        return outcome


def _left(end: float) -> float:
    return max(0.0, end - time.monotonic())
