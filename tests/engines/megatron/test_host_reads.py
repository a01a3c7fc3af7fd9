"""A forward pass of the Megatron engine reads no tensor of the device on the host, in any of its layers.

By the device "meta", whose tensors have shapes and no values: whatever asks for one raises.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from megatron_case import LAYOUTS, OPTIONS, Case, run_ranks

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_no_layer_reads_from_the_device(case: Case, tmp_path: Path) -> None:
    (result,) = run_ranks(
        tmp_path,
        scenario="without_values",
        parallel=LAYOUTS["one"],
        checkpoint=case.checkpoint,
        options=OPTIONS,
        rollout=case.rollout,
    )
    assert result["shape"][:2] == [result["tokens"], 1]
    assert result["tapped"] == result["shape"]
    assert "meta" in result["refused"], "this test would not see it"
