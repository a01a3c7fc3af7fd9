"""rhythm.tap.megatron on real ranks of Megatron with its own attention; with ours: test_ranks.py, test_tapped.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron_case import LAYOUTS, OPTIONS, Case, assert_near, run_ranks

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("layout", ["one", "tensor", "pipeline", "both"])
def test_padded_rows_of_dot_product_attention(case: Case, tmp_path: Path, layout: str) -> None:
    expected = case.results["signals"]
    for results in run_ranks(
        tmp_path,
        scenario="attached",
        parallel=LAYOUTS[layout],
        checkpoint=case.checkpoint,
        options=OPTIONS,
        rollout=case.rollout,
    ):
        assert results["cores"] == {"DotProductAttention"}
        signals = results["signals"]
        assert signals.heads == expected.heads
        assert torch.equal(signals.groups.local, expected.groups.local)
        assert torch.equal(signals.groups.global_, expected.groups.global_)
        assert_near(signals.span, expected.span, atol=1e-4)
        assert_near(signals.waad, expected.waad, atol=1e-4)
        assert_near(signals.fai, expected.fai, atol=1e-5)
