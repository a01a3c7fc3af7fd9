"""Two nodes that are started as docs/cluster.md says, each in a network namespace of its own, and joined by a run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None,
        reason="network namespaces need root",
    ),
]

HEAD, OTHER = "10.77.41.1", "10.77.41.2"
PORT = 6399
RAY = Path(sys.executable).with_name("ray")
JOIN = """
import sys
from rhythm.cluster.config import ClusterConfig
from rhythm.cluster.environment import prepare_ray_environment
config = ClusterConfig.model_validate({
    "gpus": 0, "ray_address": sys.argv[1], "bind_address": sys.argv[2], "threads": 1,
    "infer": {"engine": "transformers", "replicas": 2}, "train": {"engine": "torch"},
})
prepare_ray_environment(config)
from rhythm.cluster.roles import Role
from rhythm.cluster.session import Session
with Session(config, separate_attn=False) as session:
    pids = {worker.pid for worker in session.start(Role.INFER)}
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    where = ray.remote(ray.util.get_node_ip_address)
    nodes = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in ray.nodes()]
    homes = ray.get([where.options(scheduling_strategy=node).remote() for node in nodes])
    print(sorted(homes), len(pids))
"""


class Node:
    """A network namespace with a home directory of its own, where the token is."""

    def __init__(self, name: str, address: str, home: Path) -> None:
        self.name, self.address, self.home = name, address, home
        home.mkdir()

    def run(self, *command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment = {**plain, "HOME": str(self.home), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        process = subprocess.run(
            ["ip", "netns", "exec", self.name, *command],
            env=environment, capture_output=True, text=True, timeout=600, check=False, cwd=self.home,
        )  # fmt: skip
        assert not check or process.returncode == 0, process.stdout + process.stderr
        return process


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=120)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    mine = os.getpid()
    head, other = Node(f"rh{mine}", HEAD, tmp_path / "head"), Node(f"ro{mine}", OTHER, tmp_path / "other")
    made = []
    try:
        for node in (head, other):
            ip("netns", "add", node.name)
            made.append(node)
        ip(
            "link",
            "add",
            f"a{mine}",
            "netns",
            head.name,
            "type",
            "veth",
            "peer",
            "name",
            f"b{mine}",
            "netns",
            other.name,
        )
        for node, link in ((head, f"a{mine}"), (other, f"b{mine}")):
            ip("-n", node.name, "addr", "add", f"{node.address}/24", "dev", link)
            ip("-n", node.name, "link", "set", link, "up")
            ip("-n", node.name, "link", "set", "lo", "up")
        yield head, other
    finally:
        for node in made:
            pids = subprocess.run(["ip", "netns", "pids", node.name], capture_output=True, text=True, timeout=99).stdout
            for pid in pids.split():
                subprocess.run(["kill", "-9", pid], check=False, timeout=120)
            ip("netns", "del", node.name)


def test_a_run_joins_two_nodes_that_share_a_token(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    head, other = nodes
    common = ("--num-cpus", "4", "--object-store-memory", "100000000")
    head.run(RAY, "get-auth-token", "--generate")
    start = ("start", "--head", "--node-ip-address", HEAD, "--port", str(PORT), "--include-dashboard", "false")
    head.run(RAY, *start, "--temp-dir", f"/tmp/rhythm-two-{os.getpid()}", *common)
    join = ("start", "--address", f"{HEAD}:{PORT}", "--node-ip-address", OTHER, *common)
    refused = other.run(RAY, *join, check=False)
    assert refused.returncode != 0
    assert "token" in (refused.stdout + refused.stderr).lower()
    shutil.copytree(head.home / ".ray", other.home / ".ray")
    other.run(RAY, *join)
    joined = head.run(sys.executable, "-c", JOIN, f"{HEAD}:{PORT}", HEAD)
    assert joined.stdout.splitlines()[-1] == f"['{HEAD}', '{OTHER}'] 2"
