"""In which order a cluster's engines are built, and what an engine that can't be built does to the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rhythm.cluster.config import ClusterConfig
from rhythm.cluster.roles import Role
from rhythm.trainer.cluster_engines import open_cluster
from rhythm.trainer.config import TrainConfig

pytestmark = pytest.mark.cluster

PATIENCE = 60.0
"""Seconds for what another thread does at once."""


class World:
    """Stands in for session and engines. Building waits for `together` others and takes `seconds`; `fails` raises
    instead.
    """

    def __init__(self) -> None:
        self.order: list[str] = []
        self.together = threading.Barrier(1)
        self.seconds = 0.0
        self.fails: Role | None = None
        self.killed = threading.Event()

    def build(self, role: Role) -> None:
        self.order.append(f"build {role}")
        if role is self.fails:
            raise RuntimeError(f"{role} can't be built")
        if self.fails is not None:
            assert self.killed.wait(PATIENCE), "nobody ends the process that is waited for"
            self.order.append(f"{role} saw its process die")
            raise ConnectionError(role)
        self.together.wait(PATIENCE)
        time.sleep(self.seconds)
        self.order.append(f"built {role}")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    state = World()

    class FakeSession:
        def __init__(self, config: ClusterConfig, *, separate_attn: bool) -> None:
            self.config = config

        def __enter__(self) -> FakeSession:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def begin(self, *roles: Role) -> None:
            state.order.append(f"begin {' '.join(roles)}")

        def stop_all(self) -> None:
            if state.order:  # not the one before anything has begun
                state.killed.set()

        def places(self, role: Role) -> int:
            return 1

    def engine(role: Role) -> type:
        class Engine:
            def __init__(self, *_: Any, **__: Any) -> None:
                state.build(role)

            def leave_gpu(self) -> None:
                pass

        return Engine

    for role, name in ((Role.TRAIN, "ClusterTrain"), (Role.INFER, "ClusterInfer"), (Role.ATTN, "ClusterAttn")):
        monkeypatch.setattr(f"rhythm.cluster.engines.{name}", engine(role))
    monkeypatch.setattr("rhythm.cluster.weight_sync.ClusterWeightSync.__init__", lambda *_, **__: None)
    monkeypatch.setattr("rhythm.cluster.session.Session", FakeSession)
    return state


@pytest.fixture
def build(world: World, tmp_path: Path) -> Callable[..., Any]:
    """build(cluster): the engines of a run with a third role."""

    def begin(**cluster: Any) -> Any:
        config = TrainConfig.model_validate({"name": "x", "signals": {"source": "separate"}})
        with open_cluster(config, ClusterConfig.model_validate(cluster)) as engines:
            return engines((2,), 0, tmp_path, 0)

    return begin


@pytest.mark.parametrize("cluster", [{"gpus": 0, "infer": {"kv_cache_gib": 0.1}}, {"gpus": 8, "placement": "separate"}])
def test_engines_with_memory_of_their_own_are_built_at_the_same_time(
    cluster: dict[str, Any], world: World, build: Callable[..., Any]
) -> None:
    world.together = threading.Barrier(3)
    built = build(**cluster)
    assert world.order[0] == "begin train infer attn"
    assert set(world.order[1:4]) == {"build train", "build infer", "build attn"}
    assert set(world.order[4:]) == {"built train", "built infer", "built attn"}
    assert built.train.before_work == built.infer.leave_gpu


def test_engines_that_share_gpus_are_built_in_turn_by_processes_that_started_together(
    world: World, build: Callable[..., Any]
) -> None:
    world.seconds = 0.2  # enough for another to begin
    build(gpus=8)
    turns = [f"{what} {role}" for role in ("train", "infer", "attn") for what in ("build", "built")]
    assert world.order == ["begin train infer attn", *turns]


@pytest.mark.parametrize("fails", [Role.TRAIN, Role.INFER])
def test_an_engine_that_cannot_be_built_ends_the_others_and_its_error_is_the_one_raised(
    fails: Role, world: World, build: Callable[..., Any]
) -> None:
    world.fails = fails
    with pytest.raises(RuntimeError, match=f"{fails} can't be built"):
        build(gpus=0, infer={"kv_cache_gib": 0.1})
    others = {Role.TRAIN, Role.INFER, Role.ATTN} - {fails}
    assert {f"{role} saw its process die" for role in others} <= set(world.order), "none is left waiting"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("starting")]
