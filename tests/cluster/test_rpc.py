"""Deadlines and losses of calls, on actors that sleep, raise and die."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from rhythm.cluster.errors import RemoteError
from rhythm.cluster.roles import Role

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1800)]


class Actor:
    """Answers as a host of rhythm.cluster.hosts does."""

    def identify(self) -> tuple[str, int]:
        import socket

        return socket.gethostname(), os.getpid()

    def call(self, method: str, *arguments: Any) -> Any:
        if method == "raise":
            raise KeyError(*arguments)
        if method == "die":
            os._exit(1)
        if method == "sleep":
            time.sleep(*arguments)
        return SimpleNamespace(value=arguments, seconds=0.0)  # a Reply, without importing all that hosts do


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    yield ray
    ray.shutdown()


@pytest.fixture
def workers(ray: Any) -> list[Any]:
    from rhythm.cluster.rpc import Worker, identify

    made = [Worker(f"actor[{i}]", Role.INFER, ray.remote(Actor).options(num_cpus=0).remote()) for i in range(3)]
    assert not identify(made, 300).lost
    return made


@pytest.mark.timing
def test_each_fate_is_told_apart(workers: list[Any]) -> None:
    from rhythm.cluster.rpc import collect

    fine, dies, sleeps = workers
    pending = {fine: fine.submit("echo", 7), dies: dies.submit("die"), sleeps: sleeps.submit("sleep", 60)}
    started = time.monotonic()
    outcome = collect(pending, 3.0, "trial")
    assert time.monotonic() - started < 6
    assert outcome.replies[fine].value == (7,)
    assert outcome.lost[dies].startswith("died: ")
    assert outcome.lost[sleeps] == "did not answer within 3 s, and was killed"
    deadline = time.monotonic() + 5
    while psutil.pid_exists(sleeps.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_exceptions_come_back_with_the_name_and_the_traceback(workers: list[Any]) -> None:
    from rhythm.cluster.rpc import collect

    with pytest.raises(RemoteError) as caught:
        collect({w: w.submit("raise", f"key {i}") for i, w in enumerate(workers[:2])}, 120.0, "trial")
    for line in (
        "trial: actor[0] failed: KeyError: 'key 0'\n",
        "trial: actor[1] failed: KeyError: 'key 1'\n",
        ", line ",
    ):
        assert line in str(caught.value)
    first = str(caught.value).splitlines()[0]  # of whichever failed first
    assert first in {f"trial: actor[{i}] failed: KeyError: 'key {i}'" for i in range(2)}
    assert "\x1b" not in str(caught.value)


@pytest.mark.timing
def test_together_a_loss_explains_the_others_exceptions(workers: list[Any]) -> None:
    """As with ranks in a collective: one dies, its peers see a closed connection, sooner than Ray sees the death."""
    from rhythm.cluster.rpc import collect

    first, second, third = workers
    pending = {first: first.submit("raise", "closed"), second: second.submit("die"), third: third.submit("sleep", 60)}
    started = time.monotonic()
    outcome = collect(pending, 30.0, "trial", together=True)
    assert time.monotonic() - started < 10  # nobody waits for the one that sleeps
    assert set(outcome.lost) == {second}


@pytest.mark.timing
def test_together_an_exception_alone_is_an_error(workers: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from rhythm.cluster import rpc as calls

    monkeypatch.setattr(calls, "GRACE_SECONDS", 0.5)
    first, second, _ = workers
    pending = {first: first.submit("raise", "mine"), second: second.submit("sleep", 60)}
    started = time.monotonic()
    with pytest.raises(RemoteError, match="KeyError: 'mine'"):
        calls.collect(pending, 30.0, "trial", together=True)
    assert time.monotonic() - started < 5
