"""Starts and stops Ray for a run, and starts the run's processes on their GPUs."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import ray
from ray.job_config import JobConfig
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rhythm.cluster.config import ClusterConfig
from rhythm.cluster.errors import LostError
from rhythm.cluster.hosts import AttnHost, Host, InferHost, TrainHost
from rhythm.cluster.plan.placement import Slot, assign
from rhythm.cluster.roles import Role
from rhythm.cluster.rpc import Worker, identify
from rhythm.system.openmp import worker_waiting

log = logging.getLogger(__name__)

H = TypeVar("H", bound=Host)

_HOSTS: dict[Role, type[Host]] = {Role.TRAIN: TrainHost, Role.INFER: InferHost, Role.ATTN: AttnHost}


class Session:
    """Ray, started on this machine or joined, with one bundle of CPUs and GPUs reserved per node.

        with Session(config, separate_attn=False) as session:
            workers = session.start(Role.TRAIN)

    On exit all processes are killed, and Ray is stopped if it was started here. Call
    `rhythm.cluster.environment.prepare_ray_environment` before importing this module.
    """

    def __init__(self, config: ClusterConfig, *, separate_attn: bool) -> None:
        """Starts nothing yet. Raises ValueError from `assign`."""
        self.config = config
        # Directory for the logs of processes started from now on, on a shared file system; None: Ray's own logs.
        self.logs: Path | None = None
        places = assign(config, separate_attn=separate_attn)
        self._slots = {Role.TRAIN: places.train, Role.INFER: places.infer, Role.ATTN: places.attn}
        self._workers: list[Worker] = []
        self._begun: dict[Role, list[Worker]] = {}  # by `begin`, not yet taken by `start`
        self._group: PlacementGroup | None = None
        self._gpus: list[list[int]] = []

    def __enter__(self) -> Self:
        config = self.config
        environment = self._environment()
        processes = sum(map(len, self._slots.values()))
        if config.ray_address is None:
            context = ray.init(
                address="local",
                num_cpus=processes,
                include_dashboard=False,
                object_store_memory=config.object_store_mib << 20,
                _node_ip_address=config.bind_address,
                log_to_driver=False,
                logging_level=logging.WARNING,
                job_config=_OwnPath(),
                runtime_env={"env_vars": environment},
            )
        else:
            context = ray.init(
                address=config.ray_address,
                log_to_driver=False,
                job_config=_OwnPath(),
                runtime_env={"env_vars": environment},
            )
        log.info("Ray %s; its own logs in %s", ray.__version__, _log_folder(context))
        try:
            self._check_address()
            self._reserve()
        except BaseException:
            ray.shutdown()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_all()
        if self._group is not None:
            remove_placement_group(self._group)
        ray.shutdown()

    def places(self, role: Role) -> int:
        """The number of processes of the role."""
        return len(self._slots[role])

    def begin(self, *roles: Role) -> None:
        """Start all processes of the roles without waiting for them: they load their libraries at the same time, a
        large part of a start. The next `start` of the role takes them.
        """
        for role in roles:
            self._begun[role] = [self._spawn(role, index) for index in range(self.places(role))]
            self._workers += self._begun[role]

    def start(self, role: Role, indices: Sequence[int] | None = None) -> list[Worker]:
        """Start a role's processes, or those of `indices`, and wait for them. Their engines are not built yet.
        May be called in several threads, for different roles.

        Raises LostError for processes that don't start in time.
        """
        chosen = range(self.places(role)) if indices is None else indices
        log.info(
            "starting %s: %d of %d processes; loading the model may then take up to cluster.deadlines.start = %g s",
            role.actor,
            len(chosen),
            self.places(role),
            self.config.deadlines.start,
        )
        workers = self._begun.pop(role, []) if indices is None else []
        if not workers:
            workers = [self._spawn(role, index) for index in chosen]
            self._workers += workers
        outcome = identify(workers, self.config.deadlines.start)
        if outcome.lost:
            raise LostError(f"starting {role.actor}", {worker.name: why for worker, why in outcome.lost.items()})
        return workers

    def stop(self, workers: Sequence[Worker]) -> None:
        """Kill these processes; it doesn't matter if some are dead already."""
        for worker in list(workers):
            worker.kill()
            with suppress(ValueError):  # stopped before, maybe by another thread
                self._workers.remove(worker)

    def stop_all(self) -> None:
        """Kill every process of the run; a `start` that comes after a `begin` before this finds them dead."""
        self.stop(self._workers)

    def shared(self, arguments: Sequence[Any]) -> list[Any]:
        """References to pass instead of these arguments, so that each is stored once for all processes."""
        return [ray.put(argument) for argument in arguments]

    def _spawn(self, role: Role, index: int) -> Worker:
        slot = self._slots[role][index]
        gpus = tuple(self._gpus[slot.node][i] for i in slot.gpus)
        log_file = None if self.logs is None else self.logs / f"{role.actor}-{index}.log"
        actor = (
            ray.remote(_HOSTS[role])
            .options(
                num_cpus=1,
                num_gpus=0,  # the slot decides which GPUs it sees, since colocated roles share them
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, slot.node),
            )
            .remote(gpus, self.config.bind_address if self.config.on_loopback else None, log_file)
        )
        return Worker(f"{role.actor}[{index}]", role, actor, log=log_file)

    def _check_address(self) -> None:
        address = ray.util.get_node_ip_address()
        if self.config.ray_address is None and address != self.config.bind_address:
            raise RuntimeError(
                f"Ray listens on {address}, cluster.bind_address is {self.config.bind_address}: "
                "rhythm.cluster.environment.prepare_ray_environment must be called before ray is imported"
            )

    def _reserve(self) -> None:
        """Reserve one bundle of CPUs and GPUs per node."""
        config = self.config
        have = ray.cluster_resources()
        if have.get("GPU", 0) < config.gpus:
            raise ValueError(f"cluster.gpus is {config.gpus}: Ray has {have.get('GPU', 0):g}")
        slots: list[Slot] = [slot for role in self._slots.values() for slot in role]
        bundles: list[dict[str, float]] = []
        for node in range(config.nodes):
            bundle: dict[str, float] = {"CPU": sum(slot.node == node for slot in slots)}
            if config.gpus:
                bundle["GPU"] = config.gpus_per_node
            bundles.append(bundle)
        self._group = placement_group(bundles, strategy="STRICT_SPREAD" if config.nodes > 1 else "STRICT_PACK")
        end = time.monotonic() + config.deadlines.start
        if not self._group.wait(timeout_seconds=max(0.0, end - time.monotonic())):
            raise ValueError(
                f"cluster.nodes is {config.nodes}: no {config.nodes} nodes with {config.gpus_per_node} free GPUs and "
                f"{max(int(b['CPU']) for b in bundles)} free CPUs each became available in cluster.deadlines.start = "
                f"{config.deadlines.start:g} s"
            )
        if config.gpus:
            self._gpus = ray.get(
                [_visible_gpus.options(**self._whole_bundle(node)).remote() for node in range(config.nodes)],
                timeout=config.deadlines.start,
            )

    def _whole_bundle(self, node: int) -> dict[str, Any]:
        strategy = PlacementGroupSchedulingStrategy(self._group, node)
        return {"num_cpus": 0, "num_gpus": self.config.gpus_per_node, "scheduling_strategy": strategy}

    def _environment(self) -> dict[str, str]:
        """Environment variables of every process, set before it imports anything."""
        environment = {
            "OMP_NUM_THREADS": str(self.config.threads),
            "HF_HUB_OFFLINE": "1",
            **worker_waiting(),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONSAFEPATH": "1",  # their children don't import from the working directory first
        }
        if self.config.on_loopback:
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        return environment


class _OwnPath(JobConfig):  # type: ignore[misc]  # ray is untyped here
    """Keeps the driver's sys.path from the workers. Ray would put the working directory and the command's directory
    first in their sys.path, where a file torch.py would shadow the installed torch.
    """

    def _serialize(self) -> Any:
        self._py_driver_sys_path.clear()
        return super()._serialize()


@ray.remote  # type: ignore[untyped-decorator]  # ray is untyped here
def _visible_gpus() -> list[int]:
    """Indices of the GPUs of the bundle that it runs in."""
    return [int(i) for i in ray.get_gpu_ids()]


def _log_folder(context: Any) -> str:
    return str(context.address_info.get("session_dir", "the session's folder on the head node")) + "/logs"
