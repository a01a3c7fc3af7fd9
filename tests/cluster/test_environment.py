"""Variables of the cluster's processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rhythm.cluster.config import ClusterConfig
from rhythm.system.openmp import VARIABLES

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize(
    ("variables", "waiting"),
    [
        ({}, {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}),
        ({"GOMP_SPINCOUNT": "5", "OMP_NUM_THREADS": "7"}, {"GOMP_SPINCOUNT": "5"}),
    ],
)
def test_processes_that_share_a_machine_do_not_spin(
    variables: dict[str, str], waiting: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rhythm.cluster.session import Session

    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    variables_set = Session._environment(SimpleNamespace(config=ClusterConfig(threads=3)))  # type: ignore[arg-type]
    assert variables_set["OMP_NUM_THREADS"] == "3"
    assert {name: value for name, value in variables_set.items() if name in VARIABLES[1:]} == waiting
