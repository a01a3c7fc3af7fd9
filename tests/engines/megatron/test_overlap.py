"""Sums of gradients that are started in the backward pass, in several buckets, against the one-machine engine.

Everywhere else they are in one bucket. Differences allowed are as in test_ranks.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron_case import OPTIONS, Case, assert_weights, run_ranks, torch_engine
from transformers import AutoModelForCausalLM

from rhythm.engines.batches import take_rows
from rhythm.engines.megatron.layout import ParallelConfig

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1800)]

BUCKET = 20_000
"""Parameters of a bucket at least; the model has 185,328."""


@pytest.mark.parametrize(
    ("parallel", "in_passes"),
    [
        (ParallelConfig(data=2), True),
        (ParallelConfig(data=2, distributed_optimizer=False), True),
        (ParallelConfig(tensor=2, context=2), True),
        (ParallelConfig(data=2, overlap_gradients=False), False),
    ],
    ids=["data", "all-reduce", "context", "off"],
)
def test_sums_start_in_the_backward_pass(case: Case, tmp_path: Path, parallel: ParallelConfig, in_passes: bool) -> None:
    """In the first step Megatron counts gradients; in the third one a data rank has no row, in the fourth each has one
    micro-batch instead of two.
    """
    few = [take_rows(batch, torch.arange(n)) for batch, n in zip(case.batches[2:], (1, 3), strict=True)]
    batches = [*case.batches[:2], *few]
    engine = torch_engine(AutoModelForCausalLM.from_pretrained(case.checkpoint, dtype=torch.float32))
    steps = [engine.step(batch) for batch in batches]
    for results in run_ranks(
        tmp_path,
        scenario="overlapped",
        parallel=parallel,
        checkpoint=case.checkpoint,
        options=OPTIONS,
        rollout=case.rollout,
        batches=batches,
        bucket_size=BUCKET,
    ):
        n = results["buckets"]
        assert n > 2 if in_passes else n == 1
        alone = (n, n) if in_passes and parallel.data == 1 else (0, n)
        assert results["started"][1:] == ([(n, n), alone, (n, n)] if in_passes else [(0, n)] * 3)
        for step, expected in zip(results["steps"], steps, strict=True):
            assert step.loss == pytest.approx(expected.loss, abs=1e-4)
        assert results["steps"][0].grad_norm == pytest.approx(steps[0].grad_norm, rel=1e-5)
        assert_weights(results["weights"], engine.weights(), atol=3e-4)


def test_several_buckets_are_saved_and_offloaded(case: Case, tmp_path: Path) -> None:
    for results in run_ranks(
        tmp_path,
        scenario="everything",
        parallel=ParallelConfig(data=2),
        checkpoint=case.checkpoint,
        options=OPTIONS,
        rollout=case.rollout,
        batches=case.batches,
        save_to=str(tmp_path / "saved"),
        load_from=[],
        bucket_size=BUCKET,
    ):
        assert_weights(results["last_weights_again"], results["last_weights"], atol=0.0)
        assert_weights(results["last_weights"], case.results["last_weights"], atol=3e-4)
